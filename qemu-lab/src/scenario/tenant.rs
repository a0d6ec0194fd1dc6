//! What goes on in the tenant's system after the hand-over, on real firmware.

use super::bench::{Bench, STATE_LIMIT};
use super::boot::{expect_port, first_node_address, nothing_is_left, page};
use crate::error::{LabError, Result};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

/// The node goes on attesting from its tenant's system.
pub(super) async fn goes_on_attesting(bench: &Bench, node: &str) -> Result<()> {
    match bench.services.wait_for_renewals(node, RENEWALS, RENEWAL_LIMIT).await {
        Ok(attestation) => {
            let entries = attestation.get("ima_entries").and_then(Value::as_u64);
            let memory = peak_memory_kib(&act(bench, node, "agent").await?);
            bench.events.lab(
                "node.renewed",
                &json!({ "node": node, "renewals": RENEWALS, "ima_entries": entries, "memory_kib": memory }),
            );
            bench.tell(&format!(
                "  {node} goes on attesting from its tenant's system ({} IMA entries seen, the agent has {} KiB)",
                entries.unwrap_or_default(),
                memory.unwrap_or_default()
            ));
            Ok(())
        }
        Err(error) => {
            // The agent's own words, if the lab can still have them.
            let words = act(bench, node, "agent").await.unwrap_or_else(|_| "nothing".to_owned());
            Err(LabError::unexpected(error.to_string(), format!("the agent says: {words}")))
        }
    }
}

/// What the agent in the tenant's system says that it used at most: `(I used 9000 KiB at most)`.
fn peak_memory_kib(words: &str) -> Option<u64> {
    words.split("(I used ").nth(1)?.split(' ').next()?.parse().ok()
}

/// A program runs in the tenant's system that the policy does not know: the next evidence costs the node its network.
/// Before, the policy is taught everything that was measured there so far.
pub(super) async fn something_unknown_runs(bench: &Bench, node: &str) -> Result<()> {
    let network = bench.network()?;
    let peer = &bench.site.project(network.project.as_str())?.peer;
    let measured = act(bench, node, "measurements").await?;
    let entries = measured.lines().count();
    bench.events.lab("tenant.measured", &json!({ "node": node, "entries": entries }));
    bench.tell(&format!(
        "approving a policy that knows the {entries} programs and modules that {node}'s tenant started"
    ));
    approve_measured(bench, &measured).await?;
    let attestation = bench.services.attestation(node).await?;
    let before = attestation.get("pushes").and_then(Value::as_u64).unwrap_or_default();
    bench.services.wait_for_renewals(node, before + 2, RENEWAL_LIMIT).await?;
    bench.tell(&format!("  {node} is renewed under it; now it starts a program that the policy does not know"));
    let answer = act(bench, node, "run").await?;
    if !answer.contains("ran an unknown program") {
        return Err(LabError::unexpected(format!("starting a program in {node}"), answer));
    }
    let status = bench.services.wait_for_state(node, "rejected", STATE_LIMIT).await?;
    expect_port(&status, "quarantine")?;
    nothing_is_left(bench, node, peer).await?;
    let attestation = bench.services.attestation(node).await?;
    let reasons = attestation.get("reasons").cloned().unwrap_or_default();
    bench.events.lab("node.revoked", &json!({ "node": node, "reasons": reasons, "status": status }));
    bench.tell(&format!("  {node} is cut off: {reasons}"));
    Ok(())
}

/// Approves the policy of this firmware with a section `[ima]` that knows what is in a list (`ascii_runtime_measurements`).
async fn approve_measured(bench: &Bench, list: &str) -> Result<()> {
    let policy = bench.policy_file().await?;
    let text = fs::read_to_string(&policy).map_err(LabError::io(format!("reading {}", policy.display())))?;
    let digests: BTreeSet<&str> = list.lines().filter_map(file_digest).collect();
    let section = json!({ "ima": { "mode": "enforce", "digests": digests } });
    let section = toml::to_string(&section).map_err(LabError::service("writing the section [ima]"))?;
    let file = bench.site.folder.join("policy-with-ima.toml");
    fs::write(&file, format!("{text}\n{section}")).map_err(LabError::io(format!("writing {}", file.display())))?;
    bench.services.client(&["policy", "approve", &file.display().to_string()]).await.map(drop)
}

/// The digest of a file in a line like `10 <template digest> ima-ng sha256:<digest> /usr/bin/true`.
fn file_digest(line: &str) -> Option<&str> {
    let mut words = line.split(' ');
    let (_pcr, _template_digest, _template) = (words.next()?, words.next()?, words.next()?);
    let digest = words.next().filter(|digest| digest.starts_with("sha256:"))?;
    words.next().filter(|path| *path != "boot_aggregate").map(|_| digest)
}

/// Has the lab's hand inside the tenant's system do something.
async fn act(bench: &Bench, node: &str, what: &str) -> Result<String> {
    let network = bench.network()?;
    let peer = &bench.site.project(network.project.as_str())?.peer;
    let answer = page(peer, first_node_address(bench)?, &format!("cgi-bin/act?{what}")).await;
    answer
        .ok_or_else(|| LabError::unexpected(format!("asking {node} to {what}"), "its tenant's system does not answer"))
}

const RENEWALS: u64 = 2;
/// For the tenant's system to come up and its agent to send evidence, under emulation, on a busy machine.
const RENEWAL_LIMIT: Duration = Duration::from_secs(180);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_of_files() {
        assert_eq!(file_digest("10 aa ima-ng sha256:bb /usr/bin/true"), Some("sha256:bb"));
        assert_eq!(file_digest("10 aa ima-ng sha256:bb boot_aggregate"), None);
        assert_eq!(file_digest("10 aa ima sha1"), None);
    }

    #[test]
    fn the_agent_says_what_it_used() {
        assert_eq!(peak_memory_kib("next in 4000 ms (I used 9216 KiB at most)"), Some(9216));
        assert_eq!(peak_memory_kib("nothing"), None);
    }
}
