//! The log: `tracing` events as lines on stderr, as text or JSON. Lines about a request carry its id, because
//! each request runs in a span that `rpc` opens. Started once by `daemon`.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Installs the log for the process. A second call has no effect: tests run many daemons in one process.
///
/// # Errors
/// The reason why `filter` is invalid.
pub fn start(format: LogFormat, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("log_filter: {error}"))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr).with_target(false);
    let started = match format {
        LogFormat::Text => log.with_ansi(stderr().is_terminal()).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    // Fails only if a log is installed already.
    drop(started);
    Ok(())
}
