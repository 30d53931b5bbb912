//! The world of a seed: clients that ask, fork, stall, leave and come back with old counts; models that are
//! loaded, unloaded and fail; memory that shrinks; time that jumps.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::random::Random;
use super::request::{Inbox, Request, SESSION_LIMITS, Turn, cache_use};
use crate::backend::ModelId;
use crate::backend::fake::{CONTEXT, Fake, Faults, KV_BYTES, WEIGHT_BYTES, spec};
use crate::clock::Clock;
use crate::engine::core::Engine;
use crate::engine::tests::{HandClock, settings, tokenizer};
use crate::engine::{
    Command, GenerateWork, LoadEvent, LoadWork, ModelLease, Penalty, Sampling, ScoreWork, Stopping, Tenancy,
    WorkOrigin,
};
use crate::error::Error;
use crate::ids::{ConnectionId, ModelName, SessionKey};
use crate::sched::{Owner, Priority};
use crate::session::SessionBook;
use crate::text::Tokenizer;

pub(super) const MODELS: [&str; 2] = ["m", "other"];
const CLIENTS: u64 = 5;
pub(super) const PRINCIPALS: u64 = 2;
/// A token whose context has no finite logits.
const POISON: u32 = 999;
/// Ticks within which a drained world comes to rest.
const REST_TICKS: u32 = 20_000;

pub(super) struct World {
    pub(super) engine: Engine<Fake>,
    pub(super) book: Arc<SessionBook<oneshot::Sender<()>>>,
    pub(super) clock: Arc<HandClock>,
    pub(super) running_max: u32,
    pub(super) queue_max: u32,
    /// Whether the budget was made smaller than what was used.
    pub(super) shrunk: bool,
    /// Whether the tick began within the budget and without a load.
    pub(super) settled: bool,
    /// The budget when the last tick of the engine began: a load reads it anew.
    pub(super) budget_before: u64,
    /// Number of ticks in a row in which the blocked request had nobody to wait for.
    pub(super) idly_blocked: u32,
    /// Tokens that each session is to hold.
    pub(super) kept: BTreeMap<SessionKey, Vec<u32>>,
    /// Number of requests by how they ended.
    pub(super) ended: BTreeMap<String, u32>,
    /// Models that may not leave in this tick.
    pub(super) staying: Vec<(ModelName, ModelId)>,
    /// Leases of calls that have not reached the engine.
    pub(super) leases: Vec<ModelLease>,
    /// Those who wait for a load.
    loading: Vec<mpsc::Receiver<LoadEvent>>,
    pub(super) random: Random,
    pub(super) requests: Vec<Request>,
    tokenizer: Tokenizer,
    ticks: u32,
    pub(super) sessions_made: u64,
    budget: u64,
}

impl World {
    pub(super) fn new(seed: u64, defect: Faults) -> Self {
        let mut random = Random(seed);
        let (running_max, queue_max) = (1 + random.small(8), 4 + random.small(12));
        let settings = crate::engine::EngineSettings {
            running_sequences_max: running_max,
            queue_length_max: queue_max,
            queue_length_per_client_max: 2 + random.small(6),
            prefill_chunk_tokens: 1 + random.small(128),
            slow_reader: Duration::from_secs(5),
            priority_ageing: Duration::from_secs(1),
            ..settings()
        };
        let budget = 2 * WEIGHT_BYTES + (1500 + random.below(12_000)) * KV_BYTES;
        let clock = Arc::new(HandClock::default());
        let tokenizer = tokenizer();
        // Every third world has models with recurrent states.
        let state_bytes = if random.below(3) == 0 { 40 * KV_BYTES } else { 0 };
        let mut fake = Fake::with(Faults { poison: Some(POISON), ..defect });
        fake.state_bytes = state_bytes;
        let mut world = Self {
            engine: Engine::new(fake, clock.clone(), settings, budget),
            book: Arc::new(SessionBook::new(SESSION_LIMITS, clock.clone())),
            clock,
            running_max,
            queue_max,
            shrunk: false,
            settled: false,
            budget_before: budget,
            idly_blocked: 0,
            kept: BTreeMap::new(),
            ended: BTreeMap::new(),
            staying: vec![],
            leases: vec![],
            loading: vec![],
            random,
            requests: vec![],
            tokenizer,
            ticks: 0,
            sessions_made: 0,
            budget,
        };
        for model in MODELS {
            world.load(model);
        }
        world
    }

