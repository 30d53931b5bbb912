//! Use cases without a protocol: generate, count, score, models, sessions, capabilities, statistics. Plain
//! requests come in, plain answers and events go out. Nothing here names tonic, prost or HTTP: an edge
//! (`rpc`) translates, and every edge gives the same refusals. The shape of a message on its wire is the
//! edge's to check; limits, ranges and names are checked here.
//!
//! A generation's way is `prepare` (check, session turn, model, prompt), then `generation` (engine, events).

mod answer;
mod cache;
mod caller;
mod capabilities;
mod chat;
mod choices;
mod demand;
mod described;
mod desk;
mod downloads;
mod event;
mod extend;
mod fields;
mod format;
mod generation;
mod grammars;
mod history;
mod intake;
mod kv;
mod line;
mod load;
mod models;
mod portable;
mod prepare;
mod prompted;
mod reads;
mod reason;
mod request;
mod room;
mod sampling;
mod saves;
mod score;
mod sessions;
mod terms;
mod waiting;
mod watch;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch as watch_channel;

use crate::clock::{Clock, Moment};
use crate::engine::{EngineHandle, EngineSettings, ResidencySettings};
use crate::error::Error;
use crate::hub::{ModelAccess, ModelCatalog};
use crate::ids::{ConnectionId, ModelName};
use crate::limits::Limits;
use crate::priority;
use crate::session::{SessionBook, SessionLimits};
use crate::store::{self, Durability, OpenStore, SnapshotSettings, Stored};
use desk::Desk;
use grammars::Grammars;
use intake::IntakeOfAll;
use kv::Snapshots;
use models::Models;
use saves::Saves;
use sessions::TurnHold;

pub use cache::CacheOptions;
pub use caller::Caller;
pub use capabilities::{Feature, ModelCapabilities, Stats};
pub use chat::{Chat, ReasoningOptions, Tool, ToolChoice};
pub use described::DescribedSession;
pub use event::{
    CallPart, ChoiceFinished, Event, Finished, OutputDelta, Started, TokenLogprob, TokenLogprobs, TokenScore,
    Usage,
};
pub use extend::{ExtendRequest, Extended};
pub use format::{OutputOptions, ResponseFormat};
pub use generation::Generation;
pub use intake::{Claim, Intake};
pub use kv::{SavedSession, SnapshotStats};
pub use load::{Load, LoadRequest, LoadUpdate};
pub use models::{ModelInfo, ModelPage};
pub use portable::{ImportSession, Piece, SessionExport, SessionImport};
pub use reason::Reason;
pub use request::{CountRequest, Counted, GenerateRequest, Input, ScoreRequest, Scores};
pub use sampling::{DryOptions, EffectiveSampling, SamplingOptions, StoppingOptions};
pub use saves::SaveStats;
pub use sessions::{
    CreateSession, ForkSession, SessionContent, SessionPage, TruncateSession, TruncateTo, UpdateSession,
};
pub use terms::Lifetime;
pub use watch::{WatchEvent, WatchSessions, WatchedChange, Watching};

// Plain types of the floors below that requests and answers are made of.
pub use crate::engine::SlabClass;
pub use crate::engine::{
    CachedKv, ComputeDtype, Counters, DeviceInfo, EngineStats, Finish, Formats, KeepAlive, KvDtype, Priority,
    ResidentModel, Stay,
};
pub use crate::quantize::{QuantMode, Quantization, Recipe};
pub use crate::residency::{Fit, ModelState};
pub use crate::session::{
    History, HistoryOutcome, Labels, Lease, Message, Part, Role, SessionView, ToolCall, ToolResult, TurnEnd,
    ViewField,
};
pub use crate::store::SavedSnapshot;

/// Time for the KV caches that wait to be written at the end; others are given up.
const SNAPSHOTS_LIMIT: Duration = Duration::from_secs(2);

/// The use cases, and the state that all calls share.
pub struct Service {
    engine: EngineHandle,
    models: Arc<Models>,
    sessions: Arc<SessionBook<TurnHold>>,
    saves: Saves,
    snapshots: Snapshots,
    desk: Arc<Desk>,
    grammars: Arc<Grammars>,
    intake: IntakeOfAll,
    limits: Limits,
    clock: Arc<dyn Clock>,
    started: Moment,
    draining: watch_channel::Sender<bool>,
}

