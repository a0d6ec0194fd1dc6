//! Attacks on the runtime measurement list: rows C1 to C8. PCR 10 is computed by the list's writer, a second opinion on
//! replay; in the boot's evidence it is a real TPM's.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod support;

use assay_tpm::testing::{KeyKind, sha256};
use assay_verifier::appraisal::{Appraisal, Expected, appraise};
use assay_verifier::evidence::verify;
use assay_verifier::ima::policy::ImaPolicy;
use assay_verifier::ima::writer::{ListWriter, digest_ng, sized_fields, string};
use assay_verifier::ima::{Advanced, ImaState, advance};
use assay_verifier::learn::learn;
use assay_verifier::policy::Policy;
use assay_verifier::quote::{PCR_COUNT, PcrValue};
use assay_wire::evidence::{ImaList, MAX_IMA_LIST_BYTES};
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::pkey_ctx::PkeyCtx;
use openssl::rsa::Rsa;
use support::{Node, artefacts, boot_log, first_boot, settings};

const LS: [u8; 32] = [0x15; 32];
const CAT: [u8; 32] = [0xca; 32];
const EVIL: [u8; 32] = [0xee; 32];

/// The PCRs of the quote, but for PCR 10.
fn base() -> [[u8; 32]; PCR_COUNT] {
    std::array::from_fn(|pcr| [u8::try_from(pcr).unwrap(); 32])
}

/// PCR 10 of the admitted boot: the agent's kernel's `boot_aggregate`.
fn admitted() -> [u8; 32] {
    ListWriter::after([0; 32]).boot_aggregate(&base()).pcr10()
}

/// The list of the tenant's kernel, which the agent started with `kexec`.
fn tenant() -> ListWriter {
    ListWriter::after(admitted()).boot_aggregate(&base())
}

fn begin() -> ImaState {
    ImaState::admitted(&PcrValue::new(admitted()))
}

fn quoted(pcr10: [u8; 32]) -> [PcrValue; PCR_COUNT] {
    let mut pcrs = base().map(PcrValue::new);
    pcrs[10] = PcrValue::new(pcr10);
    pcrs
}

fn whole(list: &ListWriter) -> ImaList {
    ImaList { first_entry: 0, entries: list.bytes().to_vec() }
}

/// The first evidence of a node with this list.
fn first(list: &ListWriter, policy: Option<&ImaPolicy>) -> Result<Advanced, Vec<String>> {
    advance(&begin(), Some(&whole(list)), &quoted(list.pcr10()), policy)
}

fn state(advanced: Advanced) -> ImaState {
    match advanced {
        Advanced::Explained { state, .. } => state,
        Advanced::Behind { .. } => panic!("the list does not reach the quote"),
    }
}

/// The one reason why `advanced` is refused.
fn reason(advanced: Result<Advanced, Vec<String>>) -> String {
    let reasons = advanced.unwrap_err();
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    reasons.into_iter().next().unwrap()
}

fn policy(text: &str) -> ImaPolicy {
    let policy: ImaPolicy = toml::from_str(text).unwrap();
    assert_eq!(policy.problem(), None, "{text}");
    policy
}

fn sha(digest: [u8; 32]) -> String {
    format!("\"sha256:{}\"", hex::encode(digest))
}

/// `ls` and `cat` may run; logs are not judged.
fn strict() -> ImaPolicy {
    policy(&format!(
        "mode = \"enforce\"\ndigests = [{}]\nexclude = [\"/var/log/*\"]\n[files]\n\"/usr/bin/ls\" = [{}]",
        sha(CAT),
        sha(LS)
    ))
}

#[test]
fn a_good_list_advances_by_what_is_new_and_stops_at_the_quote() {
    let policy = strict();
    let first_quote = tenant().file("/usr/bin/ls", &LS);
    // The kernel went on measuring between the quote and the reading of the list.
    let read = first_quote.clone().file("/usr/bin/cat", &CAT);
    let seen = advance(&begin(), Some(&whole(&read)), &quoted(first_quote.pcr10()), Some(&policy)).map(state).unwrap();
    assert_eq!((seen.entries(), *seen.pcr10().as_bytes()), (2, first_quote.pcr10()));
    let later = read.file("/var/log/messages", &EVIL);
    let new = ImaList { first_entry: 2, entries: later.bytes()[first_quote.bytes().len()..].to_vec() };
    let seen = advance(&seen, Some(&new), &quoted(later.pcr10()), Some(&policy)).map(state).unwrap();
    assert_eq!(seen.entries(), 4);
    let none = ImaList { first_entry: 4, entries: Vec::new() };
    assert_eq!(advance(&seen, Some(&none), &quoted(later.pcr10()), Some(&policy)).map(state), Ok(seen.clone()));
    let text = serde_json::to_string(&seen).unwrap();
    assert_eq!(serde_json::from_str::<ImaState>(&text).unwrap(), seen);
}