    /// Lets something happen: the engine ticks, callers read, and everything still holds.
    pub(super) fn tick(&mut self) {
        for _ in 0..self.random.below(3) {
            self.something_happens();
        }
        self.engine_tick();
    }

    fn engine_tick(&mut self) {
        self.ticks += 1;
        self.settled = !self.shrunk && self.engine.loads.is_empty();
        self.budget_before = self.engine.budget_bytes;
        self.engine.backend.kv_bytes_peak = 0;
        self.staying = self.those_who_stay();
        self.engine.tick();
        self.check_stays();
        let step = 1 + self.random.below(20);
        self.pass(Duration::from_millis(step));
        self.read();
        self.check();
    }

    /// Lets everything come to its end without new requests.
    pub(super) fn wind_down(&mut self) {
        let faults = &mut self.engine.backend.faults;
        (faults.loads_fail, faults.slab_tokens_max, faults.parking_fails) = (false, None, false);
        self.engine.backend.hanging.clear();
        self.set_budget(self.budget);
        self.requests.iter_mut().for_each(|request| request.reads_from = 0);
        // Calls that have not reached the engine end without it.
        self.leases.clear();
        let late = self.random.once_in(2);
        if late {
            self.drain();
        }
        for tick in 0..REST_TICKS {
            if self.requests.is_empty() && self.engine.is_idle() {
                break;
            }
            assert!(tick + 1 < REST_TICKS, "{} requests never end", self.requests.len());
            self.engine_tick();
        }
        self.check_rest();
        if !late {
            self.drain();
            self.engine_tick();
        }
        self.generate(None);
        self.requests.iter_mut().for_each(|request| request.reads_from = 0);
        self.engine_tick();
        assert!(self.requests.is_empty(), "a drained engine refuses at once");
    }

    fn drain(&mut self) {
        let (reply, _) = oneshot::channel();
        self.engine.command(Command::Drain(Duration::from_secs(3600), reply));
    }

    fn pass(&mut self, time: Duration) {
        *self.clock.0.lock().unwrap() += time;
    }

    fn something_happens(&mut self) {
        match self.random.below(100) {
            0..45 => self.generate(None),
            45..62 => self.session_turn(),
            62..66 => self.score(),
            66..72 => self.session_changes(),
            72..80 => self.somebody_leaves(),
            80..84 => self.load(MODELS[usize::try_from(self.ticks % 2).unwrap()]),
            84 => self.unload(),
            85 => self.engine.backend.faults.next_step_fails = self.random.once_in(3),
            86 => {
                self.engine.backend.faults.loads_fail = self.random.once_in(3);
                let hangs = self.random.once_in(3).then(|| MODELS[1].into());
                self.engine.backend.hanging = hangs.into_iter().collect();
            }
            87..90 => self.budget_changes(),
            90..93 => {
                let jump = self.random.below(4000);
                self.pass(Duration::from_millis(jump));
            }
            93 => drop(self.book.sweep()),
            96 if self.engine.is_idle() => self.engine.rest(),
            94..96 => (0..20).for_each(|_| self.generate(None)),
            97 => self.somebody_tokenizes(),
            98 => {
                let faults = &mut self.engine.backend.faults;
                faults.slab_tokens_max = self.random.once_in(3).then(|| 256 * self.random.small(16));
                faults.parking_fails = self.random.once_in(6);
            }
            _ => self.fits(),
        }
    }

