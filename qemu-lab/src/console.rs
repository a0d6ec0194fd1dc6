//! A node's serial console: captured to a file with times, kept in memory for those who wait for a line.

use crate::error::{LabError, Result};
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::sync::watch;
use tokio::time::Instant;

/// The captured console of one node, over all its power cycles.
#[derive(Debug, Clone)]
pub struct Console {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    node: String,
    lines: Mutex<Vec<String>>,
    changed: watch::Sender<usize>,
    file: Mutex<File>,
    started: Instant,
}

impl Console {
    /// Captures to `path`, appending.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn create(node: &str, path: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(path)
            .map_err(LabError::io(format!("opening {}", path.display())))?;
        let inner = Inner {
            node: node.to_owned(),
            lines: Mutex::default(),
            changed: watch::Sender::new(0),
            file: Mutex::new(file),
            started: Instant::now(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Captures `stream` until it ends.
    pub async fn capture(self, mut stream: impl AsyncRead + Unpin) {
        let mut splitter = LineSplitter::default();
        let mut buffer = [0_u8; 4096];
        loop {
            match tokio::time::timeout(IDLE, stream.read(&mut buffer)).await {
                Ok(Ok(count @ 1..)) => splitter.feed(&buffer[..count]).iter().for_each(|line| self.push(line)),
                Ok(Ok(_) | Err(_)) => break,
                // A prompt, or firmware that says what it tries before it ends the line with how that went.
                Err(_idle) => splitter.finish().iter().for_each(|line| self.push(line)),
            }
        }
        if let Some(line) = splitter.finish() {
            self.push(&line);
        }
    }

    /// How many lines there are so far: a place to wait from.
    #[must_use]
    pub fn position(&self) -> usize {
        self.inner.lines.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The lines from `position` on.
    #[must_use]
    pub fn lines_from(&self, position: usize) -> Vec<String> {
        let lines = self.inner.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.get(position..).unwrap_or_default().to_vec()
    }

    /// Waits for a line that contains `wanted`, at or after `position`; answers the line.
    ///
    /// # Errors
    /// None comes within `limit`; the error shows the last line that did.
    pub async fn wait_for(&self, wanted: &str, position: usize, limit: Duration) -> Result<String> {
        let mut changed = self.inner.changed.subscribe();
        let search = async {
            let mut from = position;
            loop {
                let lines = self.lines_from(from);
                from += lines.len();
                if let Some(line) = lines.into_iter().find(|line| line.contains(wanted)) {
                    return line;
                }
                // The sender lives in `inner`, which we hold: this cannot fail.
                let _sender_is_ours = changed.changed().await;
            }
        };
        tokio::time::timeout(limit, search).await.map_err(|_| LabError::Timeout {
            doing: format!("waiting for `{wanted}` on the console of {}", self.inner.node),
            waited: limit,
            hint: format!("its last line is `{}`", self.lines_from(0).last().map_or("", String::as_str)),
        })
    }

    fn push(&self, line: &str) {
        let seconds = self.inner.started.elapsed().as_secs_f64();
        {
            let mut file = self.inner.file.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = writeln!(file, "[{seconds:9.3}] {line}") {
                tracing::warn!(event = "console.lost", node = self.inner.node, %error, "cannot write the console's file");
            }
        }
        let mut lines = self.inner.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() < MAX_LINES {
            lines.push(line.to_owned());
        }
        self.inner.changed.send_replace(lines.len());
    }
}

/// Cuts a console's octets into lines of plain text: terminal control sequences go, long lines are cut.
#[derive(Debug, Default)]
pub struct LineSplitter {
    line: Vec<u8>,
    escape: Escape,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    Started,
    Sequence,
}

impl LineSplitter {
    /// Takes octets, answers the lines that they complete.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in bytes {
            match (self.escape, byte) {
                (Escape::None, 0x1b) => self.escape = Escape::Started,
                (Escape::None, b'\n') => lines.extend(self.finish()),
                (Escape::None, b'\t' | 0x20..=0x7e | 0x80..=0xff) if self.line.len() < MAX_LINE_BYTES => {
                    self.line.push(byte);
                }
                (Escape::None, _) => {}
                (Escape::Started, b'[') => self.escape = Escape::Sequence,
                (Escape::Started, _) => self.escape = Escape::None,
                (Escape::Sequence, b'@'..=b'~') => {
                    // Cursor positioning is how firmware starts a line.
                    if byte == b'H' {
                        lines.extend(self.finish());
                    }
                    self.escape = Escape::None;
                }
                (Escape::Sequence, _) => {}
            }
        }
        lines
    }

    /// The line begun, if there is anything in it.
    pub fn finish(&mut self) -> Option<String> {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).trim_end().to_owned();
        (!line.is_empty()).then_some(line)
    }
}

/// A line that has not grown for so long is shown as it is.
const IDLE: Duration = Duration::from_millis(500);
const MAX_LINE_BYTES: usize = 1024;
/// A console says a few thousand lines in the longest scenario; a node that floods fills its file, not our memory.
const MAX_LINES: usize = 100_000;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn control_sequences_go_and_lines_stay() {
        let mut splitter = LineSplitter::default();
        let lines = splitter.feed(b"\x1b[2J\x1b[01;01H>>Start PXE over IPv4.\r\n\x1b[0mNext\r");
        assert_eq!(lines, [">>Start PXE over IPv4."]);
        assert_eq!(splitter.feed(b" line\r\n"), ["Next line"]);
        assert_eq!(splitter.finish(), None);
    }

    #[tokio::test]
    async fn waiting_finds_lines_past_and_future() {
        let folder = tempfile::tempdir().unwrap();
        let console = Console::create("n1", &folder.path().join("console.log")).unwrap();
        let (mut machine, stream) = tokio::io::duplex(64);
        tokio::spawn(console.clone().capture(stream));
        tokio::io::AsyncWriteExt::write_all(&mut machine, b"one\ntwo\n").await.unwrap();
        assert_eq!(console.wait_for("two", 0, Duration::from_secs(5)).await.unwrap(), "two");
        let position = console.position();
        assert!(console.wait_for("two", position, Duration::from_millis(10)).await.is_err());
        let file = std::fs::read_to_string(folder.path().join("console.log")).unwrap();
        assert!(file.lines().all(|line| line.starts_with('[')) && file.contains("] one\n"), "{file}");
    }

    proptest! {
        #[test]
        fn any_octets_in_any_pieces_give_the_same_bounded_lines(
            octets in proptest::collection::vec(any::<u8>(), 0..400), cut in 0_usize..400
        ) {
            let cut = cut.min(octets.len());
            let mut whole = LineSplitter::default();
            let mut parts = LineSplitter::default();
            let mut expected = whole.feed(&octets);
            expected.extend(whole.finish());
            let mut found = parts.feed(&octets[..cut]);
            found.extend(parts.feed(&octets[cut..]));
            found.extend(parts.finish());
            prop_assert_eq!(&found, &expected);
            prop_assert!(found.iter().all(|line| !line.contains('\x1b')));
        }
    }
}
