//! Running other people's programs: argument lists, never shell text; their last words kept for the error.

use crate::error::{LabError, Result};
use std::ffi::OsStr;
use std::process::{Output, Stdio};
use std::time::Duration;
use tokio::process::Command;

/// What a tool may print before its error is cut.
const MAX_OUTPUT_CHARS: usize = 2000;

/// A command that dies with us and reads nothing from our terminal.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.kill_on_drop(true).stdin(Stdio::null());
    command
}

/// Runs `command` to its end; `doing` names its purpose in errors. Answers its standard output.
///
/// # Errors
/// It cannot be started, fails, or takes longer than `limit`.
pub async fn run(command: Command, doing: &str, limit: Duration) -> Result<String> {
    let shown = shown(&command);
    let output = output(command, &format!("`{shown}`"), doing, limit).await?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let mut said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if said.is_empty() {
        said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    }
    Err(LabError::Tool {
        doing: doing.to_owned(),
        command: shown,
        status: output.status.to_string(),
        output: tail(&said),
    })
}

/// Runs a command that may fail, and whose arguments are secret, to its end. Answers whether it ended well, and all that
/// it said.
///
/// # Errors
/// It cannot be started, or takes longer than `limit`.
pub async fn outcome(command: Command, doing: &str, limit: Duration) -> Result<(bool, String)> {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let output = output(command, &program, doing, limit).await?;
    let said = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said)).concat();
    Ok((output.status.success(), said))
}

async fn output(mut command: Command, shown: &str, doing: &str, limit: Duration) -> Result<Output> {
    let output = tokio::time::timeout(limit, command.output()).await.map_err(|_| LabError::Timeout {
        doing: doing.to_owned(),
        waited: limit,
        hint: format!("{shown} was still running"),
    })?;
    output.map_err(LabError::io(format!("{doing}: starting {shown}")))
}

/// Waits until `path` exists, as a daemon's sign that it listens.
///
/// # Errors
/// It does not within `limit`.
pub async fn wait_for_path(path: &std::path::Path, doing: &str, limit: Duration) -> Result<()> {
    wait_until(doing, limit, || async { path.exists().then_some(()) }).await
}

/// Asks `probe` again and again, every 20 ms, until it has something to say.
///
/// # Errors
/// It says nothing within `limit`.
pub async fn wait_until<T, F, Fut>(doing: &str, limit: Duration, mut probe: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        if let Some(answer) = probe().await {
            return Ok(answer);
        }
        if tokio::time::Instant::now() >= deadline {
            let hint = "the condition never held".to_owned();
            return Err(LabError::Timeout { doing: doing.to_owned(), waited: limit, hint });
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// The command line, for people.
fn shown(command: &Command) -> String {
    let command = command.as_std();
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// The end of `text`: tools say what went wrong last.
pub(crate) fn tail(text: &str) -> String {
    let skip = text.chars().count().saturating_sub(MAX_OUTPUT_CHARS);
    text.chars().skip(skip).collect()
}

const POLL_INTERVAL: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failing_tool_is_named_with_its_words() {
        let mut ls = command("ls");
        ls.arg("/does-not-exist");
        let error = run(ls, "listing nothing", Duration::from_secs(10)).await.unwrap_err().to_string();
        assert!(error.contains("listing nothing") && error.contains("ls /does-not-exist"), "{error}");
        assert!(error.contains("No such file"), "{error}");
    }

    #[tokio::test]
    async fn a_tool_that_hangs_is_given_up() {
        let mut cat = command("sleep");
        cat.arg("60");
        let error = run(cat, "waiting", Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(error, LabError::Timeout { .. }), "{error}");
    }
}
