//! Watching the caller's sessions: what changed, a few sessions at a time, each described when it is told.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use super::Service;
use super::caller::Caller;
use super::described::DescribedSession;
use super::sessions::TurnHold;
use crate::error::Error;
use crate::session::{Change, Labels, SessionWatch, Told};

/// Shortest time between two looks at what changed: the engine is asked what is cached of every session that
/// did, and changes meanwhile become one.
const PACE: Duration = Duration::from_millis(20);

/// The sessions to watch.
#[derive(Clone, Debug, Default)]
pub struct WatchSessions {
    /// Model name; empty for the sessions of every model.
    pub model: String,
    /// Labels that they have.
    pub labels: Labels,
    /// How their names begin; empty for all.
    pub name_prefix: String,
    /// Whether they are pinned; unset for both.
    pub pinned: Option<bool>,
    /// Whether those that are there are not told.
    pub changes_only: bool,
}

/// One event of a watch.
#[derive(Debug)]
pub enum WatchEvent {
    /// What became of a session.
    Change {
        /// Its name.
        name: String,
        /// What became of it.
        change: WatchedChange,
        /// Number of changes before it that are not told.
        merged: u32,
    },
    /// The sessions that were there are told.
    Ready,
}

/// What became of a session, described.
pub type WatchedChange = Change<DescribedSession>;

/// The changes of a caller's sessions.
pub struct Watching {
    service: Arc<Service>,
    watch: SessionWatch<TurnHold>,
    has_told: bool,
}

impl Service {
    /// Begins to watch the caller's sessions.
    ///
    /// # Errors
    /// A field is refused, or the caller watches too often.
    pub fn watch_sessions(
        self: &Arc<Self>,
        caller: &Caller,
        watch: WatchSessions,
    ) -> Result<Watching, Error> {
        let WatchSessions { model, labels, name_prefix, pinned, changes_only } = watch;
        let filter = self.session_filter(&model, labels, name_prefix, pinned)?;
        let watch = self.sessions.watch(caller.principal.clone(), filter, changes_only)?;
        Ok(Watching { service: Arc::clone(self), watch, has_told: false })
    }
}

impl Watching {
    /// Waits for changes and returns some, in the order of names.
    ///
    /// # Errors
    /// The daemon shuts down.
    pub async fn next(&mut self) -> Result<Vec<WatchEvent>, Error> {
        let told = async {
            if self.has_told {
                tokio::time::sleep(PACE).await;
            }
            poll_fn(|context| self.watch.poll(context)).await
        };
        let told = tokio::select! {
            biased;
            () = self.service.drained() => return Err(Error::Draining),
            told = told => told,
        };
        self.has_told = true;
        let mut events = Vec::with_capacity(told.len());
        for one in told {
            events.push(match one {
                Told::Ready => WatchEvent::Ready,
                Told::Change { name, change, merged } => {
                    let (name, change) = (name.to_string(), self.described(change).await);
                    WatchEvent::Change { name, change, merged }
                }
            });
        }
        Ok(events)
    }

    async fn described(&self, change: Change) -> WatchedChange {
        let describe = async |view| Box::new(self.service.describe_session(view).await);
        match change {
            Change::Listed(view) => Change::Listed(describe(*view).await),
            Change::Created(view) => Change::Created(describe(*view).await),
            Change::Changed(view, fields) => Change::Changed(describe(*view).await, fields),
            Change::Deleted => Change::Deleted,
            Change::Expired => Change::Expired,
            Change::Unlisted => Change::Unlisted,
        }
    }
}
