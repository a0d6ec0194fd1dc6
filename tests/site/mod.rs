//! A site of the real binary, `assay up`, and the client that speaks to it.

#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses its part, and fails loudly")]

use serde_json::Value;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

/// Longer than any start or stop; a service that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn assay(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_assay")).args(arguments).env_remove("ASSAY_SITE").output().unwrap()
}

/// Asserts failure with exit status 1 and one line that names all of `words`.
pub(crate) fn refused(arguments: &[&str], words: &[&str]) {
    let output = assay(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{arguments:?} did not say `{word}`: {said}");
    }
}

/// Ports that were free a moment ago: a site's file names its ports.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners: [TcpListener; N] = std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

pub(crate) struct Site {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) up: Child,
    log: Receiver<String>,
}

/// The lines of `stdout`, read by a thread of their own so that waiting for one has a deadline.
fn lines(stdout: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

impl Site {
    /// Starts `assay up` and waits until all its services have said that they are ready.
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [isolation, imaging, verifier, agent] = free_ports();
        let file = folder.path().join("site.toml");
        let state = folder.path().join("state");
        let text = format!(
            "[site]\nstate_dir = {state:?}\n[isolation]\nlisten = \"127.0.0.1:{isolation}\"\nquarantine_vlan = 998\n\
             airlock_vlan = 999\n[imaging]\nlisten = \"127.0.0.1:{imaging}\"\nimport_folders = [{:?}]\n[verifier]\nlisten = \"127.0.0.1:{verifier}\"\n\
             agent_listen = \"127.0.0.1:{agent}\"\n",
            folder.path()
        );
        fs::write(&file, text).unwrap();
        let mut up = Command::new(env!("CARGO_BIN_EXE_assay"))
            .args(["up", "--config"])
            .arg(&file)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let log = lines(up.stdout.take().unwrap());
        let mut site = Self { folder, up, log };
        let mut waited_for = vec!["isolation.ready", "imaging.ready", "verifier.ready"];
        while !waited_for.is_empty() {
            let line = site.next_event().expect("`assay up` ended before it was ready");
            waited_for.retain(|event| line.get("event").and_then(Value::as_str) != Some(event));
        }
        site
    }

    /// The next line of the log; none once the process has ended.
    pub(crate) fn next_event(&mut self) -> Option<Value> {
        match self.log.recv_timeout(LIMIT) {
            Ok(line) => Some(serde_json::from_str(&line).unwrap()),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("`assay up` has said nothing for {LIMIT:?}"),
        }
    }

    pub(crate) fn state(&self) -> String {
        self.folder.path().join("state").display().to_string()
    }

    pub(crate) fn client(&self, arguments: &[&str]) -> String {
        let output = assay(&[arguments, &["--site", &self.state()]].concat());
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.client(&[arguments, &["--output", "json"]].concat())).unwrap()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _already_dead = self.up.kill();
        let _reaped = self.up.wait();
    }
}