    fn origin(&mut self, session: Option<&SessionKey>) -> WorkOrigin {
        let principal = format!("p{}", self.random.below(PRINCIPALS));
        let principal = session.map_or(principal.as_str().into(), |key| key.owner.clone());
        let number = self.random.below(CLIENTS);
        let client = format!("{principal}/c{number}");
        let now = self.clock.now();
        let deadline = self.random.once_in(8).then(|| {
            let left = self.random.below(1200);
            now.after(Duration::from_millis(left))
        });
        let priority = match self.random.below(4) {
            0 => Priority::Interactive,
            1 => Priority::Background,
            _ => Priority::Normal,
        };
        WorkOrigin {
            request: "r".into(),
            owner: Owner { principal, connection: ConnectionId(number / 2), client: client.as_str().into() },
            priority,
            session: session.cloned(),
            pinned: session.is_some() && self.random.once_in(4),
            turn: None,
            cache: cache_use(self.random.below(12)),
            arrived: now,
            deadline,
        }
    }

    /// Returns a prompt, which may begin as others do.
    fn tokens(&mut self) -> Vec<u32> {
        let shared = self.random.small(3) * 40;
        let longest = if self.random.once_in(10) { 600 } else { 60 };
        let own = 1 + self.random.below(longest);
        let mut tokens: Vec<u32> = (0..shared).map(|place| place * 7 % 900).collect();
        tokens.extend((0..own).map(|_| self.random.small(900)).collect::<Vec<_>>());
        if self.random.once_in(60) {
            tokens.push(POISON);
        }
        tokens
    }

    pub(super) fn generate(&mut self, turn: Option<(Turn, ModelName, Vec<u32>)>) {
        let model: ModelName = MODELS[usize::try_from(self.random.below(2)).unwrap()].into();
        let new = self.tokens();
        let (turn, model, prompt) = match turn {
            Some((turn, model, old)) => (Some(turn), model, [old, new].concat()),
            None => (None, model, new),
        };
        let room = CONTEXT.saturating_sub(u32::try_from(prompt.len()).unwrap());
        if room == 0 {
            return;
        }
        let longest = if self.random.once_in(12) { 900 } else { 40 };
        // At times only the context is to be computed.
        let max_tokens = if self.random.once_in(10) { 0 } else { (1 + self.random.small(longest)).min(room) };
        let (events, inbox) = mpsc::channel(3 + usize::try_from(self.random.below(30)).unwrap());
        let work = GenerateWork {
            origin: self.origin(turn.as_ref().map(|turn| turn.guard.key())),
            model: self.lease(&model),
            prompt: prompt.clone().into(),
            sampling: greedy(),
            stopping: Stopping { max_tokens, stop_strings: Arc::new([]), stop_token_ids: vec![] },
            top_logprobs: None,
            tokenizer: self.tokenizer.clone(),
            detokenizer: self.tokenizer.detokenizer(),
            keep_alive: self.keep_alive(),
            events,
        };
        self.engine.command(Command::Generate(Box::new(work)));
        let mut request = Request::new(prompt, max_tokens, Inbox::Events(inbox));
        request.turn = turn;
        if self.random.once_in(10) {
            request.reads_from = self.ticks + self.random.small(400);
        }
        self.requests.push(request);
    }

    fn score(&mut self) {
        let (reply, answer) = oneshot::channel();
        let (model, tokens): (ModelName, _) = (MODELS[0].into(), self.tokens());
        let work = ScoreWork {
            origin: self.origin(None),
            model: self.lease(&model),
            prompt: tokens.clone().into(),
            score_from: 0,
            top_logprobs: 0,
            keep_alive: None,
            reply,
        };
        self.engine.command(Command::Score(Box::new(work)));
        self.requests.push(Request::new(tokens, 0, Inbox::Scores(answer)));
    }

    /// A lease of the model; of an earlier tenancy if it is not resident, as if the device had failed
    /// meanwhile.
    fn lease(&self, model: &ModelName) -> ModelLease {
        let lease = self.engine.table().borrow().lease(model);
        lease.unwrap_or_else(|| Tenancy::new(spec(model.as_str()).assets).lease())
    }

