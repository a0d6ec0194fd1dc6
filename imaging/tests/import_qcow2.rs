//! qcow2 files made by the real `qemu-img`: read right, or refused in words.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

use assay_imaging::store::export::Exported;
use assay_imaging::store::import::Source;
use assay_imaging::store::{ImageStore as _, LocalStore};
use assay_service::error::chain;
use assay_wire::id::ImageKey;
use assay_wire::imaging::ImageFormat;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

fn qemu_img(arguments: &[&str], folder: &Path) {
    let output = Command::new("qemu-img").args(arguments).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// 5 MiB and a sector, with content, zeros, and content that compresses.
fn content() -> Vec<u8> {
    let mut content = vec![0; (5 << 20) + 512];
    for (at, octet) in content.iter_mut().enumerate() {
        *octet = match at >> 20 {
            0 => (at.wrapping_mul(2_654_435_761) >> 7) as u8,
            2 => 0x41,
            4 => (at % 251) as u8,
            _ => 0,
        };
    }
    content
}

fn folder_with_source() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    std::fs::write(path.join("source.raw"), content()).unwrap();
    (folder, path)
}

#[test]
fn every_kind_that_qemu_makes_is_read_right() {
    let (_folder, path) = folder_with_source();
    for (name, options) in [
        ("plain", vec![]),
        ("compressed", vec!["-c"]),
        ("small-clusters", vec!["-o", "cluster_size=512"]),
        ("large-clusters", vec!["-o", "cluster_size=2M"]),
        ("version-2", vec!["-o", "compat=0.10"]),
        ("lazy-refcounts", vec!["-o", "lazy_refcounts=on"]),
    ] {
        let file = format!("{name}.qcow2");
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2"];
        arguments.extend(options);
        arguments.extend(["source.raw", file.as_str()]);
        qemu_img(&arguments, &path);
        let store = LocalStore::open(&path.join(name)).unwrap();
        let source = Source::open(&path.join(&file), ImageFormat::Qcow2, std::slice::from_ref(&path)).unwrap();
        let mut seen = Vec::new();
        let image = store
            .import(ImageKey::random(), &"p".parse().unwrap(), &source, &mut |done, total| {
                seen.push((done, total));
                ControlFlow::Continue(())
            })
            .unwrap();
        let golden = store.open_image(image.key).unwrap();
        let mut got = vec![1; usize::try_from(golden.byte_len()).unwrap()];
        golden.read_at(0, &mut got).unwrap();
        assert!(got == content(), "{name} differs");
        assert!(image.data_bytes < image.virtual_bytes, "{name} is sparse");
        assert!(seen.is_sorted() && seen.last() == Some(&(got.len() as u64, got.len() as u64)), "{name}: {seen:?}");
    }
}

