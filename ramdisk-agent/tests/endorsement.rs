//! Which EK an agent presents, with what certificates, and that it can use each: on real TPMs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

use assay_ramdisk_agent::tpm::Tpm as _;
use assay_ramdisk_agent::tpm::esapi::EsapiTpm;
use assay_tpm::credential::make_credential;
use assay_tpm::public::{Curve, KeyPublic, Public};
use assay_tpm::testing::NetworkTpm;
use std::process::Command;

const SECRET: [u8; 32] = [0x5a; 32];

/// Makes the agent's keys, and shows that a credential for them opens.
fn present(tpm: &NetworkTpm) -> (KeyPublic, Vec<u8>, Vec<u8>) {
    let mut agent = EsapiTpm::open(&tpm.tcti()).unwrap();
    let keys = agent.create_keys().unwrap();
    let ak = Public::parse(&keys.ak_public).unwrap();
    let credential = make_credential(&keys.ek_public, ak.name().as_bytes(), &SECRET).unwrap();
    assert_eq!(agent.activate_credential(&credential).unwrap().as_slice(), SECRET);
    // After a kexec it is the same EK that the saved AK is loaded under.
    let saved = agent.saved_ak().unwrap();
    drop(agent);
    let mut later = EsapiTpm::open(&tpm.tcti()).unwrap();
    later.load_ak(saved).unwrap();
    assert_eq!(later.activate_credential(&credential).unwrap().as_slice(), SECRET);
    (Public::parse(&keys.ek_public).unwrap().key().clone(), keys.ek_certificate, keys.ek_chain)
}

fn tool(tpm: &NetworkTpm, name: &str, arguments: &[&str]) {
    let output = Command::new(name).args(arguments).env("TPM2TOOLS_TCTI", tpm.tcti()).output().unwrap();
    assert!(output.status.success(), "{name} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_first_ek_with_a_certificate_is_presented_and_the_chain_with_it() {
    let tpm = NetworkTpm::start();
    let (key, certificate, chain) = present(&tpm);
    assert!(matches!(key, KeyPublic::Rsa { .. }));
    assert_eq!(certificate[..2], [0x30, 0x82]);
    assert!(chain.is_empty(), "this TPM keeps no chain");

    // A chain over two indices, not written in their order, and one that is no part of it.
    let folder = tempfile::tempdir().unwrap();
    for (index, content) in [("0x1c00101", b"second".as_slice()), ("0x1c00100", b"first "), ("0x1c00200", b"else")] {
        let file = folder.path().join("content");
        std::fs::write(&file, content).unwrap();
        let attributes = "ownerread|ownerwrite|authread|authwrite";
        tool(&tpm, "tpm2_nvdefine", &["-C", "o", "-s", &content.len().to_string(), "-a", attributes, index]);
        tool(&tpm, "tpm2_nvwrite", &["-C", "o", "-i", &file.display().to_string(), index]);
    }
    assert_eq!(present(&tpm).2, b"first second");

    // Without an RSA certificate it is the P-384 EK, which is used without a policy.
    tool(&tpm, "tpm2_nvundefine", &["-C", "p", "0x1c00002"]);
    let (key, certificate, _) = present(&tpm);
    assert!(matches!(key, KeyPublic::Ecc { curve: Curve::P384, .. }));
    assert!(!certificate.is_empty());

    // Without any it is the RSA one again, and nothing to show for it.
    tool(&tpm, "tpm2_nvundefine", &["-C", "p", "0x1c00016"]);
    let (key, certificate, _) = present(&tpm);
    assert!(matches!(key, KeyPublic::Rsa { .. }));
    assert!(certificate.is_empty());
}
