//! Measurement lists of real machines and of other projects' tests. The corpus is not part of the repository:
//! `ASSAY_CORPUS` names its folder, and without one these tests say that they skipped.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

use assay_tpm::algorithm::HashAlgorithm;
use assay_verifier::ima::{Entry, Extension, MeasurementList};
use std::path::{Path, PathBuf};

/// Each list with its name, if they are there.
fn lists() -> Vec<(String, Vec<u8>)> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpus");
    let folder = std::env::var_os("ASSAY_CORPUS").map_or(default, PathBuf::from).join("ima");
    let Ok(files) = std::fs::read_dir(&folder) else {
        eprintln!("skipped: no corpus at {} (set ASSAY_CORPUS)", folder.display());
        return Vec::new();
    };
    let read = |path: PathBuf| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap());
    files.map(|file| read(file.unwrap().path())).collect()
}

#[test]
fn every_list_is_read_and_its_template_digests_are_those_of_its_data() {
    for (name, text) in lists() {
        let list = MeasurementList::from_file(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let entries: Vec<Entry<'_>> = list.entries().map(Result::unwrap).collect();
        assert_eq!(
            entries.len(),
            text.split(|octet| *octet == b'\n').filter(|line| !line.is_empty()).count(),
            "{name}"
        );
        assert_eq!(entries[0].shown_name(), "boot_aggregate", "{name}");
        // Two lists are of banks that no TPM here has: their template digests are of SM3, or made up.
        let foreign = name.ends_with("sm3_256") || name.ends_with("unknown");
        for entry in &entries {
            let right = entry.template_digest_matches();
            assert!(foreign || right != Some(false) || made_up(&name, entry), "{name}: {entry}");
        }
        let banks = list.compute_pcrs(HashAlgorithm::Sha256, Extension::Rehashed).unwrap();
        assert_eq!(banks.keys().copied().collect::<Vec<_>>(), [10], "{name}");
    }
}

/// Entries that another project's tests changed by hand.
fn made_up(list: &str, entry: &Entry<'_>) -> bool {
    list.starts_with("keylime-tests") && entry.index() == 0
}

#[test]
fn no_cut_or_flipped_list_panics() {
    for (name, text) in lists() {
        let text = &text[..text.len().min(4000)];
        for at in 0..text.len() {
            let mut flipped = text.to_vec();
            flipped[at] ^= 1 << (at % 8);
            for bytes in [&text[..at], &flipped] {
                if let Ok(list) = MeasurementList::from_file(bytes) {
                    assert!(list.entries().filter(Result::is_err).count() <= 1, "{name}, octet {at}");
                }
            }
        }
    }
}
