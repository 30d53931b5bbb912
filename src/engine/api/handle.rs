//! The edge's end of the engine: bounded sends, answers by channel, and the news of its death. Cheap to
//! clone. A caller who finds the channel full waits for the engine's next turn, in order of arrival: who may
//! wait for longer is for the engine's queue to say, which looks at whose the requests are.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::{
    AdoptWork, CachedAsk, CachedKv, Command, EngineSettings, EngineStats, ExportAsk, GenerateWork, KvCopy,
    KvOutbox, KvRoom, LoadEvent, LoadWork, Pulse, RoomAsk, ScoreWork,
};
use crate::backend::{DeviceInfo, LoadSpec};
use crate::error::Error;
use crate::ids::{ModelName, SessionKey};
use crate::residency::{Door, Fit, ModelLease, ModelState, ModelTable, ResidencySettings, Stay};

/// Load events that may wait for their reader; progress beyond that is skipped.
const LOAD_EVENTS_BUFFERED_MAX: usize = 16;

/// Commands that may wait for the engine beyond the queue of requests: loads, stats and the like.
const COMMANDS_EXTRA: usize = 64;

/// When a request that found the queue full should try again.
pub(crate) const QUEUE_RETRY: Duration = Duration::from_secs(1);

/// Returns the capacity of the command channel: it holds the longest queue of requests and some other
/// commands.
pub(crate) fn command_capacity(queue_length_max: u32) -> usize {
    queue_length_max as usize + COMMANDS_EXTRA
}

/// Talks to the engine thread.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    alive: watch::Receiver<bool>,
    device: DeviceInfo,
    settings: EngineSettings,
    models: watch::Receiver<ModelTable>,
    pulse: Pulse,
}

impl EngineHandle {
    /// Returns a handle on the thread that reads `commands` and holds the sending end of `alive`.
    #[must_use]
    pub fn new(
        commands: mpsc::Sender<Command>,
        alive: watch::Receiver<bool>,
        device: DeviceInfo,
        settings: EngineSettings,
        models: watch::Receiver<ModelTable>,
    ) -> Self {
        Self { commands, alive, device, settings, models, pulse: Pulse::default() }
    }

    /// Gives it the sign of life that the thread writes; without one the thread seems never to hang.
    #[must_use]
    pub fn with_pulse(self, pulse: Pulse) -> Self {
        Self { pulse, ..self }
    }

    /// Returns the number of the turn that the thread is in; none while it waits for a command.
    #[must_use]
    pub fn turn(&self) -> Option<u64> {
        self.pulse.turn()
    }

    /// Returns the facts of the device.
    #[must_use]
    pub fn device(&self) -> &DeviceInfo {
        &self.device
    }

    /// Returns the engine's settings.
    #[must_use]
    pub fn settings(&self) -> &EngineSettings {
        &self.settings
    }

    /// Returns a lease of a model, if it is resident. Asks the published table, not the engine's thread.
    #[must_use]
    pub fn lease(&self, model: &ModelName) -> Option<ModelLease> {
        self.models.borrow().lease(model)
    }

    /// Returns the door of a model, if it is resident, by the published table. Takes no lease.
    #[must_use]
    pub fn door(&self, model: &ModelName) -> Option<Door> {
        self.models.borrow().door(model).cloned()
    }

    /// Returns where a model is, by the published table.
    #[must_use]
    pub fn state(&self, model: &ModelName) -> ModelState {
        self.models.borrow().state(model)
    }

    /// Hands over a generation; its events say the rest.
    pub async fn generate(&self, work: GenerateWork) -> Result<(), Error> {
        self.send(Command::Generate(Box::new(work))).await
    }

    /// Hands over a score; its reply says the rest.
    pub async fn score(&self, work: ScoreWork) -> Result<(), Error> {
        self.send(Command::Score(Box::new(work))).await
    }

    /// Starts a load, or joins the one that runs. The load ends when all who wait for it drop their events.
    pub async fn load(&self, spec: LoadSpec, stay: Stay) -> Result<mpsc::Receiver<LoadEvent>, Error> {
        self.begin_load(spec, stay, false).await
    }

    /// Returns a lease of a model, which is loaded first unless it is resident.
    pub async fn load_to_use(&self, spec: LoadSpec) -> Result<ModelLease, Error> {
        let model = spec.model().clone();
        let mut events = self.begin_load(spec, Stay::default(), true).await?;
        loop {
            match events.recv().await.ok_or(Error::EngineDead)? {
                LoadEvent::Loaded(_, _, lease) => return lease.ok_or(Error::ModelUnloaded(model)),
                LoadEvent::Failed(error) => return Err(error),
                LoadEvent::Progress { .. } | LoadEvent::Warming => {}
            }
        }
    }

