//! Lists of every template, forward and back.

use super::policy::ImaDigest;
use super::writer::{ListWriter, digest_ng, sized_fields, string};
use super::*;
use proptest::prelude::*;

fn read(bytes: &[u8]) -> Result<Vec<Entry<'_>>, ImaError> {
    Entries::new(bytes, HashAlgorithm::Sha1, Limits::EVIDENCE).collect()
}

fn pcr10(bytes: &[u8]) -> Vec<u8> {
    let list = MeasurementList::binary(bytes, Limits::EVIDENCE).unwrap();
    list.compute_pcrs(HashAlgorithm::Sha256, Extension::Rehashed).unwrap().remove(&10).unwrap()
}

/// One entry of each template that the kernel has, and one of a format without a name.
fn every_template() -> ListWriter {
    let digest = digest_ng("sha256", &[7; 32]);
    let evm: [&[u8]; 9] = [
        &digest,
        b"/usr/bin/su\0",
        b"\x05\x02evm",
        b"security.ima|security.selinux\0",
        &[1, 0, 0, 0, 2, 0, 0, 0],
        &[9, 9, 9],
        &[0; 4],
        &[0; 4],
        &0o104_755_u16.to_le_bytes(),
    ];
    ListWriter::after([0; 32])
        .boot_aggregate(&[[3; 32]; 15])
        .legacy("/init", &[1; 20])
        .entry("ima-ngv2", &[b"verity:sha256:\0\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07", b"/a\0"])
        .signed_file("/usr/bin/ls", &[2; 32], &[3, 2, 4])
        .signed_file("/usr/bin/unsigned", &[2; 32], &[])
        .entry("ima-sigv2", &[&[b"ima:", &digest[..]].concat(), b"/b\0", b"\x06sig"])
        .buffer(".ima", b"a key")
        .entry("ima-modsig", &[&digest, b"/lib/m.ko\0", b"", &digest_ng("sha256", &[8; 32]), b"pkcs7"])
        .entry("evm-sig", &evm)
        .entry("d-ng|n-ng|sig", &[&digest, b"/c\0", b"s"])
        .violation("/var/log/messages")
        .file("/usr/bin/with_spaces", &[5; 32])
}

#[test]
fn every_template_is_read_and_replays_as_the_kernel_extends() {
    let list = every_template();
    let entries = read(list.bytes()).unwrap();
    assert_eq!(entries.len() as u64, list.entries());
    assert_eq!(pcr10(list.bytes()), list.pcr10());
    for entry in &entries {
        assert!(entry.is_understood(), "{entry}");
        assert_eq!(entry.template_digest_matches(), (!entry.is_violation()).then_some(true), "{entry}");
        assert!(entry.file_digest().is_some(), "{entry}");
    }
    let names: Vec<_> = entries.iter().map(Entry::shown_name).collect();
    assert_eq!(names[..4], ["boot_aggregate", "/init", "/a", "/usr/bin/ls"]);
    assert_eq!(entries[1].file_digest().unwrap().algorithm, "sha1");
    assert_eq!(entries[2].file_digest().unwrap().kind, DigestKind::Verity);
    assert_eq!(entries[3].signature(), [3, 2, 4]);
    assert_eq!(entries[6].buffer(), Some(&b"a key"[..]));
    assert_eq!(entries[8].mode(), Some(0o104_755));
    assert!(entries[10].is_violation());
}

#[test]
fn an_ascii_list_is_the_same_list() {
    let list = every_template();
    let text = ascii(&read(list.bytes()).unwrap());
    let again = MeasurementList::from_file(text.as_bytes()).unwrap();
    assert_eq!(again.bytes, list.bytes(), "{text}");
    assert_eq!(MeasurementList::from_file(list.bytes()).unwrap().bytes, list.bytes());
}

