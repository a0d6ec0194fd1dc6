//! What can go wrong in the lab. Every error names what was being done and to what.

use std::io;
use std::time::Duration;

/// An error of the lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The system refused.
    #[error("{doing}")]
    Io {
        /// What was being done, to what.
        doing: String,
        /// Why not.
        source: io::Error,
    },
    /// A tool said no.
    #[error("{doing}: `{command}` failed ({status}): {output}")]
    Tool {
        /// What it was to do.
        doing: String,
        /// The command line.
        command: String,
        /// Its exit status.
        status: String,
        /// The end of what it said.
        output: String,
    },
    /// Something awaited did not happen in time.
    #[error("{doing}: nothing after {} s; {hint}", waited.as_secs())]
    Timeout {
        /// What was awaited.
        doing: String,
        /// For how long.
        waited: Duration,
        /// What was there instead, or where to look.
        hint: String,
    },
    /// Something that must hold does not.
    #[error("{doing}: {problem}")]
    Unexpected {
        /// What was being done.
        doing: String,
        /// What was found.
        problem: String,
    },
    /// A topology that cannot be built.
    #[error("topology: {0}")]
    Topology(String),
    /// A service library's error.
    #[error("{doing}")]
    Service {
        /// What was being done.
        doing: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl LabError {
    /// Wraps a system error.
    pub fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }

    /// Wraps another library's error.
    pub fn service<E: std::error::Error + Send + Sync + 'static>(doing: impl Into<String>) -> impl FnOnce(E) -> Self {
        let doing = doing.into();
        move |source| Self::Service { doing, source: Box::new(source) }
    }

    /// Something that must hold does not.
    pub fn unexpected(doing: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        Self::Unexpected { doing: doing.into(), problem: problem.to_string() }
    }

    /// The error and all its causes, in one line for people.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

/// The lab's results.
pub type Result<T> = std::result::Result<T, LabError>;