    async fn begin_load(
        &self,
        spec: LoadSpec,
        stay: Stay,
        wants_lease: bool,
    ) -> Result<mpsc::Receiver<LoadEvent>, Error> {
        let (events, receiver) = mpsc::channel(LOAD_EVENTS_BUFFERED_MAX);
        self.send(Command::Load(LoadWork { spec, stay, wants_lease, events })).await?;
        Ok(receiver)
    }

    /// Returns whether a model would fit now, and what its load would evict.
    pub async fn fits(&self, spec: LoadSpec) -> Result<Fit, Error> {
        self.ask(|reply| Command::Fits(spec, reply)).await?
    }

    /// Changes the configuration of the policy; a smaller budget evicts at once.
    pub async fn configure(&self, settings: ResidencySettings) -> Result<(), Error> {
        self.send(Command::Configure(Box::new(settings))).await
    }

    /// Frees a model; returns the bytes that were freed.
    pub async fn unload(&self, model: ModelName) -> Result<u64, Error> {
        self.ask(|reply| Command::Unload(model, reply)).await?
    }

    /// Drops the KV caches of a session that is gone.
    pub async fn forget(&self, session: SessionKey) -> Result<(), Error> {
        self.send(Command::Forget(session)).await
    }

    /// Notes whether a session is pinned: its KV caches are evicted last then.
    pub async fn pin_session(&self, session: SessionKey, pinned: bool) -> Result<(), Error> {
        self.send(Command::PinSession(session, pinned)).await
    }

    /// Returns how much of some tokens is cached, in the order of the questions.
    pub async fn cached(&self, asked: Vec<CachedAsk>) -> Result<Vec<CachedKv>, Error> {
        self.ask(|reply| Command::Cached(asked, reply)).await
    }

    /// Returns room for what a snapshot has and no cache; none if there is no need or no room.
    pub async fn room(&self, ask: RoomAsk) -> Result<Option<KvRoom>, Error> {
        self.ask(|reply| Command::Room(Box::new(ask), reply)).await
    }

    /// Hands caches of sessions to `outbox` before they are evicted, from now on.
    pub async fn save_evicted(&self, outbox: KvOutbox) -> Result<(), Error> {
        self.send(Command::SaveEvicted(outbox)).await
    }

    /// Returns what is cached of a session as plain data; none if there is nothing to save.
    pub async fn export(&self, ask: ExportAsk) -> Result<Option<KvCopy>, Error> {
        self.ask(|reply| Command::Export(Box::new(ask), reply)).await?
    }

    /// Parks a cache that was read from disk; returns the bytes that it takes.
    pub async fn adopt(&self, work: AdoptWork) -> Result<u64, Error> {
        self.ask(|reply| Command::Adopt(Box::new(work), reply)).await?
    }

    /// Returns the counts.
    pub async fn stats(&self) -> Result<EngineStats, Error> {
        self.ask(Command::Stats).await
    }

    /// Refuses new work; returns when the running work is done or `limit` has passed.
    pub async fn drain(&self, limit: Duration) -> Result<(), Error> {
        self.ask(|reply| Command::Drain(limit, reply)).await
    }

    /// Returns whether the engine thread lives.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        *self.alive.borrow() && !self.commands.is_closed()
    }

    /// Waits until the engine thread has ended, for whatever reason.
    pub async fn died(&self) {
        let mut alive = self.alive.clone();
        // An error means that the sending end is gone, which is the same news.
        let _ = alive.wait_for(|alive| !alive).await;
    }

    async fn send(&self, command: Command) -> Result<(), Error> {
        self.commands.send(command).await.map_err(|_| Error::EngineDead)
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).await?;
        answer.await.map_err(|_| Error::EngineDead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_finds_the_command_channel_full_waits_for_the_engine() {
        let (commands, mut engine) = mpsc::channel(1);
        let (_alive, watch) = watch::channel(true);
        let device = DeviceInfo {
            device: "d".into(),
            mlx_version: "0".into(),
            memory_bytes: None,
            architectures: vec![],
        };
        let (_, models) = watch::channel(ModelTable::default());
        let handle = EngineHandle::new(commands, watch, device, EngineSettings::default(), models);
        let forget = || handle.forget(SessionKey { owner: "p".into(), name: "s".into() });
        forget().await.unwrap();
        let mut waiting = std::pin::pin!(forget());
        tokio::select! {
            biased;
            sent = waiting.as_mut() => panic!("{sent:?}"),
            () = tokio::task::yield_now() => {}
        }
        assert!(engine.recv().await.is_some());
        waiting.await.unwrap();
        drop(engine);
        assert_eq!(forget().await, Err(Error::EngineDead));
    }
}
