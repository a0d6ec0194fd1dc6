//! Plays scenarios by the `qemu-lab` program, which enters namespaces of its own, and reads what they left.

use assay_qemu_lab::events::{self, Event};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// What a scenario left.
pub(crate) struct Played {
    pub(crate) events: Vec<Event>,
    pub(crate) output: String,
}

impl Played {
    /// The first event of that name.
    pub(crate) fn event(&self, name: &str) -> &Event {
        let found = self.events.iter().find(|event| event.name() == name);
        found.unwrap_or_else(|| panic!("no event `{name}` in this run:\n{}", self.output))
    }
}

/// Plays `scenario` to its end; panics with its output if it does not end well. One at a time: each fills the machine.
pub(crate) fn play(scenario: &str) -> Played {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = root.join("target/lab-tests").join(scenario);
    let done = Command::new(env!("CARGO_BIN_EXE_qemu-lab"))
        .args(["scenario", scenario, "--folder"])
        .arg(&folder)
        .current_dir(&root)
        .output()
        .expect("qemu-lab starts");
    let output = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "scenario {scenario} failed; its files are in {}:\n{output}", folder.display());
    Played { events: events::read(&folder.join("events.jsonl")).expect("events were written"), output }
}
