#![no_main]
//! What the agent in the tenant's system reads: the state that the ramdisk handed over, and the verifier's answers.

use assay_ramdisk_agent::attestation::state::AttestationState;
use assay_wire::attestation::{AttestationAnswer, RevocationNotices};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(state) = AttestationState::parse(bytes) {
        let json = state.to_json().expect("a state is JSON");
        assert_eq!(AttestationState::parse(&json).as_ref(), Ok(&state));
        assert!(!format!("{state:?}").contains(state.proof.as_str()) || state.proof.len() < 8);
    }
    let _answer = serde_json::from_slice::<AttestationAnswer>(bytes);
    if let Ok(notices) = serde_json::from_slice::<RevocationNotices>(bytes) {
        // A notice becomes a file of the node's name: it must not leave its folder.
        assert!(notices.notices.iter().all(|notice| !notice.node.as_str().contains(['/', '.'])));
    }
});