    fn somebody_leaves(&mut self) {
        let count = self.requests.len() as u64;
        if count > 0 {
            let place = usize::try_from(self.random.below(count)).unwrap();
            drop(self.requests.swap_remove(place));
            *self.ended.entry("Cancelled".into()).or_default() += 1;
        }
    }

    fn load(&mut self, model: &str) {
        // At times everybody who waits for a load leaves.
        if self.random.once_in(4) {
            self.loading.clear();
        }
        let (events, listener) = mpsc::channel(8);
        let stay = self.stay();
        self.engine.command(Command::Load(LoadWork { stay, ..LoadWork::new(spec(model), events) }));
        self.loading.push(listener);
    }

    /// A call takes a lease before it tokenizes, or ends without work.
    fn somebody_tokenizes(&mut self) {
        let model = MODELS[usize::try_from(self.random.below(2)).unwrap()].into();
        match self.random.below(3) {
            0 => self.leases.clear(),
            _ => self.leases.push(self.lease(&model)),
        }
    }

    fn unload(&mut self) {
        let (reply, mut answer) = oneshot::channel();
        let model = MODELS[usize::try_from(self.random.below(2)).unwrap()];
        let resident = self.engine.models.get(&model.into());
        let is_leased =
            resident.is_some_and(|resident| self.leases.iter().any(|lease| resident.tenancy.granted(lease)));
        self.engine.command(Command::Unload(model.into(), reply));
        let unloaded = answer.try_recv().unwrap();
        assert!(!is_leased || matches!(unloaded, Err(Error::ModelBusy { .. })), "a leased model stays");
    }

    fn fits(&mut self) {
        let (reply, mut answer) = oneshot::channel();
        self.engine.command(Command::Fits(spec("new"), reply));
        assert_eq!(answer.try_recv().unwrap().unwrap().needed_bytes, WEIGHT_BYTES);
    }

    fn budget_changes(&mut self) {
        let quarters = 2 + self.random.below(4);
        self.set_budget(self.budget * quarters / 4);
    }

    fn set_budget(&mut self, bytes: u64) {
        let settings = self.residency(bytes);
        self.engine.command(Command::Configure(Box::new(settings)));
        self.shrunk |= self.engine.used_bytes() > self.engine.budget_bytes;
    }

    fn read(&mut self) {
        let mut reading = std::mem::take(&mut self.requests);
        reading.retain_mut(|request| {
            // The service stops a turn whose session is gone.
            let stopped = request.turn.as_mut().is_some_and(|turn| {
                turn.stopped.try_recv().is_err_and(|e| e == oneshot::error::TryRecvError::Closed)
            });
            !stopped
        });
        let mut waiting = vec![];
        for mut request in reading {
            if self.ticks < request.reads_from {
                waiting.push(request);
                continue;
            }
            match request.read() {
                None => waiting.push(request),
                Some(outcome) => self.note_end(request, &outcome),
            }
        }
        self.requests = waiting;
    }

    fn note_end(&mut self, request: Request, outcome: &Result<(), Error>) {
        let how = match outcome {
            Ok(()) => "ok".to_owned(),
            Err(Error::NonFiniteLogits) => {
                assert!(request.prompt.contains(&POISON), "only poison does that");
                "NonFiniteLogits".to_owned()
            }
            Err(error) => {
                let name = format!("{error:?}");
                name.split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
            }
        };
        *self.ended.entry(how).or_default() += 1;
        // A turn that does not end well is dropped with its request, and leaves no trace.
        if outcome.is_ok()
            && let Some((key, tokens)) = request.keep()
        {
            self.kept.insert(key, tokens);
        }
    }
}

fn greedy() -> Sampling {
    let off = |value| Penalty { value, context_size: 0 };
    Sampling {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        seed: 0,
        repetition: off(1.0),
        presence: off(0.0),
        frequency: off(0.0),
        logit_bias: vec![],
        xtc: None,
    }
}
