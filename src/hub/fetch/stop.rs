//! A signal that ends a download from another thread.

use tokio::sync::watch;

/// Ends the downloads that hold a copy of it.
#[derive(Clone, Debug)]
pub struct Stop(watch::Sender<bool>);

impl Stop {
    /// Creates a signal that is not given.
    #[must_use]
    pub fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    /// Gives the signal.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }

    /// Waits for the signal.
    pub async fn wait(&self) {
        // The sender is alive: it is `self`.
        _ = self.0.subscribe().wait_for(|stopped| *stopped).await;
    }
}

impl Default for Stop {
    fn default() -> Self {
        Self::new()
    }
}
