//! Root file systems become ext4 file systems: what real `tar` writes, OCI layers with whiteouts, and what an attacker
//! would write. The result is looked at with e2fsprogs.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

use assay_imaging::store::Content as _;
use assay_imaging::store::import::Source;
use assay_imaging::tree::AnySource;
use assay_service::error::chain;
use assay_wire::imaging::{ImageFormat, SourceFormat};
use flate2::Compression;
use flate2::write::GzEncoder;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a disk of what is called `name`; answers it, and its source's digest.
    fn build(&self, name: &str, format: SourceFormat) -> Result<(Disk, Option<String>), String> {
        let folders = [self.folder.path().to_owned()];
        let opened = AnySource::open(&self.path(name), format, &folders).map_err(|error| chain(&error))?;
        let AnySource::Tree(tree) = opened else { panic!("{format:?}") };
        let work = self.path("work");
        let _ = std::fs::remove_dir_all(&work);
        let (source, digest) = tree.build(&work, None).map_err(|error| chain(&error))?;
        assert!(source.virtual_bytes() >= 64 << 20);
        let checked = Command::new("e2fsck").arg("-fn").arg(work.join("disk.raw")).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
        Ok((Disk(work.join("disk.raw")), digest))
    }
}

/// An ext4 file system in a file.
struct Disk(PathBuf);

impl Disk {
    fn ask(&self, request: &str) -> String {
        let output = Command::new("debugfs").arg("-R").arg(request).arg(&self.0).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }

    fn content(&self, path: &str) -> String {
        self.ask(&format!("cat \"{path}\"")).split("debugfs ").next().unwrap().to_owned()
    }

    fn is_there(&self, path: &str) -> bool {
        !self.ask(&format!("stat \"{path}\"")).contains("File not found")
    }

    /// Type, mode, owner, group, links.
    fn stat(&self, path: &str) -> [String; 5] {
        let stat = self.ask(&format!("stat \"{path}\""));
        let field = |name: &str| {
            let rest = stat.split_once(name).unwrap_or_else(|| panic!("{path}: {stat}")).1;
            rest.trim_start().split("  ").next().unwrap().split_whitespace().next().unwrap().to_owned()
        };
        [field("Type:"), field("Mode:"), field("User:"), field("Group:"), field("Links:")]
    }
}

/// A tar file in memory.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn add(mut self, path: &str, flag: u8, link: &str, content: &[u8]) -> Self {
        let mut header = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, path.as_bytes());
        put(100, b"0000644\0");
        put(108, b"0001750\0");
        put(116, b"0001751\0");
        put(124, format!("{:011o}\0", content.len()).as_bytes());
        put(136, b"14371273600\0");
        put(148, b"        ");
        put(156, &[flag]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        put(329, b"0000001\0");
        put(337, b"0000003\0");
        let sum: u32 = header.iter().map(|octet| u32::from(*octet)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, path: &str, content: &str) -> Self {
        self.add(path, b'0', "", content.as_bytes())
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(ring::digest::digest(&ring::digest::SHA256, bytes))
}

/// An OCI layout of `layers`; answers its manifest's digest.
fn layout(folder: &Path, layers: &[Vec<u8>]) -> String {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let blob = |bytes: &[u8]| {
        std::fs::write(blobs.join(sha256(bytes)), bytes).unwrap();
        sha256(bytes)
    };
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            let zipped = if layer.starts_with(&[0x1f, 0x8b]) { "+gzip" } else { "" };
            let kind = format!("application/vnd.oci.image.layer.v1.tar{zipped}");
            serde_json::json!({"mediaType": kind, "digest": format!("sha256:{}", blob(layer)), "size": layer.len()})
        })
        .collect();
    let manifest = serde_json::to_vec(&serde_json::json!({"schemaVersion": 2, "layers": layers})).unwrap();
    let digest = blob(&manifest);
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [
        {"mediaType": kind, "digest": format!("sha256:{digest}"), "size": manifest.len()}]});
    std::fs::write(folder.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    std::fs::write(folder.join("oci-layout"), "{\"imageLayoutVersion\": \"1.0.0\"}").unwrap();
    digest
}