impl Service {
    /// A service without sessions or resident models.
    #[must_use]
    pub fn new(
        engine: EngineHandle,
        catalog: ModelCatalog,
        limits: Limits,
        access: ModelAccess,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            models: Arc::new(Models::new(engine.clone(), catalog, access, limits.downloads_running_max)),
            engine,
            sessions: Arc::new(SessionBook::new(session_limits(&limits), Arc::clone(&clock))),
            saves: Saves::default(),
            snapshots: Snapshots::default(),
            desk: Arc::new(Desk::new(limits.preparations_max)),
            grammars: Arc::new(Grammars::new(&limits)),
            intake: IntakeOfAll::new(&limits),
            limits,
            started: clock.now(),
            clock,
            draining: watch_channel::Sender::new(false),
        }
    }

    /// Keeps the sessions in a state folder from now on, with those that were found in it.
    ///
    /// # Errors
    /// The system has no thread to write with.
    pub fn keep_sessions(
        &self,
        found: (OpenStore, Vec<Stored>),
        durability: Durability,
    ) -> std::io::Result<()> {
        let snapshots = self.snapshots.clone();
        self.saves.begin(&self.sessions, found, durability, move |bytes| snapshots.make_way(bytes))
    }

    /// Keeps snapshots of sessions' KV caches in a folder from now on. Where that cannot be, the log says so.
    ///
    /// # Errors
    /// The engine is dead.
    pub async fn keep_snapshots(&self, folder: &Path, settings: SnapshotSettings) -> Result<(), Error> {
        let sessions = Arc::clone(&self.sessions);
        match store::Snapshots::start(folder, settings, move |session| sessions.owner_of(session)) {
            Ok(store) => {
                let kept = (store, settings.disk_bytes_max);
                let saves_max = self.limits.session_saves_max;
                self.snapshots.begin(&self.engine, &self.sessions, kept, saves_max).await
            }
            Err(error) => {
                tracing::warn!(%error, "KV caches are not kept on disk");
                Ok(())
            }
        }
    }

    /// Writes the last changes of sessions and gives the state folder back; nothing is kept after it.
    ///
    /// # Errors
    /// The writer failed.
    pub async fn leave_sessions(&self) -> Result<(), Error> {
        // The sessions first; the folder is given back after both.
        self.saves.finish().await;
        let snapshots = self.snapshots.clone();
        let closed = blocking(move || {
            snapshots.close(SNAPSHOTS_LIMIT);
            Ok(())
        });
        closed.await?;
        self.saves.end().await
    }

    /// Returns the limits on what callers may ask for and hold.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Returns the bytes that the requests of a connection may have.
    #[must_use]
    pub fn intake(&self, connection: ConnectionId) -> Intake {
        self.intake.connection(connection)
    }

    /// Returns the engine's settings.
    #[must_use]
    pub fn engine_settings(&self) -> &EngineSettings {
        self.engine.settings()
    }

    /// Returns the clock by which calls are timed.
    #[must_use]
    pub fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    /// Refuses new calls from now on.
    pub fn drain(&self) {
        self.draining.send_replace(true);
    }

    /// Returns whether new calls are refused.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// Returns when new calls are refused.
    pub(crate) async fn drained(&self) {
        // The service has the sender.
        drop(self.draining.subscribe().wait_for(|draining| *draining).await);
    }

    /// Returns when the engine has finished its running work, at the latest after `limit`.
    ///
    /// # Errors
    /// The engine is dead.
    pub async fn finish_running(&self, limit: Duration) -> Result<(), Error> {
        self.engine.drain(limit).await
    }

    /// Changes who stays in memory, where models are looked for (None: where they were), and which of them
    /// calls may load and download.
    ///
    /// # Errors
    /// The engine is dead.
    pub async fn configure(
        &self,
        residency: ResidencySettings,
        catalog: Option<ModelCatalog>,
        access: ModelAccess,
    ) -> Result<(), Error> {
        self.models.allow(access);
        if let Some(catalog) = catalog {
            self.models.look_in(catalog);
        }
        self.engine.configure(residency).await
    }

    /// Loads a model before the first call.
    ///
    /// # Errors
    /// The model is unknown or cannot be loaded.
    pub async fn preload(&self, model: &ModelName) -> Result<(), Error> {
        self.models.preload(model).await
    }
}

fn session_limits(limits: &Limits) -> SessionLimits {
    let Limits {
        sessions_max,
        sessions_pinned_max,
        session_labels_max,
        session_bytes_max,
        sessions_bytes_max,
        sessions_disk_bytes_max,
        session_watches_max,
        ..
    } = *limits;
    SessionLimits {
        sessions_max,
        sessions_pinned_max,
        session_labels_max,
        session_bytes_max,
        sessions_bytes_max,
        sessions_disk_bytes_max,
        session_watches_max,
    }
}

/// Runs work that blocks on files or computes long on a thread that may wait, not on those that serve, and
/// that stands behind the threads of the steps.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let span = tracing::Span::current();
    let work = move || {
        priority::stand_behind();
        span.in_scope(work)
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|failure| Err(Error::Internal(failure.to_string())))
}
