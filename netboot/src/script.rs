//! iPXE scripts, from typed parts only. No text that a client or another service chose gets into a script except
//! through a type that cannot hold a line break, an expansion (`${`), a comment or a command separator.

use assay_wire::id::NodeId;
use std::fmt;
use std::str::FromStr;
use url::Url;

/// The script of a node in the airlock: fetch the agent, three times if need be, and run it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentScript {
    /// For the console.
    pub node: NodeId,
    /// Where the agent's image is.
    pub agent: BootUrl,
    /// The command line that the Reference Values were computed for.
    pub command_line: CommandLine,
}

impl fmt::Display for AgentScript {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, agent, command_line } = self;
        writeln!(f, "#!ipxe")?;
        writeln!(f, "echo Assay: node {node} is in the airlock, fetching its agent")?;
        // Unrolled rather than a loop: it visibly ends, and needs no iPXE setting as a counter. `chain` returns only if
        // it failed; `||` with nothing behind it lets the script go on.
        for attempt in 1..=ATTEMPTS {
            writeln!(f, "chain --autofree {agent} {command_line} ||")?;
            if attempt < ATTEMPTS {
                writeln!(f, "echo Assay: the agent did not start, attempt {attempt} of {ATTEMPTS}")?;
                writeln!(f, "sleep {PAUSE_SECONDS}")?;
            }
        }
        writeln!(f, "echo Assay: the agent did not start after {ATTEMPTS} attempts")?;
        writeln!(f, "echo Assay: the error above says why, netboot's log has its side of it")?;
        writeln!(f, "echo Assay: rebooting in {REBOOT_SECONDS} seconds")?;
        writeln!(f, "sleep {REBOOT_SECONDS}")?;
        writeln!(f, "reboot")
    }
}

/// An `http` URL that stands in a script as one word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootUrl(String);

impl BootUrl {
    /// Takes a parsed URL, which is serialised again; whatever a parser lets through that iPXE could read as anything
    /// but one word is refused.
    ///
    /// # Errors
    /// See [`UnsafeText`].
    pub fn new(url: &Url) -> Result<Self, UnsafeText> {
        let text = url.as_str();
        let safe = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b':' | b'/' | b'.' | b'-' | b'_' | b'[' | b']');
        if url.scheme() == "http" && text.bytes().all(safe) {
            Ok(Self(text.to_owned()))
        } else {
            Err(UnsafeText::new("boot URL", url.scheme()))
        }
    }

    /// The URL as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BootUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A kernel command line: words of letters, digits and `. _ = , : / @ + -`, with single spaces between. The same bytes
/// reach the kernel, and PCR 12, behind the image's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine(String);

impl CommandLine {
    /// The command line as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for CommandLine {
    type Err = UnsafeText;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        let safe = |b: u8| {
            b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'=' | b',' | b':' | b'/' | b'@' | b'+' | b'-')
        };
        // `chain` would take a leading option as its own.
        let word = |word: &str| !word.is_empty() && word.bytes().all(safe) && !word.starts_with('-');
        if value.len() <= MAX_COMMAND_LINE_BYTES && value.split(' ').all(word) {
            Ok(Self(value.to_owned()))
        } else {
            Err(UnsafeText::new("kernel command line", value))
        }
    }
}

impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text may not stand in a script.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {text:?} has something in it that has no place in an iPXE script")]
pub struct UnsafeText {
    what: &'static str,
    text: String,
}

impl UnsafeText {
    /// `text` is not the `what` that it was taken for. Only its beginning is kept.
    #[must_use]
    pub fn new(what: &'static str, text: &str) -> Self {
        Self { what, text: text.chars().take(80).collect() }
    }
}

const ATTEMPTS: u32 = 3;
const PAUSE_SECONDS: u32 = 2;
const REBOOT_SECONDS: u32 = 20;
/// The kernel's own limit is 2048; iPXE's line is read whole.
const MAX_COMMAND_LINE_BYTES: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn script(node: &str, url: &str, command_line: &str) -> Option<String> {
        let agent = BootUrl::new(&Url::parse(url).ok()?).ok()?;
        Some(AgentScript { node: node.parse().ok()?, agent, command_line: command_line.parse().ok()? }.to_string())
    }

    #[test]
    fn the_script_as_ipxe_gets_it() {
        let text = script("n1", "http://10.99.0.1/boot/00ff/agent.efi", "console=ttyS0,115200 panic=30 quiet").unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "#!ipxe");
        let chain = "chain --autofree http://10.99.0.1/boot/00ff/agent.efi console=ttyS0,115200 panic=30 quiet ||";
        assert_eq!(lines.iter().filter(|line| **line == chain).count(), 3);
        assert_eq!(lines.last(), Some(&"reboot"));
        assert_eq!(lines.len(), SCRIPT_LINES);
    }

    #[test]
    fn row_11_what_ipxe_would_interpret_is_refused() {
        for bad in [
            "",
            " ",
            "a  b",
            "a ",
            "-x",
            "a -b",
            "a\nb",
            "a\rb",
            "a;b",
            "a||b",
            "a && b",
            "${net0/mac}",
            "#a",
            "a\0",
            "a\"b",
            "ä",
            &"x".repeat(1025),
        ] {
            assert!(bad.parse::<CommandLine>().is_err(), "{bad:?} was accepted");
        }
        for bad in [
            "https://10.0.0.1/a",
            "tftp://10.0.0.1/a",
            "http://10.0.0.1/${mac}",
            "http://10.0.0.1/a;b",
            "http://u:p@10.0.0.1/a",
            "http://10.0.0.1/a?b=c",
            "http://10.0.0.1/a#b",
            "http://10.0.0.1/%0a",
        ] {
            assert!(BootUrl::new(&Url::parse(bad).unwrap()).is_err(), "{bad:?} was accepted");
        }
    }

    const SCRIPT_LINES: usize = 14;

    proptest! {
        #[test]
        fn row_11_no_field_ever_adds_a_line_or_a_command(
            node in "\\PC{0,12}|[a-z0-9-]{1,20}|[a-z\n\r;|&#$ {}]{1,20}",
            path in "\\PC{0,30}|[a-z/\n\r;|&#$ {}%.]{0,30}",
            command_line in "\\PC{0,40}|[a-z=\n\r;|&#$ {}-]{0,40}|[a-z]{1,8}( [a-z=,.0-9]{1,8}){0,5}",
        ) {
            if let Some(text) = script(&node, &format!("http://10.0.0.1/{path}"), &command_line) {
                let allowed = ["#!ipxe", "echo ", "chain --autofree http://10.0.0.1/", "sleep ", "reboot"];
                prop_assert_eq!(text.lines().count(), SCRIPT_LINES);
                for line in text.lines() {
                    prop_assert!(allowed.iter().any(|start| line.starts_with(start)), "{:?}", line);
                    let body = line.strip_prefix("#!ipxe").unwrap_or(line);
                    let body = body.strip_suffix(" ||").unwrap_or(body);
                    prop_assert!(!body.contains(['#', '$', ';', '|', '&', '\r', '\0']), "{:?}", line);
                }
            }
        }
    }
}