#[test]
fn what_tar_writes_is_read_right() {
    let bench = Bench::new();
    let root = bench.path("root");
    let long = format!("usr/share/{}/{}", "long-".repeat(30), "name-".repeat(40));
    std::fs::create_dir_all(root.join(&long)).unwrap();
    std::fs::write(root.join(&long).join("file with spaces"), "deep").unwrap();
    std::fs::write(root.join("tool"), vec![7; 100_000]).unwrap();
    std::fs::set_permissions(root.join("tool"), std::fs::Permissions::from_mode(0o4755)).unwrap();
    std::fs::hard_link(root.join("tool"), root.join("same")).unwrap();
    std::os::unix::fs::symlink("../outside/of/it", root.join("link")).unwrap();
    for (format, zip) in [("ustar", false), ("gnu", true), ("pax", false)] {
        // Ustar has no room for the long name.
        let excluded = if format == "ustar" { "--exclude=usr" } else { "--exclude=none" };
        let zip = if zip { "-z" } else { "--no-same-owner" };
        let made = Command::new("tar")
            .args(["-C", root.to_str().unwrap(), "-c", zip, excluded, "--owner=70000", "--group=42", "--numeric-owner"])
            .args(["--format", format, "-f", bench.path("root.tar").to_str().unwrap(), "."])
            .status()
            .unwrap();
        assert!(made.success());
        let (disk, digest) = bench.build("root.tar", SourceFormat::Tar).unwrap();
        assert_eq!(digest, Some(sha256(&std::fs::read(bench.path("root.tar")).unwrap())));
        assert_eq!(disk.stat("/tool"), ["regular", "04755", "70000", "42", "2"], "{format}");
        assert_eq!(disk.ask("cat /same").len(), disk.ask("cat /tool").len());
        assert!(disk.ask("stat /link").contains("../outside/of/it"), "as it is");
        if format != "ustar" {
            assert_eq!(disk.content(&format!("/{long}/file with spaces")), "deep", "{format}");
        }
    }
    let (disk, digest) = bench.build("root", SourceFormat::Folder).unwrap();
    assert_eq!(digest, None);
    assert_eq!(disk.stat("/same")[..2], ["regular", "04755"]);
    assert_eq!(disk.stat("/same")[4], "2");
    assert_eq!(disk.content(&format!("/{long}/file with spaces")), "deep");
}

#[test]
fn oci_layers_add_up() {
    let bench = Bench::new();
    let lower = Tar::default()
        .add("usr/bin/", b'5', "", b"")
        .file("usr/bin/sh", "old")
        .add("bin", b'2', "usr/bin", b"")
        .file("etc/gone", "x")
        .file("opt/a", "x")
        .add("dev/null", b'3', "", b"")
        .add("pipe", b'6', "", b"")
        .end();
    let upper = Tar::default()
        .file("bin/sh", "new")
        .file("etc/.wh.gone", "")
        .file("opt/.wh..wh..opq", "")
        .file("opt/b", "y")
        .add("sh", b'1', "usr/bin/sh", b"")
        .end();
    let digest = layout(&bench.path("image"), &[gzip(&lower), upper]);
    let (disk, found) = bench.build("image", SourceFormat::Oci).unwrap();
    assert_eq!(found, Some(digest));
    assert_eq!(
        (disk.content("/usr/bin/sh"), disk.content("/sh"), disk.content("/opt/b")),
        ("new".into(), "new".into(), "y".into())
    );
    assert_eq!(disk.stat("/bin")[0], "symlink", "a link that a layer wrote through stays one");
    assert!(!disk.is_there("/etc/gone") && !disk.is_there("/opt/a") && disk.is_there("/etc"));
    assert_eq!(disk.stat("/dev/null")[..4], ["character", "0644", "1000", "1001"]);
    assert!(disk.ask("stat /dev/null").contains("01:03"), "{}", disk.ask("stat /dev/null"));
    assert_eq!(disk.stat("/pipe")[0], "FIFO");
    assert_eq!(disk.stat("/sh")[2..], ["1000", "1001", "2"]);
}

