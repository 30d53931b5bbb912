//! Ctrl-C. From the first listener on, the process no longer ends by itself on SIGINT, so a command that
//! listens once does so until its end: here is the one door to it.

use std::future::Future;

use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::failure::{Failure, Result};

/// Every Ctrl-C from its making on, also one that comes while nobody waits.
pub(crate) struct Interrupts(Signal);

impl Interrupts {
    /// Begins to listen.
    pub(crate) fn listen(runtime: &Runtime) -> Result<Self> {
        let _entered = runtime.enter();
        Ok(Self(signal(SignalKind::interrupt())?))
    }

    /// Runs `work` unless it is interrupted, or has been before.
    pub(crate) async fn or<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            _ = self.0.recv() => Err(Failure::Interrupted),
            outcome = work => outcome,
        }
    }
}