#[test]
fn c1_a_violation_is_refused_unless_the_policy_allows_violations() {
    let list = tenant().violation("/usr/bin/ls").file("/usr/bin/ls", &LS);
    assert!(reason(first(&list, Some(&strict()))).contains("violation"));
    let allowing = ImaPolicy { violations: toml::Value::from("allow").try_into().unwrap(), ..strict() };
    assert_eq!(first(&list, Some(&allowing)).map(state).unwrap().violations(), 1);
}

#[test]
fn c1_no_path_excuses_a_violation_because_nothing_vouches_for_its_path() {
    // The kernel extends 0xff octets for any violation, so the same quote fits any path.
    let honest = tenant().violation("/usr/bin/sudo");
    let relabelled = tenant().violation("/var/log/messages");
    assert_eq!(honest.pcr10(), relabelled.pcr10());
    assert!(reason(first(&relabelled, Some(&strict()))).contains("violation"));
}

#[test]
fn c1_an_entry_made_a_violation_does_not_replay() {
    let list = tenant().file("/usr/bin/evil", &EVIL);
    let forged = tenant().violation("/usr/bin/evil");
    let policy = policy("mode = \"enforce\"\nviolations = \"allow\"");
    let advanced = advance(&begin(), Some(&whole(&forged)), &quoted(list.pcr10()), Some(&policy));
    assert!(reason(advanced).contains("does not replay"));
}

#[test]
fn c2_an_entry_for_another_pcr_is_refused() {
    for pcr in [0, 11, 23] {
        let data = sized_fields(&[&digest_ng("sha256", &EVIL), &string("/usr/bin/evil")]);
        let mut list = tenant();
        let sha1 = assay_tpm::algorithm::HashAlgorithm::Sha1.digest(&data);
        list.push(pcr, sha1.as_ref(), "ima-ng", &data, sha256(&data));
        let reason = reason(first(&list, None));
        assert!(reason.contains(&format!("is for PCR {pcr}, not 10")), "{reason}");
    }
}

#[test]
fn c3_a_list_that_is_shorter_than_before_or_another_is_refused() {
    let long = tenant().file("/usr/bin/ls", &LS).file("/usr/bin/cat", &CAT);
    let seen = first(&long, None).map(state).unwrap();
    let pcrs = quoted(long.pcr10());
    // From the start again, with less, with as much, and one too far.
    for first_entry in [0, 2, 4] {
        let list = ImaList { first_entry, entries: Vec::new() };
        assert!(reason(advance(&seen, Some(&list), &pcrs, None)).contains("3 were seen before"), "{first_entry}");
    }
    assert!(reason(advance(&seen, None, &pcrs, None)).contains("no measurement list any more"));
    // An entry left out, swapped with the next, or changed.
    let grown = long.file("/usr/bin/evil", &EVIL).file("/usr/bin/ls", &LS);
    let forgeries = [
        ListWriter::after([0; 32]).file("/usr/bin/ls", &LS),
        ListWriter::after([0; 32]).file("/usr/bin/ls", &LS).file("/usr/bin/evil", &EVIL),
        ListWriter::after([0; 32]).file("/usr/bin/evil", &LS).file("/usr/bin/ls", &LS),
        ListWriter::after([0; 32]),
    ];
    for forged in forgeries {
        let list = ImaList { first_entry: 3, entries: forged.bytes().to_vec() };
        assert!(reason(advance(&seen, Some(&list), &quoted(grown.pcr10()), None)).contains("does not replay"));
    }
}

