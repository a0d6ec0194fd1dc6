//! The agent's own PCR: its settings, as this verifier would have said them.

use super::findings::subject;
use crate::event_log::data::shown;
use crate::evidence::ReplayedEvidence;
use assay_wire::agent::AgentSettings;
use assay_wire::evidence::{AGENT_PCR, MeasurementKind};

/// The agent's PCR: its settings, once, as this verifier would have said them, and nothing else.
pub(super) fn settings_problems(evidence: &ReplayedEvidence<'_>, expected: &AgentSettings) -> Vec<String> {
    let mut problems: Vec<_> = evidence
        .log()
        .events_of(AGENT_PCR)
        .map(|event| format!("{} is not expected: this PCR is the agent's", subject(event, AGENT_PCR)))
        .collect();
    match evidence.measurements() {
        [measurement] => match measurement.kind {
            MeasurementKind::AgentSettings => problems.extend(settings_difference(&measurement.data, expected)),
        },
        others => {
            problems.push(format!("PCR {AGENT_PCR}: the agent measured {} documents instead of one", others.len()));
        }
    }
    problems
}

fn settings_difference(measured: &[u8], expected: &AgentSettings) -> Vec<String> {
    let Ok(settings) = serde_json::from_slice::<AgentSettings>(measured) else {
        return vec![format!("PCR {AGENT_PCR}: what the agent measured as its settings are none")];
    };
    let fields = [
        ("node", settings.node.as_str(), expected.node.as_str()),
        ("verifier", &settings.verifier, &expected.verifier),
        ("verifier_key_sha256", &settings.verifier_key_sha256, &expected.verifier_key_sha256),
    ];
    let differs = fields.into_iter().filter(|(_, measured, expected)| measured != expected);
    differs
        .map(|(field, measured, expected)| {
            format!("PCR {AGENT_PCR}: the agent was told {field} `{}`, not `{expected}`", shown(measured))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    type Spoil = fn(&mut AgentSettings);

    #[test]
    fn a11_a_machine_that_was_told_another_name_verifier_or_key_says_which() {
        let told = AgentSettings {
            node: "n1".parse().unwrap(),
            verifier: "https://10.99.0.1:8443".into(),
            verifier_key_sha256: "ab".repeat(32),
        };
        let differences = |spoil: Spoil| {
            let mut measured = told.clone();
            spoil(&mut measured);
            settings_difference(&serde_json::to_vec(&measured).unwrap(), &told)
        };
        assert!(differences(|_| {}).is_empty());
        let spoilers: [(&str, Spoil); 3] = [
            ("node `n2`", |it| it.node = "n2".parse().unwrap()),
            ("verifier `https://10.66.6.6:8443`", |it| it.verifier = "https://10.66.6.6:8443".into()),
            ("verifier_key_sha256 `cdcd", |it| it.verifier_key_sha256 = "cd".repeat(32)),
        ];
        for (wrong, spoil) in spoilers {
            let said = differences(spoil);
            assert!(said.len() == 1 && said[0].contains(wrong), "{wrong}: {said:?}");
        }
        assert_eq!(settings_difference(b"no JSON", &told).len(), 1);
    }
}
