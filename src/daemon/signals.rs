//! Signals: SIGTERM and SIGINT stop the daemon, SIGHUP makes it read its configuration again.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::config::{Config, ConfigError};

/// Exit status after a second signal.
const EXIT_INTERRUPTED: i32 = 130;

/// Returns a future that resolves at the first SIGTERM or SIGINT; a second one exits the process.
///
/// # Errors
/// The handlers cannot be installed.
pub(super) fn stop() -> io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopped) = oneshot::channel();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        next().await;
        // The receiver is gone if the daemon stops for another reason.
        let _ = stop.send(());
        next().await;
        tracing::warn!("a second signal: exiting at once");
        std::process::exit(EXIT_INTERRUPTED);
    });
    Ok(async { drop(stopped.await) })
}

/// Returns the configurations that are read on SIGHUP. One that cannot be used is only logged.
///
/// # Errors
/// The handler cannot be installed.
pub(super) fn reloads(
    read: impl Fn() -> Result<Config, ConfigError> + Send + 'static,
) -> io::Result<mpsc::Receiver<Config>> {
    let mut hangup = signal(SignalKind::hangup())?;
    let (reloads, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            match read() {
                Ok(config) => drop(reloads.send(config).await),
                Err(error) => tracing::error!(%error, "SIGHUP: the configuration stays as it was"),
            }
        }
    });
    Ok(receiver)
}
