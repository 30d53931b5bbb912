//! How a command fails: one line on stderr with the daemon's reason and the request, a hint where one
//! helps, and an exit code.

use std::error::Error as _;
use std::io::{self, Write as _};
use std::process::ExitCode;

use mlxd_client::{Error, ErrorReason};

/// Exit code of wrong usage, as clap's.
pub(crate) const USAGE: u8 = 2;

/// Exit code of an interrupted command, as shells expect it: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

/// The outcome of a command.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The daemon refused, or is not there.
    #[error("{0}")]
    Client(#[from] Error),
    /// The arguments do not add up; the text says what would.
    #[error("{0}")]
    Usage(String),
    /// The command worked, and its answer is no; it was printed already.
    #[error("no")]
    Negative,
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// Reading input or writing output failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A command that works in this process failed.
    #[error("{0:#}")]
    Local(#[from] anyhow::Error),
}

impl Failure {
    /// Tells the user, and says how the process should end.
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
        // Nothing is left to do when even this cannot be written.
        _ = io::stderr().lock().write_all(self.lines().as_bytes());
    }

    fn lines(&self) -> String {
        match self {
            // The reader of a pipe has had enough; that is its right.
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

/// The innermost cause: the operating system's word, below layers of transport.
fn root_cause(error: &Error) -> Option<String> {
    let mut cause = error.source()?;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    Some(cause.to_string())
}

fn hint(error: &Error) -> Option<String> {
    if matches!(error, Error::Connect { .. }) {
        return Some("start a daemon with `mlxd serve`, or name another with --address".into());
    }
    let text = match error.reason() {
        ErrorReason::ModelNotFound => "`mlxd ps --all` lists the models that are found",
        ErrorReason::ModelNotLoaded => "`mlxd load MODEL` makes it resident",
        ErrorReason::NoChatTemplate => "--raw continues text without a template",
        ErrorReason::ModelTooLarge | ErrorReason::MemoryBudget => {
            "`mlxd ps` shows what is resident, `mlxd unload MODEL` frees it"
        }
        ErrorReason::KvTooLarge => "a smaller --max-tokens needs less",
        ErrorReason::SessionBusy => "another turn runs in this session; wait for its end",
        ErrorReason::SessionWrongModel => "leave -m out, or use another --session",
        ErrorReason::Unauthenticated => "--token-file FILE names the daemon's token",
        _ => {
            let wait = error.call()?.retry_after?;
            return Some(format!("try again in {:.1} s", wait.as_secs_f64()));
        }
    };
    Some(text.into())
}