#[test]
fn c3_entries_that_nobody_vouches_for_yet_renew_nothing() {
    let page = "x".repeat(100_000);
    let mut list = tenant();
    while list.bytes().len() < MAX_IMA_LIST_BYTES - 110_000 {
        list = list.file(&format!("/usr/lib/{page}"), &LS);
    }
    let full = list.clone();
    let list = list.file("/usr/bin/ls", &LS);
    let pcrs = quoted(list.pcr10());
    let Ok(Advanced::Behind { state: behind, .. }) = advance(&begin(), Some(&whole(&full)), &pcrs, None) else {
        panic!("full evidence that ends before its quote is not taken as far as it goes")
    };
    assert_eq!(behind.entries(), full.entries());
    let rest = ImaList { first_entry: full.entries(), entries: list.bytes()[full.bytes().len()..].to_vec() };
    let seen = advance(&behind, Some(&rest), &pcrs, None).map(state).unwrap();
    assert_eq!(seen.entries(), list.entries());
    // Half-empty evidence that ends before its quote is a list that was cut.
    let cut = ImaList { first_entry: 0, entries: tenant().bytes().to_vec() };
    assert!(reason(advance(&begin(), Some(&cut), &pcrs, None)).contains("the last are missing"));
    // And made-up entries never reach a quote.
    let forged = ImaList { first_entry: full.entries(), entries: tenant().bytes().to_vec() };
    assert!(advance(&behind, Some(&forged), &pcrs, None).is_err());
    // Nor is there catching up without end.
    let mut behind = begin();
    let endless = (0..100).find(|_| {
        let entries = ListWriter::after([0; 32]);
        let entries =
            if behind.entries() == 0 { full.clone() } else { (0..9).fold(entries, |list, _| list.file(&page, &LS)) };
        let list = ImaList { first_entry: behind.entries(), entries: entries.bytes().to_vec() };
        match advance(&behind, Some(&list), &pcrs, None) {
            Ok(Advanced::Behind { state, .. }) => behind = state,
            Ok(Advanced::Explained { .. }) => panic!("made-up entries explain a quote"),
            Err(_) => return true,
        }
        false
    });
    assert!(endless.is_some());
}

#[test]
fn c4_a_boot_aggregate_that_is_not_of_pcrs_0_to_9_is_refused() {
    let mut others = base();
    others[4] = [0xbb; 32];
    let list = ListWriter::after(admitted()).boot_aggregate(&others);
    assert!(reason(first(&list, None)).contains("PCRs 0 to 9 of the quote give"));
    let of_sha1 =
        ListWriter::after(admitted()).entry("ima-ng", &[&digest_ng("sha1", &[7; 20]), &string("boot_aggregate")]);
    assert!(reason(first(&of_sha1, None)).contains("of the sha1 bank"));
    // A violation says nothing of its data, so it is no boot_aggregate.
    let violation = ListWriter::after(admitted()).violation("boot_aggregate");
    assert!(reason(first(&violation, None)).contains("instead of a boot_aggregate"));
}

#[test]
fn c5_a_digest_of_another_algorithm_or_length_is_refused() {
    let wrong = [
        digest_ng("sha256", &[1; 20]),
        digest_ng("sha1", &[1; 32]),
        digest_ng("sha256", &[]),
        digest_ng("", &[1; 32]),
        b"sha256".to_vec(),
        [&b"sha256:"[..], &[1; 32]].concat(),
        digest_ng("no-such-algorithm", &[1; 65]),
    ];
    for field in wrong {
        let list = tenant().entry("ima-ng", &[&field, &string("/usr/bin/ls")]);
        assert!(reason(first(&list, None)).contains("d-ng"), "{field:?}");
    }
    // Whole, and of an algorithm that vouches for nothing: replayed, and good for no policy.
    for field in [digest_ng("sha1", &[1; 20]), digest_ng("md5", &[1; 16]), digest_ng("no-such", &LS)] {
        let list = tenant().entry("ima-ng", &[&field, &string("/usr/bin/ls")]);
        assert!(first(&list, None).is_ok());
        assert!(reason(first(&list, Some(&strict()))).contains("vouches for nothing"));
    }
    // The same octets as a digest of something else.
    let verity =
        tenant().entry("ima-ngv2", &[&[b"verity:", &digest_ng("sha256", &LS)[..]].concat(), &string("/usr/bin/ls")]);
    assert!(reason(first(&verity, Some(&strict()))).contains("does not list"));
    // A template digest that is not of the data, which the SHA-256 bank does not cover.
    let mut list = tenant();
    let data = sized_fields(&[&digest_ng("sha256", &LS), &string("/usr/bin/ls")]);
    list.push(10, &[7; 20], "ima-ng", &data, sha256(&data));
    assert!(reason(first(&list, None)).contains("template digest is not that of its data"));
}

