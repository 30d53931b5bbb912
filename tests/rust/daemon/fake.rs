//! An engine that answers every prompt alike: with "yes" and the end token, one token a delta, or with the
//! word " Paris" where that is a token. A prompt that has [`SAY`] and [`SAID`] is answered with what stands
//! between the last of them, and the end token. For a prompt that contains "flood" there is more text first
//! than an unread connection holds; one that contains "hang" never gets further. One that is only to be
//! computed gets no answer. Several choices say the same; the third is the most likely.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use mlxd::engine::{
    CachedAsk, CachedKv, Command, Counters, Delta, DeviceInfo, EngineHandle, EngineSettings, EngineStats,
    Finish, Fit, GenerateEvent, GenerateWork, Generated, KeepAlive, KvOutbox, LoadEvent, LoadSpec, LoadWork,
    ModelTable, Pulse, ResidencySettings, ResidentModel, ScoreWork, Scored, Stay, Stopping, Tenancy,
    TokenLogprobs,
};
use mlxd::error::Error;
use mlxd::hub::ModelAssets;
use mlxd::ids::{ConnectionId, ModelName, SessionKey};
use mlxd::output::{Parser, Piece};
use mlxd::text::{Detokenizer, Tokenizer};
use tokio::sync::{mpsc, oneshot, watch};

pub const ANSWER: &str = "yes";
/// The answer of a model whose tokens are words, as it stands in the vocabulary.
pub const WORD: &str = "▁Paris";

/// The byte before what a prompt has the engine say, and the one after it.
pub const SAY: char = '\u{1}';
pub const SAID: char = '\u{2}';

/// Few enough to fit an engine's channel with all that follows.
const FLOOD_DELTAS: usize = 20;
const FLOOD_DELTA_BYTES: usize = 100_000;

/// The recorded commands, and the current work.
#[derive(Clone, Default)]
pub struct Fake {
    state: Arc<Mutex<State>>,
    kill: Arc<Mutex<Option<oneshot::Sender<()>>>>,
    running: Arc<watch::Sender<usize>>,
    table: Arc<watch::Sender<ModelTable>>,
    pub pulse: Pulse,
}

#[derive(Default)]
struct State {
    resident: BTreeMap<ModelName, (ResidentModel, Tenancy)>,
    contexts: Vec<Vec<u32>>,
    clients: Vec<String>,
    connections: Vec<ConnectionId>,
    validated: Vec<Arc<ModelAssets>>,
    forgotten: Vec<SessionKey>,
    pins: Vec<(SessionKey, bool)>,
    /// Kept open: whoever saves what is evicted ends with it.
    outbox: Option<KvOutbox>,
    pinned: Vec<bool>,
    stays: Vec<Stay>,
    keep_alives: Vec<Option<KeepAlive>>,
    configured: Vec<ResidencySettings>,
    fit: Option<Fit>,
    loads: usize,
    cancelled: usize,
    orphaned: usize,
}

impl Fake {
    pub fn start(settings: EngineSettings) -> (Self, EngineHandle) {
        let fake = Self::default();
        let (commands, mut receiver) = mpsc::channel(settings.queue_length_max as usize);
        let (alive, watch) = watch::channel(true);
        let (kill, mut killed) = oneshot::channel();
        *fake.kill.lock().unwrap() = Some(kill);
        let device = DeviceInfo {
            device: "fake".into(),
            mlx_version: "0".into(),
            memory_bytes: None,
            architectures: vec!["llama"],
        };
        let engine = fake.clone();
        tokio::spawn(async move {
            let _alive = alive;
            let mut work = tokio::task::JoinSet::new();
            loop {
                tokio::select! {
                    command = receiver.recv() => match command {
                        Some(command) => engine.take(command, &mut work),
                        None => break,
                    },
                    _ = &mut killed => break,
                }
            }
            // As with a real one, everything it holds goes with it.
            work.abort_all();
        });
        let table = fake.table.subscribe();
        let handle = EngineHandle::new(commands, watch, device, settings, table);
        (fake.clone(), handle.with_pulse(fake.pulse))
    }

    pub fn kill(&self) {
        let _ = self.kill.lock().unwrap().take().unwrap().send(());
    }

    pub fn contexts(&self) -> Vec<Vec<u32>> {
        self.state.lock().unwrap().contexts.clone()
    }

    pub fn last_context(&self) -> Vec<u32> {
        self.contexts().pop().unwrap()
    }

    pub fn clients(&self) -> Vec<String> {
        self.state.lock().unwrap().clients.clone()
    }

    pub fn connections(&self) -> Vec<ConnectionId> {
        self.state.lock().unwrap().connections.clone()
    }

    pub fn forgotten(&self) -> Vec<String> {
        self.state.lock().unwrap().forgotten.iter().map(ToString::to_string).collect()
    }

