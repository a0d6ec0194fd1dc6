//! The nine steps of the boot path as a table that a person enjoys reading, from the events of a run.

use crate::events::Event;
use assay_wire::step::Step;
use comfy_table::{Cell, CellAlignment, Table, presets};
use time::OffsetDateTime;

/// When a node took each step.
#[derive(Debug, Clone, PartialEq)]
pub struct BootSteps {
    node: String,
    powered: Option<OffsetDateTime>,
    answered: Option<OffsetDateTime>,
    taken: Vec<(Step, TakenStep)>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct TakenStep {
    at: OffsetDateTime,
    elapsed_ms: Option<f64>,
}

/// How far a node's boot came, and whether in the right order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All nine, in order.
    Complete,
    /// This one is missing.
    Missing(Step),
    /// This one was taken before the one before it.
    OutOfOrder(Step),
}

impl BootSteps {
    /// Reads the last boot of `node` from `events`: a power-on begins anew. Of a step that is taken several times
    /// (firmware and iPXE each get an offer) the first counts.
    #[must_use]
    pub fn read(node: &str, events: &[Event]) -> Self {
        let mut steps = Self { node: node.to_owned(), powered: None, answered: None, taken: Vec::new() };
        for event in events.iter().filter(|event| event.node() == Some(node)) {
            let Some(at) = event.time() else { continue };
            match event.name() {
                POWERED => {
                    (steps.powered, steps.answered) = (Some(at), None);
                    steps.taken.clear();
                }
                ANSWERED => steps.answered = steps.answered.or(Some(at)),
                name => {
                    let step = Step::ALL.into_iter().find(|step| step.event() == name);
                    if let Some(step) = step.filter(|step| steps.taken.iter().all(|(taken, _)| taken != step)) {
                        let elapsed_ms = event.number("elapsed_ms");
                        steps.taken.push((step, TakenStep { at, elapsed_ms }));
                    }
                }
            }
        }
        steps
    }

    /// How far it came.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let mut last = None;
        for step in Step::ALL {
            let Some(taken) = self.get(step) else { return Progress::Missing(step) };
            if last.is_some_and(|last| taken.at < last) {
                return Progress::OutOfOrder(step);
            }
            last = Some(taken.at);
        }
        Progress::Complete
    }

    /// Milliseconds from `from` to `to`.
    #[must_use]
    pub fn between_ms(&self, from: Step, to: Step) -> Option<f64> {
        Some((self.get(to)?.at - self.get(from)?.at).as_seconds_f64() * 1000.0)
    }

    /// Milliseconds from power-on until the tenant's system answered.
    #[must_use]
    pub fn total_ms(&self) -> Option<f64> {
        Some((self.answered? - self.powered?).as_seconds_f64() * 1000.0)
    }

    /// The table.
    #[must_use]
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_preset(presets::UTF8_BORDERS_ONLY);
        table.set_header(["", "step", "what", "since power-on", "took"]);
        if self.powered.is_some() {
            table.add_row(["", POWERED, "the node is turned on", "0.0 s", ""]);
        }
        for step in Step::ALL {
            let taken = self.get(step);
            table.add_row([
                if taken.is_some() { "✔".to_owned() } else { "·".to_owned() },
                format!("{} {}", step.number(), step.event()),
                meaning(step).to_owned(),
                taken.and_then(|t| self.since_power(t.at)).unwrap_or_default(),
                taken.and_then(|t| t.elapsed_ms).map(milliseconds).unwrap_or_default(),
            ]);
        }
        if let Some(at) = self.answered {
            let since = self.since_power(at).unwrap_or_default();
            table.add_row(["✔", ANSWERED, "the tenant's system answers on its network", &since, ""]);
        }
        for column in [3, 4] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.set_header([
            Cell::new(""),
            Cell::new(format!("node {}", self.node)),
            Cell::new("what"),
            Cell::new("since power-on"),
            Cell::new("took"),
        ]);
        table
    }

    fn get(&self, step: Step) -> Option<TakenStep> {
        self.taken.iter().find(|(taken, _)| *taken == step).map(|(_, taken)| *taken)
    }

    fn since_power(&self, at: OffsetDateTime) -> Option<String> {
        Some(format!("{:.1} s", (at - self.powered?).as_seconds_f64()))
    }
}

/// The lab's event: the node was turned on.
pub const POWERED: &str = "node.powered";
/// The lab's event: the tenant's system answered on the tenant's network.
pub const ANSWERED: &str = "tenant.answered";

fn meaning(step: Step) -> &'static str {
    match step {
        Step::DhcpOffered => "firmware is offered an address",
        Step::BootFileServed => "the network boot loader is fetched",
        Step::IpxeRendered => "iPXE gets this node's script",
        Step::AgentEnrolled => "the agent's keys are in this TPM",
        Step::EvidenceReceived => "quote and event log arrive",
        Step::EvidenceAppraised => "every event is compared with the policy",
        Step::ImageExported => "the golden image is cloned and exported",
        Step::PortMoved => "the switch port joins the tenant's network",
        Step::TenantBooted => "the grant is opened, the tenant's kernel starts",
    }
}

fn milliseconds(ms: f64) -> String {
    if ms < 1000.0 { format!("{ms:.1} ms") } else { format!("{:.2} s", ms / 1000.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, second: usize) -> Event {
        let line = format!(
            "{{\"timestamp\":\"2026-01-01T00:00:{second:02}Z\",\"event\":\"{name}\",\"node\":\"n1\",\"elapsed_ms\":{second}}}"
        );
        Event::parse(&line).unwrap()
    }

    fn whole_boot() -> Vec<Event> {
        let mut events = vec![event(POWERED, 0)];
        events.extend(Step::ALL.into_iter().enumerate().map(|(index, step)| event(step.event(), index + 1)));
        events.push(event(ANSWERED, 20));
        events
    }

    #[test]
    fn a_whole_boot_is_complete_and_timed() {
        let steps = BootSteps::read("n1", &whole_boot());
        assert_eq!(steps.progress(), Progress::Complete);
        assert_eq!(steps.total_ms(), Some(20_000.0));
        assert_eq!(steps.between_ms(Step::EvidenceAppraised, Step::PortMoved), Some(2000.0));
        let table = steps.table().to_string();
        assert!(Step::ALL.into_iter().all(|step| table.contains(step.event())), "{table}");
        assert!(table.contains("20.0 s") && table.contains("4.0 ms"), "{table}");
    }

    #[test]
    fn what_is_missing_or_early_is_named() {
        let mut events = whole_boot();
        events.remove(6);
        assert_eq!(BootSteps::read("n1", &events).progress(), Progress::Missing(Step::EvidenceAppraised));
        let mut events = whole_boot();
        events[8] = event(Step::PortMoved.event(), 3);
        assert_eq!(BootSteps::read("n1", &events).progress(), Progress::OutOfOrder(Step::PortMoved));
        assert_eq!(BootSteps::read("n2", &whole_boot()).progress(), Progress::Missing(Step::DhcpOffered));
    }

    #[test]
    fn a_second_power_on_begins_anew() {
        let mut events = whole_boot();
        events.push(event(POWERED, 30));
        let steps = BootSteps::read("n1", &events);
        assert_eq!((steps.progress(), steps.total_ms()), (Progress::Missing(Step::DhcpOffered), None));
    }
}
