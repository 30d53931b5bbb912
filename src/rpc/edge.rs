//! What all calls share: the engine's handle, the models' assets, the session book, the limits.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dashmap::DashMap;
use tokio::sync::oneshot;
use tokio::sync::watch;

use crate::clock::{Clock, Moment};
use crate::engine::EngineHandle;
use crate::error::Error;
use crate::hub::{AssetShelf, ModelAssets};
use crate::ids::ModelName;
use crate::limits::Limits;
use crate::session::SessionBook;

/// Dropped when a session's turn must stop.
pub(super) type TurnHold = oneshot::Sender<()>;

/// The state of the edge.
pub struct Edge {
    pub(super) engine: EngineHandle,
    pub(super) shelf: Arc<AssetShelf>,
    /// The models that were loaded and not unloaded since. The engine has the last word.
    pub(super) resident: DashMap<ModelName, Arc<ModelAssets>>,
    /// Models being loaded, and by how many calls.
    pub(super) loading: DashMap<ModelName, u32>,
    pub(super) sessions: Arc<SessionBook<TurnHold>>,
    pub(super) limits: Limits,
    pub(super) auto_load: bool,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) started: Moment,
    draining: watch::Sender<bool>,
}

impl Edge {
    /// An edge without sessions or models.
    #[must_use]
    pub fn new(
        engine: EngineHandle,
        shelf: AssetShelf,
        limits: Limits,
        auto_load: bool,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            engine,
            shelf: Arc::new(shelf),
            resident: DashMap::new(),
            loading: DashMap::new(),
            sessions: Arc::new(SessionBook::new(limits.sessions_max, Arc::clone(&clock))),
            limits,
            auto_load,
            started: clock.now(),
            clock,
            draining: watch::Sender::new(false),
        }
    }

    /// From now on calls are refused.
    pub fn drain(&self) {
        self.draining.send_replace(true);
    }

    /// Returns when the engine has finished what it runs, or `limit` is up.
    ///
    /// # Errors
    /// The engine is dead.
    pub async fn finish_running(&self, limit: Duration) -> Result<(), Error> {
        self.engine.drain(limit).await
    }

    /// Whether calls are refused.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// Removes the sessions whose time is up, and their KV caches.
    ///
    /// # Errors
    /// The engine is dead.
    pub async fn sweep_sessions(&self) -> Result<(), Error> {
        for session in self.sessions.sweep() {
            tracing::debug!(%session, "the session's time is up");
            self.engine.forget(session).await?;
        }
        Ok(())
    }

    /// A moment as people count it.
    pub(super) fn wall(&self, moment: Moment) -> SystemTime {
        let now = self.clock.now();
        let wall = self.clock.wall();
        if moment > now { wall + (moment - now) } else { wall.checked_sub(now - moment).unwrap_or(wall) }
    }

    /// The time from now until `moment`.
    pub(super) fn until(&self, moment: Moment) -> Duration {
        moment - self.clock.now()
    }
}

/// Runs work that blocks on files or computes long, off the threads that serve.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let span = tracing::Span::current();
    let done = tokio::task::spawn_blocking(move || span.in_scope(work)).await;
    done.unwrap_or_else(|failure| Err(Error::Internal(failure.to_string())))
}
