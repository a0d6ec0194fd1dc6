#![no_main]
//! JSON that agents and netboot exchange.

use assay_wire::agent::{ActivateRequest, AgentSettings, EnrolRequest, SealedGrant};
use assay_wire::evidence::Evidence;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _settings = serde_json::from_slice::<AgentSettings>(bytes);
    let _enrol = serde_json::from_slice::<EnrolRequest>(bytes);
    let _activate = serde_json::from_slice::<ActivateRequest>(bytes);
    let _evidence = serde_json::from_slice::<Evidence>(bytes);
    let _grant = serde_json::from_slice::<SealedGrant>(bytes);
});