#[test]
fn c6_odd_paths_neither_match_nor_reach_a_terminal() {
    for path in [
        "/usr/bin/ls ",
        "/usr/bin/ls\n",
        "\"/usr/bin/ls\"",
        "/usr/bin/ls\u{1b}[0m",
        "/usr/bin/\u{430}ls",
        "usr/bin/ls",
        "//usr/bin/ls",
    ] {
        let reason = reason(first(&tenant().file(path, &LS), Some(&strict())));
        assert!(reason.contains("is not in the policy"), "{reason}");
        assert!(reason.bytes().all(|octet| octet.is_ascii_graphic() || octet == b' ' || octet >= 0x80), "{reason:?}");
    }
    // A NUL would show one path and match another.
    let hidden = tenant().entry("ima-ng", &[&digest_ng("sha256", &EVIL), b"/var/log/a\0/usr/bin/evil\0"]);
    assert!(first(&hidden, Some(&strict())).is_err());
    let unended = tenant().entry("ima-ng", &[&digest_ng("sha256", &LS), b"/usr/bin/ls"]);
    assert!(first(&unended, Some(&strict())).is_err());
    // Not UTF-8.
    let list = tenant().entry("ima-ng", &[&digest_ng("sha256", &LS), b"/usr/bin/\xff\0"]);
    assert!(reason(first(&list, Some(&strict()))).contains("\\xff"));
}

#[test]
fn c7_no_exclusion_may_cover_where_code_lies() {
    for glob in
        ["*", "/*", "/usr/*", "/usr/bin/*", "/lib*", "*.so.6", "/usr/*/systemd", "?usr/bin/env", "/init", "**/m.ko"]
    {
        let policy: ImaPolicy = toml::from_str(&format!("mode = \"enforce\"\nexclude = [\"{glob}\"]")).unwrap();
        assert!(policy.problem().is_some_and(|problem| problem.contains("run")), "{glob}");
    }
    let buffers: ImaPolicy = toml::from_str("mode = \"enforce\"\nexclude_buffers = [\".*\"]").unwrap();
    assert!(buffers.problem().is_some());
}

#[test]
fn c7_an_executable_under_an_excluded_path_is_judged_where_its_mode_shows() {
    let evm = |mode: u16| {
        let digest = digest_ng("sha256", &EVIL);
        let fields: [&[u8]; 9] =
            [&digest, b"/var/log/x\0", b"", b"\0", b"", b"", &[0; 4], &[0; 4], &mode.to_le_bytes()];
        first(&tenant().entry("evm-sig", &fields), Some(&strict()))
    };
    assert!(evm(0o100_644).is_ok());
    for mode in [0o100_755, 0o100_744, 0o100_654, 0o104_645] {
        assert!(reason(evm(mode)).contains("executable under an excluded path"));
    }
    // A name that is no path is nobody's exclusion, and what is refused is refused anywhere.
    assert!(first(&tenant().file("var/log/x", &EVIL), Some(&strict())).is_err());
    let logs = policy("mode = \"enforce\"\nexclude = [\"*.log\"]");
    assert!(first(&tenant().file("/srv/x.log", &EVIL), Some(&logs)).is_ok());
    assert!(reason(first(&tenant().file("x.log", &EVIL), Some(&logs))).contains("is not in the policy"));
    let refusing = policy(&format!("mode = \"enforce\"\nexclude = [\"/var/log/*\"]\nrefuse = [{}]", sha(EVIL)));
    assert!(reason(first(&tenant().file("/var/log/x", &EVIL), Some(&refusing))).contains("which the policy refuses"));
    assert!(first(&tenant().file("/var/log/x", &LS), Some(&refusing)).is_ok());
}

