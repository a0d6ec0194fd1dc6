#![no_main]
//! What the agent in the tenant's system reads: the state that the ramdisk handed over, and the verifier's answers.

use assay_ramdisk_agent::attestation::state::AttestationState;
use assay_wire::agreement::MAX_SUPPORTING;
use assay_wire::attestation::{AttestationAnswer, RevocationNotices, SealedSecret};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(state) = AttestationState::parse(bytes) {
        let json = state.to_json().expect("a state is JSON");
        assert_eq!(AttestationState::parse(&json).as_ref(), Ok(&state));
        let proofs = state.co_verifiers.iter().map(|other| &other.proof).chain([&state.proof]);
        let shown = format!("{state:?}");
        assert!(proofs.into_iter().all(|proof| !shown.contains(proof.as_str()) || proof.len() < 8));
        assert!(state.co_verifiers.len() <= MAX_SUPPORTING);
    }
    let _answer = serde_json::from_slice::<AttestationAnswer>(bytes);
    let _share = serde_json::from_slice::<SealedSecret>(bytes);
    if let Ok(notices) = serde_json::from_slice::<RevocationNotices>(bytes) {
        // A notice becomes a file of the node's name: it must not leave its folder.
        assert!(notices.notices.iter().all(|notice| !notice.node.as_str().contains(['/', '.'])));
    }
});
