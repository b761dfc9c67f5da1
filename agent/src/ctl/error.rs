//! How a command ends when it does not end well.

use std::io::{self, Write};

/// Why a command stops. [`CtlError::report`] says it and gives the exit code (cli.md §2.1).
#[derive(Debug)]
pub enum CtlError {
    /// A sentence for the operator: `Error: …`, exit 1.
    Message(String),
    /// A command line that makes no sense: `Error: …`, exit 2.
    Usage(String),
    /// A prompt met the end of its input: `Aborted!`, exit 1.
    Aborted,
    /// Nobody reads our output any more: nothing to say, exit 1.
    OutputClosed,
}

impl CtlError {
    /// A sentence for the operator.
    pub fn new(message: impl Into<String>) -> Self {
        Self::Message(message.into())
    }

    /// Writes what there is to say to standard error; returns the exit code.
    pub fn report(&self) -> u8 {
        match self {
            Self::Message(text) | Self::Usage(text) => complain(&format!("Error: {text}")),
            Self::Aborted => complain("Aborted!"),
            Self::OutputClosed => {}
        }
        if matches!(self, Self::Usage(_)) { 2 } else { 1 }
    }
}

/// Writes a line to standard error. That nobody reads it (`2>&1 | head`) must not stop a command half-way, as a panic of
/// `eprintln!` would.
pub(super) fn complain(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

impl From<io::Error> for CtlError {
    /// Of our own output; everything else gets a sentence where it happens.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::OutputClosed,
            _ => Self::Message(format!("can not write the output: {error}")),
        }
    }
}

/// What every command returns.
pub type Result<T> = std::result::Result<T, CtlError>;