#[test]
fn c7_the_kernels_policy_must_be_loaded_before_anything_else_is_measured() {
    let policy = policy(&format!(
        "mode = \"enforce\"\ndigests = [{}]\n[measured_policy]\npath = \"/etc/ima/ima-policy\"\ndigests = [{}]\nafter = [\"/init\"]",
        sha(LS),
        sha(CAT)
    ));
    let loaded = |list: ListWriter| list.file("/etc/ima/ima-policy", &CAT);
    let good = loaded(tenant().file("/init", &LS)).file("/usr/bin/ls", &LS);
    assert!(first(&good, Some(&policy)).is_ok());
    let late = loaded(tenant().file("/init", &LS).file("/usr/bin/ls", &LS));
    assert!(reason(first(&late, Some(&policy))).contains("was measured before the IMA policy"));
    let never = tenant().file("/init", &LS);
    assert!(reason(first(&never, Some(&policy))).contains("was not loaded"));
    let another = tenant().file("/etc/ima/ima-policy", &EVIL);
    assert!(first(&another, Some(&policy)).unwrap_err().iter().any(|reason| reason.contains("was not loaded")));
    // What was loaded is remembered from one evidence to the next.
    let seen = first(&good, Some(&policy)).map(state).unwrap();
    let more = good.clone().file("/usr/bin/ls", &LS);
    let new = ImaList { first_entry: good.entries(), entries: more.bytes()[good.bytes().len()..].to_vec() };
    assert!(advance(&seen, Some(&new), &quoted(more.pcr10()), Some(&policy)).is_ok());
    // A kernel whose IMA is off, and one that has no list.
    let off = advance(&begin(), Some(&whole(&tenant())), &quoted(admitted()), Some(&strict()));
    assert!(reason(off).contains("holds nothing of the tenant's kernel"));
    assert!(reason(advance(&begin(), None, &quoted(admitted()), Some(&policy))).contains("no measurement list"));
}

#[test]
fn c8_the_list_of_a_kernel_that_was_started_by_kexec_goes_on_from_the_admitted_pcr() {
    // As if PCR 10 had been reset with the list.
    let fresh = ListWriter::after([0; 32]).boot_aggregate(&base()).file("/usr/bin/ls", &LS);
    let honest = tenant().file("/usr/bin/ls", &LS);
    assert_eq!(fresh.bytes(), honest.bytes());
    assert!(first(&honest, None).is_ok());
    // The admitted boot's own list, longer: no kexec, or a kernel that carries the list over.
    assert_eq!(first(&fresh, None).map(state).unwrap().entries(), 2);
    let carried = fresh.boot_aggregate(&base()).file("/usr/bin/cat", &CAT);
    assert!(reason(first(&carried, None)).contains("kexec"), "another kernel, some time after the admission");
    let carried = ListWriter::after([0; 32]).boot_aggregate(&base()).boot_aggregate(&base()).file("/usr/bin/ls", &LS);
    assert_eq!(first(&carried, Some(&strict())).map(state).unwrap().entries(), 3);
    // A PCR 10 that neither the admission nor a reset explains.
    let other = ListWriter::after([9; 32]).boot_aggregate(&base());
    assert!(reason(first(&other, None)).contains("does not replay"));
}

#[test]
fn c8_a_second_kexec_is_not_passed_off_as_the_first() {
    let list = tenant().file("/usr/bin/ls", &LS);
    let seen = first(&list, None).map(state).unwrap();
    // The new kernel's list starts anew.
    let anew = ListWriter::after(list.pcr10()).boot_aggregate(&base());
    assert!(reason(advance(&seen, Some(&whole(&anew)), &quoted(anew.pcr10()), None)).contains("another kernel's"));
    // Its first entry, as the continuation of the old one.
    let spliced = ImaList { first_entry: seen.entries(), entries: anew.bytes().to_vec() };
    assert!(reason(advance(&seen, Some(&spliced), &quoted(anew.pcr10()), None)).contains("kernel was replaced"));
    // Before the first evidence: the tenant's kernel was there and is gone.
    assert!(reason(first(&anew, None)).contains("does not replay"));
    // A list that does not say which kernel it is of.
    let unnamed = ListWriter::after(admitted()).file("/usr/bin/ls", &LS);
    assert!(reason(first(&unnamed, None)).contains("instead of a boot_aggregate"));
}

#[test]
fn a_kernel_that_extends_sha_1_filled_with_zeros_is_named() {
    let list = tenant();
    let mut extended = admitted().to_vec();
    extended.extend(&list.bytes()[4..24]);
    extended.extend([0; 12]);
    let advanced = advance(&begin(), Some(&whole(&list)), &quoted(sha256(&extended)), None);
    assert!(reason(advanced).contains("before Linux 5.8"));
}

