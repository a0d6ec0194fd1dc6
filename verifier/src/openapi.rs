//! The OpenAPI document of both APIs, from the code.

use crate::server::{agent, attest, attestations, enrol, events, identities, operator, policies, secrets, verdicts};
use utoipa::OpenApi;

/// The document.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Assay verifier",
        description = "Evidence in, signed attestation result out; and the release that follows."
    ),
    paths(
        enrol::enrol,
        enrol::activate,
        agent::evidence,
        agent::release,
        agent::ready,
        agent::grant,
        agent::handover,
        attest::challenge,
        attest::push,
        attest::notices,
        secrets::secret,
        secrets::put_secret,
        secrets::delete_secret,
        events::events,
        events::event_stream,
        attestations::attestations,
        attestations::attestations_of,
        operator::key,
        policies::policies,
        policies::policy,
        policies::activate_policy,
        policies::approve_again,
        policies::try_policy,
        policies::learn_policy,
        verdicts::verdicts,
        verdicts::verdict,
        verdicts::explanation,
        verdicts::case,
        verdicts::archived,
        operator::releases,
        identities::identities,
        identities::identity,
        identities::allow_identity,
        identities::approve_identity,
        identities::forget_identity,
        identities::incidents,
        identities::settle_incident,
    )
)]
struct Document;

#[cfg(test)]
mod tests {
    #[test]
    fn every_route_of_the_agent_protocol_is_documented() {
        let document = super::openapi().to_json().unwrap();
        for path in ["enrol", "activate", "evidence", "release", "ready", "grant", "handover"] {
            assert!(document.contains(path), "{path} is missing");
        }
    }
}
