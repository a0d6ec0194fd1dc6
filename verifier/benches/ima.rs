//! What a measurement list costs, on one core. The ceiling is hashing the same octets and nothing else: SHA-1 and SHA-256
//! of each entry's template data, and the extension of PCR 10, by OpenSSL. The peer is Keylime.

#![allow(clippy::unwrap_used, reason = "a benchmark may end where it cannot go on")]

#[path = "../../benches/figure/mod.rs"]
mod figure;
mod keylime;

use assay_tpm::algorithm::HashAlgorithm;
use assay_verifier::ima::policy::ImaPolicy;
use assay_verifier::ima::writer::{ListWriter, digest_ng, sized_fields, string};
use assay_verifier::ima::{Advanced, Extension, ImaState, Limits, MeasurementList, Replay, advance};
use assay_verifier::quote::{PCR_COUNT, PcrValue};
use assay_wire::evidence::ImaList;
use figure::{Better, Figure, in_turns, rate, wanted};
use keylime::Keylime;
use openssl::sha::{Sha1, Sha256};
use std::hint::black_box;

fn main() {
    if !wanted("ima") {
        return;
    }
    let paths: Vec<String> = (0..ENTRIES).map(path).collect();
    let mut list = ListWriter::after([0; 32]).boot_aggregate(&[[0; 32]; PCR_COUNT]);
    for (number, path) in paths.iter().enumerate() {
        list = list.file(path, &digest(number));
    }
    let entries = list.entries();
    let ceiling = bare_hashing(&paths);
    let figure = |name, ours, theirs| {
        let against = "SHA-1, SHA-256 and extension alone";
        Figure { bench: "ima", name, unit: "entries/s", ours, against, theirs, better: Better::Higher }.report();
    };

    let replay = || {
        let read = MeasurementList::binary(list.bytes(), Limits::EVIDENCE).unwrap();
        let mut replay = Replay::start(HashAlgorithm::Sha256, Extension::Rehashed);
        for entry in read.entries() {
            let entry = entry.unwrap();
            assert_eq!(entry.template_digest_matches(), Some(true));
            replay.extend(&entry);
        }
        assert_eq!(replay.value(), list.pcr10());
        entries
    };
    let (ours, theirs) = in_turns(|| rate(replay), || rate(&ceiling));
    figure("list: parse, template digests, PCR 10", ours, theirs);

    let mut pcrs = [PcrValue::new([0; 32]); PCR_COUNT];
    pcrs[10] = PcrValue::new(list.pcr10());
    let sent = ImaList { first_entry: 0, entries: list.bytes().to_vec() };
    let state = ImaState::admitted(&PcrValue::new([0; 32]));
    let policy = policy(&paths);
    for (name, policy) in
        [("list: appraisal without a policy", None), ("list: appraisal, a digest for each path", Some(&policy))]
    {
        let appraise = || {
            let advanced = advance(&state, Some(&sent), &pcrs, policy).unwrap();
            assert!(matches!(black_box(advanced), Advanced::Explained { .. }));
            entries
        };
        let (ours, theirs) = in_turns(|| rate(appraise), || rate(&ceiling));
        figure(name, ours, theirs);
    }
    beside_keylime(&list, &paths, &sent, &state, &pcrs, &policy);
}

/// The same list with the same policy, ours and Keylime's in turns.
fn beside_keylime(
    list: &ListWriter,
    paths: &[String],
    sent: &ImaList,
    state: &ImaState,
    pcrs: &[PcrValue; PCR_COUNT],
    policy: &ImaPolicy,
) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("list"), as_text(paths)).unwrap();
    std::fs::write(folder.path().join("pcr10"), hex::encode(list.pcr10())).unwrap();
    let Some(mut peer) = Keylime::start(folder.path()) else { return };
    let ours = || {
        let advanced = advance(state, Some(sent), pcrs, Some(policy)).unwrap();
        assert!(matches!(black_box(advanced), Advanced::Explained { .. }));
        list.entries()
    };
    let (ours, theirs) = in_turns(|| rate(ours), || peer.rate("ima"));
    let (name, against) = ("list: appraisal, a digest for each path", "Keylime");
    Figure { bench: "ima", name, unit: "entries/s", ours, against, theirs, better: Better::Higher }.report();
}

/// The list as `ascii_runtime_measurements` has it, which is how Keylime reads lists.
fn as_text(paths: &[String]) -> String {
    let line = |name: &str, digest: &[u8; 32]| {
        let data = sized_fields(&[&digest_ng("sha256", digest), &string(name)]);
        format!("10 {} ima-ng sha256:{} {name}\n", hex::encode(openssl::sha::sha1(&data)), hex::encode(digest))
    };
    let aggregate = openssl::sha::sha256(&[0; 320]);
    let files = paths.iter().enumerate().map(|(number, path)| line(path, &digest(number)));
    std::iter::once(line("boot_aggregate", &aggregate)).chain(files).collect()
}

fn bare_hashing(paths: &[String]) -> impl Fn() -> u64 {
    let data: Vec<Vec<u8>> = paths
        .iter()
        .enumerate()
        .map(|(number, path)| sized_fields(&[&digest_ng("sha256", &digest(number)), &string(path)]))
        .collect();
    move || {
        let mut pcr = [0; 32];
        for data in &data {
            let mut sha1 = Sha1::new();
            sha1.update(data);
            black_box(sha1.finish());
            let mut template = Sha256::new();
            template.update(data);
            let mut joined = [0; 64];
            joined[..32].copy_from_slice(&pcr);
            joined[32..].copy_from_slice(&template.finish());
            let mut extended = Sha256::new();
            extended.update(&joined);
            pcr = extended.finish();
        }
        black_box(pcr);
        data.len() as u64
    }
}

fn policy(paths: &[String]) -> ImaPolicy {
    let digests = |number| vec![format!("sha256:{}", hex::encode(digest(number)))];
    let files: serde_json::Map<_, _> =
        paths.iter().enumerate().map(|(number, path)| (path.clone(), digests(number).into())).collect();
    serde_json::from_value(serde_json::json!({"mode": "enforce", "files": files})).unwrap()
}

/// As long as paths on a Debian system are.
fn path(number: usize) -> String {
    format!("/usr/lib/x86_64-linux-gnu/library-{number:05}.so.1")
}

fn digest(number: usize) -> [u8; 32] {
    [u8::try_from(number % 256).unwrap(); 32]
}

const ENTRIES: usize = 6000;