#[test]
fn a_policy_that_warns_lets_the_node_go_on_and_says_what_deviates() {
    let warning = ImaPolicy { mode: toml::Value::from("warn").try_into().unwrap(), ..strict() };
    let list = (0..40).fold(tenant(), |list, number| list.file(&format!("/usr/bin/evil{number}"), &EVIL));
    let Ok(Advanced::Explained { warnings, .. }) = first(&list, Some(&warning)) else { panic!("not refused") };
    assert_eq!(warnings.len(), 17);
    assert!(warnings[0].contains("/usr/bin/evil0") && warnings[16].contains("and 24 more"));
    // What no list may do is no matter of policy.
    assert!(advance(&begin(), Some(&whole(&list)), &quoted([1; 32]), Some(&warning)).is_err());
}

#[test]
fn keys_that_come_into_a_keyring_are_judged_by_their_digest() {
    let key = b"a certificate";
    let policy = policy(&format!(
        "mode = \"enforce\"\nexclude_buffers = [\"dm_*\"]\n[buffers]\n\".ima\" = [{}]",
        sha(sha256(key))
    ));
    assert!(first(&tenant().buffer(".ima", key).buffer("dm_table_load", b"x"), Some(&policy)).is_ok());
    assert!(reason(first(&tenant().buffer(".ima", b"another"), Some(&policy))).contains("does not list"));
    assert!(reason(first(&tenant().buffer(".builtin_trusted_keys", key), Some(&policy))).contains("not in the policy"));
    let forged = tenant().entry("ima-buf", &[&digest_ng("sha256", &sha256(key)), &string(".ima"), b"another"]);
    assert!(reason(first(&forged, Some(&policy))).contains("not what its digest is of"));
}

/// `security.ima` of a file with `digest`.
fn sign(key: &PKey<Private>, kind: [u8; 2], digest: &[u8]) -> Vec<u8> {
    let mut context = PkeyCtx::new(key).unwrap();
    context.sign_init().unwrap();
    context.set_signature_md(openssl::md::Md::sha256()).unwrap();
    let mut signature = Vec::new();
    context.sign_to_vec(digest, &mut signature).unwrap();
    let size = u16::try_from(signature.len()).unwrap().to_be_bytes();
    [&kind[..], &[4], &key_id(key), &size, &signature].concat()
}

/// The last four octets of SHA-1 of the key: its bit string is what follows the last header of its DER.
fn key_id(key: &PKey<Private>) -> [u8; 4] {
    let bits = match key.rsa() {
        Ok(rsa) => rsa.public_key_to_der_pkcs1().unwrap(),
        Err(_) => {
            let der = key.public_key_to_der().unwrap();
            der[der.len() - 65..].to_vec()
        }
    };
    *openssl::sha::sha1(&bits).last_chunk().unwrap()
}

fn keys() -> [PKey<Private>; 2] {
    let group = openssl::ec::EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    let ec = openssl::ec::EcKey::generate(&group).unwrap();
    [PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap(), PKey::from_ec_key(ec).unwrap()]
}

fn trusting(key: &PKey<Private>) -> ImaPolicy {
    let pem = String::from_utf8(key.public_key_to_pem().unwrap()).unwrap();
    policy(&format!("mode = \"enforce\"\n[[keys]]\nname = \"distribution\"\npaths = [\"/usr/*\"]\npem = '''{pem}'''"))
}