/// As the kernel prints these entries, for the templates above.
fn ascii(entries: &[Entry<'_>]) -> String {
    let mut text = String::new();
    for entry in entries {
        let digest = entry.file_digest().unwrap();
        let kind = match (entry.template(), digest.kind) {
            ("ima-ngv2" | "ima-sigv2", DigestKind::Ima) => "ima:",
            ("ima-ngv2" | "ima-sigv2", DigestKind::Verity) => "verity:",
            _ => "",
        };
        let algorithm = if entry.template() == "ima" { String::new() } else { format!("{kind}{}:", digest.algorithm) };
        let rest = match entry.template() {
            "ima" | "ima-ng" | "ima-ngv2" => String::new(),
            "ima-buf" => format!(" {}", hex::encode(entry.buffer().unwrap())),
            "ima-modsig" => format!("  sha256:{} {}", hex::encode([8; 32]), hex::encode(b"pkcs7")),
            "evm-sig" => format!(
                " {} security.ima|security.selinux 0100000002000000 090909 0 0 {}",
                hex::encode(b"\x05\x02evm"),
                0o104_755
            ),
            _ => format!(" {}", hex::encode(entry.signature())),
        };
        text += &format!(
            "{} {} {} {algorithm}{} {}{rest}\n",
            entry.pcr(),
            hex::encode(entry.template_digest()),
            entry.template(),
            hex::encode(digest.octets),
            entry.shown_name()
        );
    }
    text
}

#[test]
fn old_kernels_extend_sha_1_filled_with_zeros() {
    let list = ListWriter::after([0; 32]).file("/init", &[1; 32]);
    let entry = &read(list.bytes()).unwrap()[0];
    let mut replay = Replay::start(HashAlgorithm::Sha256, Extension::ZeroPaddedSha1);
    replay.extend(entry);
    let mut extended = [0; 64];
    extended[32..52].copy_from_slice(entry.template_digest());
    assert_eq!(replay.value(), HashAlgorithm::Sha256.digest(&extended).as_ref());
}

#[test]
fn sizes_are_compared_before_they_are_believed() {
    let whole = every_template();
    for field in [24, 34] {
        let mut bytes = whole.bytes().to_vec();
        bytes[field..field + 4].copy_from_slice(&[0xff; 4]);
        assert!(matches!(read(&bytes), Err(ImaError::Malformed { index: 0, .. })));
    }
    let limits = Limits { list_bytes: 100, template_bytes: 50 };
    assert!(matches!(MeasurementList::binary(whole.bytes(), limits), Err(ImaError::TooLarge { limit: 100, .. })));
    let limits = Limits { template_bytes: 10, ..Limits::EVIDENCE };
    assert!(Entries::new(whole.bytes(), HashAlgorithm::Sha1, limits).next().unwrap().is_err());
}

#[test]
fn what_is_not_whole_ends_the_reading() {
    let list = every_template();
    for length in 0..list.bytes().len() {
        let cut = &list.bytes()[..length];
        let read: Vec<_> = Entries::new(cut, HashAlgorithm::Sha1, Limits::EVIDENCE).collect();
        let errors = read.iter().filter(|entry| entry.is_err()).count();
        assert!(errors <= 1 && read.iter().rev().skip(1).all(Result::is_ok), "{length}");
    }
}

fn any_list() -> impl Strategy<Value = ListWriter> {
    let path = "[a-zA-Z0-9/._ \"'\n\t\u{1b}-]{1,40}";
    let entry = (0..5u8, path, any::<[u8; 32]>(), prop::collection::vec(any::<u8>(), 0..80));
    prop::collection::vec(entry, 0..40).prop_map(|entries| {
        entries.into_iter().fold(ListWriter::after([0; 32]), |list, (kind, path, digest, octets)| match kind {
            0 => list.file(&path, &digest),
            1 => list.signed_file(&path, &digest, &octets),
            2 => list.buffer(&path, &octets),
            3 => list.violation(&path),
            _ => list.entry("no-such-template", &[&octets, &string(&path)]),
        })
    })
}

proptest! {
    #[test]
    fn a_policys_digest_is_an_entrys_exactly_when_both_are_one(
        ours in 0_usize..6, theirs in (0_usize..5, any::<bool>(), 0_usize..4), same in any::<bool>()
    ) {
        let known = ["sha256", "sha384", "sha512", "verity:sha256", "verity:sha384", "verity:sha512"][ours];
        let length = [32, 48, 64][ours % 3];
        let digest: ImaDigest = format!("{known}:{}", "ab".repeat(length)).parse().unwrap();
        let (algorithm, verity, their_length) = theirs;
        let octets = vec![if same { 0xab } else { 0xac }; [20, 32, 48, 64][their_length]];
        let algorithm = ["sha1", "sha256", "sha384", "sha512", "sm3"][algorithm];
        let kind = if verity { DigestKind::Verity } else { DigestKind::Ima };
        let found = FileDigest { kind, algorithm, octets: &octets };
        prop_assert_eq!(digest.is(&found), ImaDigest::of(&found).is_some_and(|found| found == digest));
    }

    #[test]
    fn any_list_replays_to_what_was_extended(list in any_list()) {
        let entries = read(list.bytes()).unwrap();
        prop_assert_eq!(entries.len() as u64, list.entries());
        if list.entries() > 0 {
            prop_assert_eq!(pcr10(list.bytes()), list.pcr10());
        }
    }

    #[test]
    fn any_octets_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _read = read(&bytes);
        let _file = MeasurementList::from_file(&bytes);
    }

    #[test]
    fn any_flipped_bit_is_read_or_refused_and_replays_to_something_else(
        list in any_list(), place in any::<prop::sample::Index>(), bit in 0..8u8,
    ) {
        let mut bytes = list.bytes().to_vec();
        prop_assume!(!bytes.is_empty());
        let at = place.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let Ok(entries) = read(&bytes) else { return Ok(()) };
        // What replay does not cover is the SHA-1 digest and the PCR's index, which are compared instead, a template's
        // name, and the data of violations.
        let covered = entries.iter().all(|entry| entry.template_digest_matches() == Some(true) && entry.pcr() == 10);
        let renamed = entries.iter().zip(read(list.bytes()).unwrap()).any(|(now, then)| now.template() != then.template());
        if covered && !renamed {
            prop_assert_ne!(pcr10(&bytes), list.pcr10());
        }
    }
}

#[test]
fn names_are_shown_without_what_a_terminal_obeys() {
    let list = ListWriter::after([0; 32]).file("/tmp/\u{1b}[2J\n\"evil\"", &[1; 32]);
    let entries = read(list.bytes()).unwrap();
    assert_eq!(entries[0].shown_name(), "/tmp/\\x1b[2J\\n\\\"evil\\\"");
    let data = sized_fields(&[&digest_ng("sha256", &[1; 32]), b"/usr/bin/a\0b\0"]);
    let mut list = ListWriter::after([0; 32]);
    list.push(10, &[1; 20], "ima-ng", &data, [0; 32]);
    assert!(read(list.bytes()).is_err(), "a NUL within a name");
}
