//! Signals: SIGTERM and SIGINT stop the daemon; SIGHUP, which the end of a terminal or a tool that expects a
//! reload sends, does nothing.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Exit status after a second signal.
const EXIT_INTERRUPTED: i32 = 130;

/// Returns a future that resolves at the first SIGTERM or SIGINT; a second one exits the process.
///
/// # Errors
/// The handlers cannot be installed.
pub(super) fn stop() -> io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            tracing::info!("SIGHUP is ignored: a changed configuration takes a restart");
        }
    });
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