#[test]
fn a_file_that_a_trusted_key_signed_is_good_where_the_key_may_sign() {
    for key in keys() {
        let policy = trusting(&key);
        let signed = |path: &str, digest: &[u8; 32], signature: &[u8]| {
            first(&tenant().signed_file(path, digest, signature), Some(&policy))
        };
        let signature = sign(&key, [3, 2], &LS);
        assert!(signed("/usr/bin/ls", &LS, &signature).is_ok(), "{:?}", signed("/usr/bin/ls", &LS, &signature));
        assert!(reason(signed("/usr/bin/ls", &EVIL, &signature)).contains("not one of the key that it names"));
        assert!(reason(signed("/opt/ls", &LS, &signature)).contains("may not sign files there"));
        assert!(reason(signed("/usr/bin/ls", &LS, &[])).contains("is not in the policy"));
        let [_, other] = keys();
        assert!(reason(signed("/usr/bin/ls", &LS, &sign(&other, [3, 2], &LS))).contains("is signed by the key"));
        let mut longer = signature.clone();
        longer.push(0);
        assert!(reason(signed("/usr/bin/ls", &LS, &longer)).contains("cannot be read"));
        let mut other_hash = signature.clone();
        other_hash[2] = 2;
        assert!(reason(signed("/usr/bin/ls", &LS, &other_hash)).contains("counts for nothing"));
        other_hash[2] = 6;
        assert!(reason(signed("/usr/bin/ls", &LS, &other_hash)).contains("its signature is over sha512"));
        // Version 3, over fs-verity's digest and what it is.
        let verity = |kind: &[u8]| {
            let digest = [kind, &digest_ng("sha256", &LS)].concat();
            let signature = sign(&key, [6, 3], &sha256(&[&[6, 4][..], &LS].concat()));
            first(&tenant().entry("ima-sigv2", &[&digest, &string("/usr/bin/ls"), &signature]), Some(&policy))
        };
        assert!(verity(b"verity:").is_ok());
        assert!(reason(verity(b"ima:")).contains("of another kind"));
    }
    let weak = PKey::from_rsa(Rsa::generate(1024).unwrap()).unwrap();
    let pem = String::from_utf8(weak.public_key_to_pem().unwrap()).unwrap();
    let weak: ImaPolicy =
        toml::from_str(&format!("mode = \"enforce\"\n[[keys]]\nname = \"weak\"\npem = '''{pem}'''")).unwrap();
    assert!(weak.problem().unwrap().contains("key `weak` is not RSA of at least 2048 bits"));
}

/// What becomes of a node whose agent's kernel measured `files` with a real TPM, and sends its list.
fn boot_with(
    files: impl Fn(ListWriter) -> ListWriter,
    section: &str,
    change: impl Fn(&mut ImaList),
) -> Result<Vec<String>, Vec<String>> {
    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    let list = files(ListWriter::after([0; 32]).boot_aggregate(&node.tpm.pcrs()[..15]));
    let quiet = node.evidence();
    let learnt = learn("p", "node n1", &verify(&quiet, &node.challenge()).unwrap(), &artefacts()).unwrap();
    let policy = Policy::from_toml(&format!("{}\n{section}", learnt.to_toml())).unwrap();
    for digest in list.extended() {
        node.tpm.extend(10, digest);
    }
    let mut evidence = node.evidence();
    let mut sent = whole(&list);
    change(&mut sent);
    evidence.ima = Some(sent);
    let replayed = verify(&evidence, &node.challenge()).map_err(|error| error.reasons())?;
    match appraise(&policy, &replayed, &Expected { settings: &settings(), boot: &first_boot() }, 0) {
        Appraisal::Accepted(accepted) => Ok(accepted.warnings().to_vec()),
        Appraisal::Refused(refusal) => Err(refusal.reasons().to_vec()),
    }
}

#[test]
fn c8_at_boot_the_agents_kernel_measures_its_boot_aggregate_and_what_the_policy_allows() {
    let ls = |list: ListWriter| list.file("/usr/bin/ls", &LS);
    let section = format!("[ima]\nmode = \"enforce\"\ndigests = [{}]", sha(LS));
    assert_eq!(boot_with(|list| list, "", |_| {}), Ok(Vec::new()));
    assert_eq!(boot_with(ls, &section, |_| {}), Ok(Vec::new()));
    let unjudged = boot_with(ls, "", |_| {}).unwrap_err();
    assert!(unjudged[0].contains("the policy has no section [ima]"), "{unjudged:?}");
    let evil = boot_with(|list| list.file("/usr/bin/evil", &EVIL), &section, |_| {}).unwrap_err();
    assert!(evil[0].contains("/usr/bin/evil"), "{evil:?}");
    let cut = boot_with(ls, &section, |list| list.entries.truncate(10)).unwrap_err();
    assert!(cut[0].contains("entry 0"), "{cut:?}");
    let none = boot_with(ls, &section, |list| list.entries.clear()).unwrap_err();
    assert!(none[0].contains("does not replay"), "{none:?}");
    let later = boot_with(ls, &section, |list| list.first_entry = 1).unwrap_err();
    assert!(later[0].contains("begins at entry 1"), "{later:?}");
}