#[test]
fn whatever_needs_another_file_or_another_reader_is_refused() {
    let (_folder, path) = folder_with_source();
    qemu_img(&["convert", "-O", "qcow2", "source.raw", "base.qcow2"], &path);
    qemu_img(&["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "backed.qcow2"], &path);
    qemu_img(&["create", "-f", "qcow2", "-o", "data_file=outside.raw", "external.qcow2", "1M"], &path);
    qemu_img(&["convert", "-O", "qcow2", "-o", "compression_type=zstd", "-c", "source.raw", "zstd.qcow2"], &path);
    qemu_img(&["convert", "-O", "qcow2", "-o", "extended_l2=on", "source.raw", "extended.qcow2"], &path);
    for (file, why) in [
        ("backed.qcow2", "it has a backing file"),
        ("external.qcow2", "its data is in an external file"),
        ("zstd.qcow2", "a compression other than zlib"),
        ("extended.qcow2", "extended L2 entries"),
        ("source.raw", "it is not a qcow2 file"),
    ] {
        let error = Source::open(&path.join(file), ImageFormat::Qcow2, std::slice::from_ref(&path)).unwrap_err();
        assert!(chain(&error).contains(why), "{file}: {}", chain(&error));
        assert!(chain(&error).contains(file), "the file is named: {}", chain(&error));
    }
}

#[test]
fn a_truncated_or_damaged_file_fails_and_leaves_nothing() {
    let (_folder, path) = folder_with_source();
    qemu_img(&["convert", "-c", "-O", "qcow2", "source.raw", "good.qcow2"], &path);
    let good = std::fs::read(path.join("good.qcow2")).unwrap();
    let store = LocalStore::open(&path.join("store")).unwrap();
    let mut failed = 0;
    // Each octet of the header and of the tables behind it, one at a time; and every kind of truncation.
    let damaged = (0..good.len()).step_by(977).map(|at| {
        let mut bad = good.clone();
        bad[at] ^= 0xff;
        bad
    });
    let truncated = (0..good.len()).step_by(good.len() / 40).map(|end| good[..end].to_vec());
    for bad in damaged.take(120).chain(truncated) {
        std::fs::write(path.join("bad.qcow2"), bad).unwrap();
        let opened = Source::open(&path.join("bad.qcow2"), ImageFormat::Qcow2, std::slice::from_ref(&path));
        let Ok(source) = opened else {
            failed += 1;
            continue;
        };
        let key = ImageKey::random();
        match store.import(key, &"p".parse().unwrap(), &source, &mut |_, _| ControlFlow::Continue(())) {
            Ok(_) => store.remove_image(key).unwrap(),
            Err(_) => failed += 1,
        }
        assert!(store.images().unwrap().is_empty());
        store.forget_imports(&[]).unwrap();
        assert_eq!(std::fs::read_dir(path.join("store/images")).unwrap().count(), 0);
    }
    assert!(failed > 20, "only {failed} damaged files were noticed");
}

#[test]
fn what_is_exported_is_read_by_qemu_and_by_us_and_can_be_gone_on_with_anywhere() {
    let (_folder, path) = folder_with_source();
    let store = LocalStore::open(&path.join("store")).unwrap();
    let source = Source::open(&path.join("source.raw"), ImageFormat::Raw, std::slice::from_ref(&path)).unwrap();
    let (key, project) = (ImageKey::random(), "p".parse().unwrap());
    let mut go_on = |_, _| ControlFlow::Continue(());
    store.import(key, &project, &source, &mut go_on).unwrap();
    let disk = assay_wire::id::DiskId::random();
    store.create_disk(disk, &project, key).unwrap();
    store.open_disk(disk).unwrap().write_at(70_000, &[0x77; 100_000]).unwrap();
    let taken = ImageKey::random();
    store.snapshot(disk, taken).unwrap();
    let mut changed = content();
    changed[70_000..170_000].fill(0x77);
    for (image, expected) in [(key, content()), (taken, changed)] {
        for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
            let file = Exported::new(store.open_image(image).unwrap(), format).unwrap();
            // In pieces that fit nothing, as an export that is broken off all the time.
            let mut octets = vec![0; usize::try_from(file.byte_len()).unwrap()];
            for (number, piece) in octets.chunks_mut(77_777).enumerate() {
                file.read_at(number as u64 * 77_777, piece).unwrap();
            }
            let name = path.join("exported");
            std::fs::write(&name, &octets).unwrap();
            let again = Source::open(&name, format, std::slice::from_ref(&path)).unwrap();
            let digest = ring::digest::digest(&ring::digest::SHA256, &expected);
            assert_eq!(again.content_sha256().unwrap(), hex::encode(digest), "{format:?}");
            if format == ImageFormat::Qcow2 {
                qemu_img(&["check", "-f", "qcow2", "exported"], &path);
                std::fs::write(path.join("expected.raw"), &expected).unwrap();
                qemu_img(&["compare", "-f", "qcow2", "-F", "raw", "exported", "expected.raw"], &path);
                assert!(octets.len() < expected.len(), "sparse stays sparse");
            }
        }
    }
}