#[test]
fn nothing_gets_out_and_nothing_gets_in() {
    let bench = Bench::new();
    let witness = bench.path("witness");
    std::fs::write(&witness, "untouched").unwrap();
    let up = format!("../../../../../../../../..{}", witness.display());
    for (what, tar) in [
        ("a name that goes up", Tar::default().file("../../witness", "evil")),
        ("a hard link that goes up", Tar::default().add("w", b'1', "../../../witness", b"")),
        ("a hard link to a file of the host", Tar::default().add("w", b'1', "/etc/passwd", b"")),
        ("a quote for debugfs", Tar::default().file("a\" uid 0", "evil")),
        ("a line for debugfs", Tar::default().file("a\nrm /b", "evil")),
        ("a folder that is a file", Tar::default().file("a", "x").file("a/b", "evil")),
    ] {
        std::fs::write(bench.path("evil.tar"), tar.end()).unwrap();
        let refused = bench.build("evil.tar", SourceFormat::Tar).map(|(disk, _)| disk.0);
        assert!(refused.is_err(), "{what}");
    }
    let through = Tar::default()
        .add("out", b'2', &up, b"")
        .file("out", "a file in the link's place")
        .add("dir", b'2', "/", b"")
        .file(&format!("dir{}", witness.display()), "evil")
        .file("/absolute", "inside");
    std::fs::write(bench.path("evil.tar"), through.end()).unwrap();
    let (disk, _) = bench.build("evil.tar", SourceFormat::Tar).unwrap();
    assert_eq!(disk.content("/out"), "a file in the link's place");
    assert_eq!(disk.content(&witness.display().to_string()), "evil", "within the image");
    assert_eq!(disk.content("/absolute"), "inside");
    assert_eq!(std::fs::read_to_string(&witness).unwrap(), "untouched");
    // A link in a folder is a link in the image; what it points at is not read.
    std::fs::create_dir(bench.path("folder")).unwrap();
    std::os::unix::fs::symlink(&witness, bench.path("folder/link")).unwrap();
    let (disk, _) = bench.build("folder", SourceFormat::Folder).unwrap();
    assert_eq!(disk.stat("/link")[0], "symlink");
    std::os::unix::fs::symlink("folder", bench.path("alias")).unwrap();
    std::os::unix::fs::symlink("/etc", bench.path("etc")).unwrap();
    assert!(bench.build("etc", SourceFormat::Folder).is_err());
}

#[test]
fn blobs_are_what_their_digests_say() {
    let bench = Bench::new();
    let layer = Tar::default().file("a", "honest").end();
    layout(&bench.path("image"), std::slice::from_ref(&layer));
    let blob = bench.path("image/blobs/sha256").join(sha256(&layer));
    std::fs::write(&blob, Tar::default().file("a", "exchanged").end()).unwrap();
    let error = bench.build("image", SourceFormat::Oci).map(|(disk, _)| disk.0).unwrap_err();
    assert!(error.contains(&sha256(&layer)), "{error}");
    std::fs::remove_file(&blob).unwrap();
    std::fs::write(bench.path("elsewhere"), &layer).unwrap();
    std::os::unix::fs::symlink("../../../elsewhere", &blob).unwrap();
    let error = bench.build("image", SourceFormat::Oci).map(|(disk, _)| disk.0).unwrap_err();
    assert!(error.contains("opening blobs"), "a blob is no link: {error}");
    std::fs::remove_file(&blob).unwrap();
    std::fs::write(&blob, &layer[..700]).unwrap();
    assert!(bench.build("image", SourceFormat::Oci).is_err(), "cut short");
    let several = serde_json::json!({"manifests": [
        {"mediaType": "x", "digest": "sha256:0", "size": 1}, {"mediaType": "x", "digest": "sha256:0", "size": 1}]});
    std::fs::write(bench.path("image/index.json"), several.to_string()).unwrap();
    let error = bench.build("image", SourceFormat::Oci).map(|(disk, _)| disk.0).unwrap_err();
    assert!(error.contains("several images"), "{error}");
}

#[test]
fn a_tar_file_that_is_none_or_ends_early_is_refused() {
    let bench = Bench::new();
    let good = Tar::default().file("a", &"x".repeat(3000)).file("b", "y").end();
    for end in [1, 511, 513, 2000, 4000] {
        std::fs::write(bench.path("cut.tar"), &good[..end]).unwrap();
        assert!(bench.build("cut.tar", SourceFormat::Tar).is_err(), "{end}");
    }
    std::fs::write(bench.path("cut.tar"), gzip(&good)).unwrap();
    bench.build("cut.tar", SourceFormat::Tar).unwrap();
    std::fs::write(bench.path("cut.tar"), &gzip(&good)[..60]).unwrap();
    assert!(bench.build("cut.tar", SourceFormat::Tar).is_err());
    let folders = [bench.folder.path().to_owned()];
    assert!(Source::open(&bench.path("none"), ImageFormat::Raw, &folders).is_err());
    let error = AnySource::open(&bench.path("cut.tar"), SourceFormat::Oci, &folders).unwrap_err();
    assert!(error.to_string().contains("is no OCI image layout"), "{error}");
}
