//! The log: `tracing` events as lines on stderr. Lines about a request carry its id, because each request
//! runs in a span that `rpc` opens.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Starts the log. A second start changes nothing: tests run many daemons in one process.
///
/// # Errors
/// What is wrong with `filter`.
pub fn start(format: LogFormat, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("log_filter: {error}"))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr).with_target(false);
    let started = match format {
        LogFormat::Text => log.with_ansi(stderr().is_terminal()).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    // Fails only if there is a log already.
    drop(started);
    Ok(())
}
