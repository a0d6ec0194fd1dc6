//! Measurement lists of real machines and of other projects' tests. The corpus is not part of the repository:
//! `ASSAY_CORPUS` names its folder, and without one these tests say that they skipped. `make exhaustive` looks at every
//! change of every list.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod mutations;

use assay_tpm::algorithm::HashAlgorithm;
use assay_verifier::ima::policy::ImaPolicy;
use assay_verifier::ima::writer::{ListWriter, digest_ng, string};
use assay_verifier::ima::{Entry, Extension, IMA_PCR, ImaState, Limits, MeasurementList, Replay, advance};
use assay_verifier::quote::{PCR_COUNT, PcrValue};
use assay_wire::evidence::ImaList;
use mutations::{Input, corpus, each_change, seeds};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Each list with its name, if they are there.
fn lists() -> Vec<Input> {
    let files = corpus("ima").into_iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
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

/// Asks every entry everything that it can be asked, but for those that `known` has: the answers depend on the entry alone.
fn examine(known: &[Entry<'_>], list: &MeasurementList<'_>) {
    let mut broken = 0;
    for (index, entry) in list.entries().enumerate() {
        let Ok(entry) = entry else {
            broken += 1;
            continue;
        };
        if known.get(index).is_some_and(|known| is_the_same(known, &entry)) {
            continue;
        }
        let _shown = (entry.to_string(), entry.template_digest_matches());
        for bank in HashAlgorithm::ALL {
            for extension in [Extension::Rehashed, Extension::ZeroPaddedSha1] {
                let mut replay = Replay::start(bank, extension);
                replay.extend(&entry);
                assert_eq!(replay.value().len(), bank.digest_bytes());
            }
        }
    }
    // The first that is not whole ends the list.
    assert!(broken <= 1);
}

fn is_the_same(known: &Entry<'_>, entry: &Entry<'_>) -> bool {
    (known.pcr(), known.template(), known.template_digest()) == (entry.pcr(), entry.template(), entry.template_digest())
        && (known.name(), known.file_digest(), known.mode()) == (entry.name(), entry.file_digest(), entry.mode())
        && (known.signature(), known.buffer()) == (entry.signature(), entry.buffer())
}

/// As evidence, with a policy that looks at all of it, and the quote that the list itself comes to, so that it is judged.
fn appraise(policy: &ImaPolicy, bytes: &[u8]) {
    let Ok(list) = MeasurementList::binary(bytes, Limits::EVIDENCE) else { return };
    let pcrs = list.compute_pcrs(HashAlgorithm::Sha256, Extension::Rehashed);
    let reached = pcrs.ok().and_then(|pcrs| <[u8; 32]>::try_from(&**pcrs.get(&10)?).ok());
    let mut quoted = [PcrValue::new([0; 32]); PCR_COUNT];
    quoted[usize::from(IMA_PCR)] = PcrValue::new(reached.unwrap_or([1; 32]));
    let list = ImaList { first_entry: 0, entries: bytes.to_vec() };
    if let Err(reasons) = advance(&ImaState::admitted(&PcrValue::new([0; 32])), Some(&list), &quoted, Some(policy)) {
        assert!(reasons.iter().all(|reason| !reason.is_empty()));
    }
}

/// One with an entry of each kind.
fn written() -> Input {
    let list = ListWriter::after([0; 32]).boot_aggregate(&[[1; 32]; 10]).file("/usr/bin/true", &[2; 32]);
    let list =
        list.signed_file("/usr/bin/false", &[3; 32], &[3, 2, 4, 1, 2, 3, 4, 0, 2, 9, 9]).buffer("kexec", b"quiet");
    let list = list.violation("/var/log/journal").legacy("/init", &[4; 20]);
    let verity = [b"verity:", &*digest_ng("sha256", &[5; 32])].concat();
    let list = list.entry("ima-sigv2", &[&verity, &string("/usr/lib/libc.so.6"), &[]]);
    let list = list.entry("d-ng|n-ng|iuid|imode", &[&digest_ng("sha1", &[6; 20]), &string("/a"), &[0; 4], &[0; 2]]);
    ("a written list".to_owned(), list.bytes().to_vec())
}

/// Of the project's own lists, and of the corpus where it is there; the short ones as evidence, too.
#[test]
fn no_truncation_and_no_flipped_bit_panics() {
    let policy: ImaPolicy = serde_json::from_str(include_str!("../../fuzz/targets/ima_policy.json")).unwrap();
    let mut files = seeds("ima_list");
    files.push(written());
    files.extend(lists());
    let read = |(name, bytes)| (name, MeasurementList::from_file(bytes).unwrap());
    let whole: BTreeMap<&String, _> = files.iter().map(|(name, bytes)| read((name, bytes))).collect();
    let known: BTreeMap<_, Vec<_>> =
        whole.iter().map(|(name, list)| (*name, list.entries().map(Result::unwrap).collect())).collect();
    for list in whole.values() {
        examine(&[], list);
    }
    each_change(files.iter().collect(), |(name, original)| {
        let (known, policy, short) = (&known[name], &policy, original.len() <= SHORT);
        move |changed| {
            if let Ok(list) = MeasurementList::from_file(changed) {
                examine(known, &list);
            }
            if short {
                appraise(policy, changed);
            }
        }
    });
}

/// Octets of a list that takes no time to hash whole.
const SHORT: usize = 4096;