    /// Returns which sessions were pinned and unpinned.
    pub fn pins(&self) -> Vec<(String, bool)> {
        let pins = &self.state.lock().unwrap().pins;
        pins.iter().map(|(session, pinned)| (session.to_string(), *pinned)).collect()
    }

    /// Returns whether each generation's session was pinned.
    pub fn pinned(&self) -> Vec<bool> {
        self.state.lock().unwrap().pinned.clone()
    }

    /// Returns what the loads that were validated would have been made from.
    pub fn validated(&self) -> Vec<Arc<ModelAssets>> {
        self.state.lock().unwrap().validated.clone()
    }

    pub fn loads(&self) -> usize {
        self.state.lock().unwrap().loads
    }

    pub fn cancelled(&self) -> usize {
        self.state.lock().unwrap().cancelled
    }

    /// What each load said about the model's stay.
    pub fn stays(&self) -> Vec<Stay> {
        self.state.lock().unwrap().stays.clone()
    }

    /// What each generation said about it.
    pub fn keep_alives(&self) -> Vec<Option<KeepAlive>> {
        self.state.lock().unwrap().keep_alives.clone()
    }

    /// The configurations that were taken over.
    pub fn configured(&self) -> Vec<ResidencySettings> {
        self.state.lock().unwrap().configured.clone()
    }

    /// Answers so whether a model would fit.
    pub fn set_fit(&self, fit: Fit) {
        self.state.lock().unwrap().fit = Some(fit);
    }

    /// Returns the number of leases of a model.
    pub fn leases(&self, model: &str) -> u32 {
        self.state.lock().unwrap().resident[&model.into()].1.leases()
    }

    /// Returns the number of turns that ended because their session was deleted.
    pub fn orphaned(&self) -> usize {
        self.state.lock().unwrap().orphaned
    }

    /// Frees every model behind the daemon's back.
    pub fn lose_models(&self) {
        let mut state = self.state.lock().unwrap();
        state.resident.clear();
        self.publish(&state);
    }

    fn publish(&self, state: &State) {
        let resident = state.resident.iter().map(|(name, (_, tenancy))| (name, tenancy));
        self.table.send_replace(ModelTable::new(std::iter::empty(), resident));
    }

    /// Returns when `count` generations run.
    pub async fn wait_running(&self, count: usize) {
        let mut running = self.running.subscribe();
        let reached = running.wait_for(|running| *running == count);
        tokio::time::timeout(Duration::from_secs(10), reached).await.unwrap().unwrap();
    }

    fn take(&self, command: Command, work: &mut tokio::task::JoinSet<()>) {
        let mut state = self.state.lock().unwrap();
        match command {
            Command::Generate(generation) => {
                state.contexts.push(generation.prompt.tokens.to_vec());
                state.clients.push(generation.origin.owner.client.to_string());
                state.connections.push(generation.origin.owner.connection);
                state.keep_alives.push(generation.keep_alive);
                state.pinned.push(generation.origin.pinned);
                let resident = state.resident.get(generation.model.model());
                let known = resident.is_some_and(|(_, tenancy)| tenancy.granted(&generation.model));
                work.spawn(self.clone().generate(*generation, known));
            }
            Command::Score(scoring) => {
                state.contexts.push(scoring.prompt.tokens.to_vec());
                score(*scoring);
            }
            Command::Load(LoadWork { spec, stay, wants_lease, events }) => {
                state.loads += 1;
                state.stays.push(stay);
                let loaded = resident(&spec);
                let tenancy = Tenancy::new(spec.assets.clone());
                let (door, lease) = (tenancy.door(), wants_lease.then(|| tenancy.lease()));
                state.resident.insert(spec.model().clone(), (loaded.clone(), tenancy));
                self.publish(&state);
                let all = [
                    LoadEvent::Progress { done_bytes: 8, total_bytes: 8 },
                    LoadEvent::Warming,
                    LoadEvent::Loaded(Box::new(loaded), door, lease),
                ];
                all.into_iter().for_each(|event| drop(events.try_send(event)));
            }
            Command::Fits(spec, reply) => {
                state.validated.push(spec.assets);
                let fit = Fit { needed_bytes: 8, available_bytes: 1000, ..Fit::default() };
                drop(reply.send(Ok(state.fit.clone().unwrap_or(fit))));
            }
            Command::Configure(settings) => state.configured.push(*settings),
            Command::Unload(model, reply) => {
                let gone = state.resident.remove(&model);
                self.publish(&state);
                let freed = gone.map(|(gone, _)| gone.weight_bytes);
                drop(reply.send(freed.ok_or(Error::ModelNotLoaded(model))));
            }
            Command::Forget(session) => state.forgotten.push(session),
            Command::PinSession(session, pinned) => state.pins.push((session, pinned)),
            Command::Cached(asked, reply) => drop(reply.send(asked.iter().map(cached).collect())),
            Command::SaveEvicted(outbox) => state.outbox = Some(outbox),
            Command::Room(..) | Command::Export(..) | Command::Adopt(..) => caches_nothing(command),
            Command::Stats(reply) => {
                let models = state.resident.values().map(|(model, _)| model.clone()).collect();
                let requests_total = state.contexts.len() as u64;
                let counters = Counters { requests_total, ..Counters::default() };
                drop(reply.send(EngineStats {
                    counters,
                    models,
                    budget_bytes: 1000,
                    ..EngineStats::default()
                }));
            }
            Command::Drain(limit, reply) => {
                let mut running = self.running.subscribe();
                work.spawn(async move {
                    let idle = running.wait_for(|running| *running == 0);
                    drop(tokio::time::timeout(limit, idle).await);
                    let _ = reply.send(());
                });
            }
        }
    }

