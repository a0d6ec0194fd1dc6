#![no_main]
//! JSON that agents, netboot and the verifier exchange, and what a tenant gives the verifier for its node.

use assay_wire::agent::{ActivateRequest, AgentSettings, EnrolRequest, SealedGrant, Verdict};
use assay_wire::agreement::may_be_result;
use assay_wire::attestation::SecretRequest;
use assay_wire::evidence::{Evidence, RuntimeEvidence};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _settings = serde_json::from_slice::<AgentSettings>(bytes);
    let _enrol = serde_json::from_slice::<EnrolRequest>(bytes);
    let _activate = serde_json::from_slice::<ActivateRequest>(bytes);
    let _evidence = serde_json::from_slice::<Evidence>(bytes);
    let _at_run_time = serde_json::from_slice::<RuntimeEvidence>(bytes);
    let _verdict = serde_json::from_slice::<Verdict>(bytes);
    // What is passed on unread goes into JSON as it is.
    if let Ok(text) = std::str::from_utf8(bytes)
        && may_be_result(text)
    {
        assert_eq!(serde_json::to_string(text).expect("a text is JSON").len(), text.len() + 2);
    }
    let _secret = serde_json::from_slice::<SecretRequest>(bytes);
    let _grant = serde_json::from_slice::<SealedGrant>(bytes);
});
