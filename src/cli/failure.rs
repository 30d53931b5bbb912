//! Failure of a command: one line on stderr with the daemon's message and the request id, a hint where one
//! helps, and the exit code.

use std::error::Error as _;
use std::path::Path;
use std::process::ExitCode;
use std::{fs, io};

use mlxd_client::{Error, ErrorReason};

use super::out;

/// Exit code of a usage error, the same as clap's.
pub(crate) const USAGE: u8 = 2;

/// Exit code of an interrupted command: 128 + SIGINT, as shells expect.
const INTERRUPTED: u8 = 130;

/// Result of a command.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// Reads a file that an argument names.
pub(crate) fn read_text(file: &Path) -> Result<String> {
    fs::read_to_string(file).map_err(|error| Failure::Usage(format!("{}: {error}", file.display())))
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The daemon returned an error or cannot be reached.
    #[error("{0}")]
    Client(#[from] Error),
    /// The arguments are wrong; the text says what is needed.
    #[error("{0}")]
    Usage(String),
    /// The command succeeded with a negative answer, which is already printed.
    #[error("no")]
    Negative,
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// Reading input or writing output failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A command without a daemon failed.
    #[error("{0:#}")]
    Local(#[from] anyhow::Error),
}

impl Failure {
    /// Prints the error and returns the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        self.print();
        match self {
            Self::Usage(_) => ExitCode::from(USAGE),
            Self::Interrupted => ExitCode::from(INTERRUPTED),
            Self::Client(_) | Self::Negative | Self::Io(_) | Self::Local(_) => ExitCode::FAILURE,
        }
    }

    /// Writes the error's lines to stderr.
    pub(crate) fn print(&self) {
        out::note(&self.lines());
    }

    fn lines(&self) -> String {
        match self {
            // The reader of the pipe closed it, as `head` does.
            Self::Io(error) if error.kind() == io::ErrorKind::BrokenPipe => String::new(),
            Self::Negative | Self::Interrupted => String::new(),
            Self::Usage(_) | Self::Io(_) | Self::Local(_) => format!("error: {self}\n"),
            Self::Client(error) => client_lines(error),
        }
    }
}

fn client_lines(error: &Error) -> String {
    let mut line = format!("error: {error}");
    if matches!(error, Error::Connect { .. })
        && let Some(root) = root_cause(error)
    {
        line.push_str(&format!(": {root}"));
    }
    if let Some(call) = error.call() {
        line.push_str(&format!(" [request {}]", call.request_id));
    }
    line.push('\n');
    if let Some(hint) = hint(error) {
        line.push_str(&format!("hint: {hint}\n"));
    }
    line
}

/// Returns the innermost cause: the operating system's error, below the layers of transport.
fn root_cause(error: &Error) -> Option<String> {
    let mut cause = error.source()?;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    Some(cause.to_string())
}

fn hint(error: &Error) -> Option<String> {
    if matches!(error, Error::Connect { .. }) {
        return Some("start a daemon with `mlxd serve`, or give another address with --address".into());
    }
    if matches!(error, Error::Disconnected { .. }) {
        return Some(
            "if the daemon has ended, `mlxd serve` starts another with the sessions that it kept".into(),
        );
    }
    let text = match error.reason() {
        ErrorReason::ModelNotFound => "`mlxd ps --all` lists the available models",
        ErrorReason::ModelNotLoaded => "`mlxd load MODEL` makes it resident",
        ErrorReason::NoChatTemplate => "--raw continues the prompt without a template",
        ErrorReason::ModelTooLarge | ErrorReason::MemoryBudget => {
            "`mlxd ps` shows the resident models, `mlxd unload MODEL` frees one"
        }
        ErrorReason::KvTooLarge => "a smaller --max-tokens needs less memory",
        ErrorReason::SessionBusy => "another turn is running in this session; wait until it ends",
        ErrorReason::SessionWrongModel => "omit -m, or use another --session",
        ErrorReason::Unauthenticated => "give the daemon's token with --token-file FILE",
        _ => {
            let wait = error.call()?.retry_after?;
            return Some(format!("try again in {:.1} s", wait.as_secs_f64()));
        }
    };
    Some(text.into())
}
