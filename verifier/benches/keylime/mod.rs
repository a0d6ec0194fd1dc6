//! Keylime's verifier as a peer: the same evidence, appraised by its own functions in a Python process that waits for
//! its turn. `scripts/bench.sh` installs it and says where; without it there are only the ceilings.

use assay_wire::evidence::Evidence;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A running peer. Ends when it is dropped.
pub(crate) struct Keylime {
    process: Child,
    asked: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Keylime {
    /// Starts it upon what `folder` has; none where it is not installed.
    pub(crate) fn start(folder: &Path) -> Option<Self> {
        let python = std::env::var_os("ASSAY_BENCH_KEYLIME")?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/keylime/peer.py");
        let mut process = Command::new(python)
            .arg(script)
            .arg(folder)
            // Its configuration would be looked for in the home folder.
            .env("KEYLIME_DIR", folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let asked = process.stdin.take().unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap());
        Some(Self { process, asked, answers })
    }

    /// How often a second it does `what`: `quote`, `appraise` or `ima`.
    pub(crate) fn rate(&mut self, what: &str) -> f64 {
        writeln!(self.asked, "{what}").unwrap();
        self.asked.flush().unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().parse().unwrap_or_else(|_| panic!("Keylime, asked for {what}, said `{line}`"))
    }
}

impl Drop for Keylime {
    fn drop(&mut self) {
        let _gone_already = self.process.kill();
        let _reaped = self.process.wait();
    }
}

/// Leaves a boot's evidence where the peer reads it.
#[allow(dead_code, reason = "each benchmark has its own evidence")]
pub(crate) fn write_boot(folder: &Path, evidence: &Evidence, ak: &[u8], nonce: &[u8]) {
    let write = |name: &str, content: &[u8]| std::fs::write(folder.join(name), content).unwrap();
    write("ak", ak);
    write("nonce", nonce);
    write("attest", &evidence.attest);
    write("signature", &evidence.signature);
    write("pcrs", evidence.pcrs.join("\n").as_bytes());
    write("log", &evidence.event_log);
}