    async fn generate(self, work: GenerateWork, known: bool) {
        let events = work.events.clone();
        if !known {
            drop(
                events
                    .send(GenerateEvent::Ended(Err(Error::ModelUnloaded(work.model.model().clone()))))
                    .await,
            );
            return;
        }
        self.running.send_modify(|running| *running += 1);
        let mut turn = work.origin.turn.clone();
        let deleted = async {
            match &mut turn {
                Some(turn) => turn.deleted.wait_for(|deleted| *deleted).await.is_ok(),
                None => std::future::pending().await,
            }
        };
        let cancelled = tokio::select! {
            outcome = generate(work) => outcome.is_err(),
            true = deleted => {
                self.state.lock().unwrap().orphaned += 1;
                let error = Error::Cancelled("the session was deleted".into());
                drop(events.try_send(GenerateEvent::Ended(Err(error))));
                false
            }
        };
        if cancelled {
            self.state.lock().unwrap().cancelled += 1;
        }
        self.running.send_modify(|running| *running -= 1);
    }
}

async fn generate(work: GenerateWork) -> Result<(), mpsc::error::SendError<GenerateEvent>> {
    let GenerateWork { prompt, stopping, top_logprobs, tokenizer, detokenizer, events, others, .. } = work;
    let reader = work.reading.map(|reading| Reader { parser: reading.parser, calls: 0, reasoned: 0 });
    let context = prompt.tokens;
    let count = u32::try_from(context.len()).unwrap();
    events.send(GenerateEvent::Started { cached_tokens: 0, queue_time: Duration::ZERO }).await?;
    events.send(GenerateEvent::Progress { done_tokens: count }).await?;
    let text: String = context.iter().filter_map(|id| char::from_u32(*id)).collect();
    if text.contains("flood") {
        for _ in 0..FLOOD_DELTAS {
            let delta = Delta { text: "x".repeat(FLOOD_DELTA_BYTES), ..Delta::default() };
            events.send(GenerateEvent::Delta(delta)).await?;
        }
    }
    if text.contains("hang") {
        events.closed().await;
    }
    let answer = answer(&context, &tokenizer);
    let answering = Answering { stopping, top_logprobs, detokenizer, reader, answer };
    for (number, events) in (0..).zip(std::iter::once(events).chain(others)) {
        answering.choice(number, events).await?;
    }
    Ok(())
}

/// What the choices of a request have in common.
struct Answering {
    stopping: Stopping,
    top_logprobs: Option<u32>,
    detokenizer: Detokenizer,
    reader: Option<Reader>,
    /// The tokens of the answer, the end included.
    answer: Vec<u32>,
}

impl Answering {
    async fn choice(
        &self,
        number: u8,
        events: mpsc::Sender<GenerateEvent>,
    ) -> Result<(), mpsc::error::SendError<GenerateEvent>> {
        let Self { stopping, top_logprobs, detokenizer, reader, answer } = self;
        let (mut detokenizer, mut reader) = (detokenizer.clone(), reader.clone());
        let mut tokens = Vec::new();
        let mut finish = Finish::Length;
        let answer_tokens = if stopping.max_tokens == 0 { 0 } else { usize::MAX };
        // The third choice is the most likely.
        let logprob = -0.5 - f32::from((number + 1) % 3);
        for token in answer.iter().copied().take(answer_tokens) {
            tokens.push(token);
            let ends = stopping.stop_token_ids.contains(&token);
            let is_last = ends || tokens.len() >= stopping.max_tokens as usize;
            let logprobs =
                top_logprobs.map(|_| TokenLogprobs { chosen: (token, logprob), top: vec![(token, logprob)] });
            let text = if ends { String::new() } else { detokenizer.push(token) };
            let mut delta = match &mut reader {
                Some(reader) => reader.delta(&text, is_last.then_some(!ends)),
                None => Delta { text, ..Delta::default() },
            };
            (delta.tokens, delta.logprobs) = (vec![token], logprobs.into_iter().collect());
            events.send(GenerateEvent::Delta(delta)).await?;
            if ends {
                let has_calls = reader.as_ref().is_some_and(|reader| reader.calls > 0);
                finish = if has_calls { Finish::ToolCalls } else { Finish::StopToken };
            }
            if is_last {
                break;
            }
        }
        let time = Duration::from_millis(1);
        let reasoning_tokens = reader.map_or(0, |reader| reader.reasoned);
        let (time_to_first_token, decode_time, total_time) = (time, time, time);
        let generated =
            Generated { finish, tokens, reasoning_tokens, time_to_first_token, decode_time, total_time };
        events.send(GenerateEvent::Ended(Ok(generated))).await
    }
}

/// Reads the output as the engine does, without stop strings.
#[derive(Clone)]
struct Reader {
    parser: Parser,
    calls: u32,
    reasoned: u32,
}

impl Reader {
    /// Returns what a token's text says; `ended` says whether the output was cut off after it.
    fn delta(&mut self, text: &str, ended: Option<bool>) -> Delta {
        let was_reasoning = self.parser.in_reasoning();
        let mut pieces = self.parser.push(text);
        self.reasoned += u32::from(was_reasoning || self.parser.in_reasoning());
        if let Some(by_length) = ended {
            pieces.extend(self.parser.finish(by_length));
        }
        let mut delta = Delta::default();
        for piece in pieces {
            match piece {
                Piece::Text(text) => delta.text.push_str(&text),
                Piece::Reasoning(text) => delta.reasoning.push_str(&text),
                call => {
                    self.calls += u32::from(matches!(call, Piece::CallEnd { .. }));
                    delta.calls.push(call);
                }
            }
        }
        delta
    }
}

/// Returns the tokens of the answer, the end included.
fn answer(context: &[u32], tokenizer: &Tokenizer) -> Vec<u32> {
    let has_words = tokenizer.token_id(WORD).is_some();
    if let Some(say) = context.iter().rposition(|id| *id == u32::from(SAY)).filter(|_| !has_words) {
        let said = context[say + 1..].iter().copied().take_while(|id| *id != u32::from(SAID));
        return said.chain(tokenizer.token_id("<|end|>")).collect();
    }
    let bytes = || ANSWER.bytes().map(u32::from).collect();
    let text: Vec<u32> = tokenizer.token_id(WORD).map_or_else(bytes, |word| vec![word]);
    text.into_iter().chain(tokenizer.token_id("<|end|>")).collect()
}

/// Answers that all but the last token is cached.
fn cached(asked: &CachedAsk) -> CachedKv {
    let tokens = u32::try_from(asked.tokens.len().saturating_sub(1)).unwrap();
    CachedKv { tokens, bytes: u64::from(tokens) * 8 }
}

/// Answers that nothing is cached that could be saved, or that a turn could lack.
fn caches_nothing(command: Command) {
    match command {
        Command::Room(_, reply) => drop(reply.send(None)),
        Command::Export(_, reply) => drop(reply.send(Ok(None))),
        Command::Adopt(work, reply) => {
            drop(reply.send(Err(Error::ModelUnloaded(work.model.model().clone()))));
        }
        other => panic!("{other:?}"),
    }
}

fn score(work: ScoreWork) {
    let ScoreWork { prompt, score_from, reply, .. } = work;
    let from = score_from as usize;
    let scores = prompt.tokens.iter().enumerate().skip(from).map(|(position, id)| {
        (position > 0).then(|| TokenLogprobs { chosen: (*id, -0.25), top: vec![(*id, -0.25)] })
    });
    drop(reply.send(Ok(Scored { scores: scores.collect(), cached_tokens: score_from })));
}

fn resident(spec: &LoadSpec) -> ResidentModel {
    ResidentModel {
        model: spec.model().clone(),
        revision: spec.files().revision.clone(),
        computes_in: "float32".into(),
        parameter_count: 2,
        weight_bytes: 8,
        kv_slab_bytes: 0,
        kv_idle_bytes: 7,
        kv_bytes_per_token: 4,
        kv_reserved_bytes: 0,
        prefilling_sequences: 0,
        stalled_sequences: 0,
        running_sequences: 0,
        queued_sequences: 0,
        loaded: SystemTime::UNIX_EPOCH,
        last_used: SystemTime::UNIX_EPOCH,
        pinned: false,
        keep_alive: KeepAlive::Forever,
        expires: None,
        path: spec.files().folder.clone(),
        slabs: Vec::new(),
    }
}
