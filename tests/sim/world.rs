//! The world of a seed: clients that ask, fork, stall, leave and come back with old counts; models that are
//! loaded, unloaded and fail; memory that shrinks; time that jumps; daemons that end and start again.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::random::Random;
use super::request::{Known, Request, SESSION_LIMITS};
use super::saved::{End, Saved};
use super::seen::Seen;
use super::snapshots::Snapshots;
use crate::backend::ModelId;
use crate::backend::fake::{Fake, Faults, KV_BYTES, WEIGHT_BYTES, spec};
use crate::clock::Clock;
use crate::engine::core::Engine;
use crate::engine::tests::grammars::grammar;
use crate::engine::tests::{HandClock, settings, tokenizer};
use crate::engine::{Command, EngineSettings, LoadEvent, LoadWork, ModelLease};
use crate::error::Error;
use crate::grammar::Grammar;
use crate::ids::{ModelName, SessionKey};
use crate::session::SessionBook;
use crate::store::stepped::{FailingDisk, SteppedStore};
use crate::text::Tokenizer;

pub(super) const MODELS: [&str; 2] = ["m", "other"];
pub(super) const PRINCIPALS: u64 = 2;
/// A token whose context has no finite logits.
pub(super) const POISON: u32 = 999;
/// Ticks within which a drained world comes to rest.
const REST_TICKS: u32 = 20_000;

/// Turns are stopped by dropping the sender.
pub(super) type Book = SessionBook<oneshot::Sender<()>>;

pub(super) struct World {
    pub(super) engine: Engine<Fake>,
    pub(super) book: Arc<Book>,
    pub(super) clock: Arc<HandClock>,
    pub(super) running_max: u32,
    pub(super) queue_max: u32,
    /// Whether the budget was made smaller than what was used.
    pub(super) shrunk: bool,
    /// Whether the tick began within the budget and without a load.
    pub(super) settled: bool,
    /// The budget when the last tick of the engine began: a load reads it anew.
    pub(super) budget_before: u64,
    /// Tokens computed of what decodes, and ticks since then, by model and sequence.
    pub(super) waiting_rows: BTreeMap<(ModelId, u64), (u32, u32)>,
    /// Number of ticks in a row in which the blocked request had nobody to wait for and nothing was freed for
    /// it, and the bytes that were free before.
    pub(super) idly_blocked: (u32, u64),
    /// What each session is to be.
    pub(super) kept: BTreeMap<SessionKey, Known>,
    /// The sessions' files.
    pub(super) store: SteppedStore,
    /// What the files may say.
    pub(super) saved: Saved,
    /// The writes in a hundred that fail.
    pub(super) disk_fails: usize,
    /// Whether disk and daemon go on by themselves.
    pub(super) calm: bool,
    /// Number of turns begun.
    pub(super) turns: u64,
    /// Number of restarts by how the daemon ended.
    pub(super) restarts: BTreeMap<End, u32>,
    /// The contexts that were computed since the start.
    pub(super) seen: Seen,
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
    pub(super) tokenizer: Tokenizer,
    /// What some outputs obey.
    pub(super) grammar: Arc<Grammar>,
    pub(super) ticks: u32,
    settings: EngineSettings,
    device: Device,
    pub(super) snapshots: Snapshots,
    budget: u64,
    /// Models that expired, and that were evicted, in earlier lives.
    pub(super) departed: (u64, u64),
}

/// Returns a grammar of up to twelve words, none of them [`POISON`]; made once.
fn some_grammar() -> Arc<Grammar> {
    static MADE: OnceLock<Arc<Grammar>> = OnceLock::new();
    Arc::clone(MADE.get_or_init(|| grammar(&tokenizer(), "( t[1-8][0-9]{2}){1,12}", &[])))
}

impl World {
    pub(super) fn new(seed: u64, defect: Faults) -> Self {
        let mut random = Random(seed);
        let (running_max, queue_max) = (1 + random.small(8), 4 + random.small(12));
        let settings = EngineSettings {
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
        // Every third world has models with recurrent states.
        let state_bytes = if random.below(3) == 0 { 40 * KV_BYTES } else { 0 };
        // In every second world steps take their time, for each row and each token: not all rows fit in one.
        let step_ms = (seed % 2 == 1).then_some([1 + seed / 2 % 6, seed / 2 % 3]);
        let device = Device { state_bytes, step_ms, defect };
        let engine = new_engine(&clock, settings, budget, device);
        let book = Arc::new(SessionBook::new(SESSION_LIMITS, clock.clone()));
        let (store, _) = SteppedStore::open(FailingDisk::new(), &book).unwrap();
        let mut world = Self {
            engine,
            book,
            clock,
            running_max,
            queue_max,
            shrunk: false,
            settled: false,
            budget_before: budget,
            idly_blocked: (0, 0),
            waiting_rows: BTreeMap::new(),
            kept: BTreeMap::new(),
            store,
            saved: Saved::default(),
            disk_fails: 0,
            calm: false,
            turns: 0,
            restarts: BTreeMap::new(),
            seen: Seen::default(),
            ended: BTreeMap::new(),
            staying: vec![],
            leases: vec![],
            loading: vec![],
            random,
            requests: vec![],
            tokenizer: tokenizer(),
            grammar: some_grammar(),
            ticks: 0,
            settings,
            device,
            snapshots: Snapshots::default(),
            budget,
            departed: (0, 0),
        };
        world.keep_snapshots();
        for model in MODELS {
            world.load(model);
        }
        world
    }

    /// Ends the daemon with all that it has in memory, and starts another one without sessions.
    pub(super) fn begin_life(&mut self) {
        for _ in 0..self.requests.len() {
            *self.ended.entry("Restarted".into()).or_default() += 1;
        }
        self.requests.clear();
        self.leases.clear();
        self.loading.clear();
        self.staying.clear();
        self.departed = self.departed();
        self.seen = Seen::default();
        self.engine = new_engine(&self.clock, self.settings, self.budget, self.device);
        self.waiting_rows.clear();
        self.snapshots.end_life();
        self.keep_snapshots();
        self.book = self.new_book();
        (self.shrunk, self.idly_blocked) = (false, (0, 0));
    }

    pub(super) fn new_book(&self) -> Arc<Book> {
        Arc::new(SessionBook::new(SESSION_LIMITS, self.clock.clone()))
    }

    /// Returns the numbers of models that expired and that were evicted.
    pub(super) fn departed(&self) -> (u64, u64) {
        let counters = &self.engine.counters;
        (self.departed.0 + counters.expirations_total, self.departed.1 + counters.evictions_total)
    }

    /// Lets something happen: the engine ticks, callers read, and everything still holds.
    pub(super) fn tick(&mut self) {
        for _ in 0..self.random.below(3) {
            self.something_happens();
        }
        // At times what constrained outputs may draw is not known for a while.
        if self.random.once_in(40) {
            self.engine.masks.hold();
        } else if self.random.once_in(3) {
            self.engine.masks.release();
        }
        self.engine_tick();
        self.disk_tick();
    }

    pub(super) fn engine_tick(&mut self) {
        self.ticks += 1;
        self.settled = !self.shrunk && self.engine.loads.is_empty();
        self.budget_before = self.engine.budget_bytes;
        self.engine.backend.kv_bytes_peak = 0;
        self.staying = self.those_who_stay();
        self.engine.tick();
        self.check_stays();
        self.write_snapshots();
        let step = 1 + self.random.below(20);
        self.pass(Duration::from_millis(step));
        self.read();
        self.note_uses();
        self.check();
    }

    /// Lets everything come to its end without new requests.
    pub(super) fn wind_down(&mut self) {
        let faults = &mut self.engine.backend.faults;
        (faults.loads_fail, faults.slab_tokens_max, faults.parking_fails) = (false, None, false);
        self.engine.backend.hanging.clear();
        self.engine.masks.release();
        self.set_budget(self.budget);
        self.disk_fails = 0;
        self.store.disk.fail(0, 0);
        self.requests.iter_mut().for_each(|request| request.reads_from = 0);
        // Calls that have not reached the engine end without it.
        self.leases.clear();
        self.snapshots.stop();
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
        self.leave();
        let mut last = self.kept.clone();
        last.values_mut().for_each(|known| known.turn = None);
        let (now, totals) = (self.clock.wall(), self.totals());
        let mut found = self.restart(End::InOrder);
        for (after, before) in self.totals().into_iter().zip(totals) {
            assert_eq!(after.0, before.0, "an owner has its sessions");
            // A fork's own lists are not charged again.
            assert!(after.1 <= before.1, "{} bytes were {}", after.1, before.1);
        }
        // What nobody found any more was not swept yet.
        found.retain(|key, known| last.contains_key(key) || !known.is_expired(now));
        assert_eq!(found, last, "a daemon that ends in order leaves all that there is");
    }

    fn drain(&mut self) {
        let (reply, _) = oneshot::channel();
        self.engine.command(Command::Drain(Duration::from_secs(3600), reply));
    }

    pub(super) fn pass(&mut self, time: Duration) {
        *self.clock.0.lock().unwrap() += time;
    }

    pub(super) fn something_happens(&mut self) {
        match self.random.below(100) {
            0..42 => self.generate(None),
            42..46 => self.snapshots_change(),
            46..62 => self.session_turn(),
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
            93 => self.sweep(),
            96 if self.engine.is_idle() => self.engine.rest(),
            94 => (0..20).for_each(|_| self.generate(None)),
            95 => self.stranger(),
            97 => self.somebody_tokenizes(),
            98 => {
                let faults = &mut self.engine.backend.faults;
                faults.slab_tokens_max = self.random.once_in(3).then(|| 256 * self.random.small(16));
                faults.parking_fails = self.random.once_in(6);
            }
            _ => self.fits(),
        }
    }

    pub(super) fn load(&mut self, model: &str) {
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
}

/// What the device of a world is like.
#[derive(Clone, Copy)]
pub(super) struct Device {
    /// Bytes of a sequence's state; 0 is none.
    state_bytes: u64,
    /// What each row and each prefilled token take of a step.
    step_ms: Option<[u64; 2]>,
    defect: Faults,
}

fn new_engine(
    clock: &Arc<HandClock>,
    settings: EngineSettings,
    budget: u64,
    Device { state_bytes, step_ms, defect }: Device,
) -> Engine<Fake> {
    let mut fake = Fake::with(Faults { poison: Some(POISON), ..defect });
    fake.state_bytes = state_bytes;
    if let Some([row, token]) = step_ms {
        let clock = Arc::clone(clock);
        fake.pass = Some(Box::new(move |prefilled, rows| {
            let took = 2 + row * u64::from(rows) + token * u64::from(prefilled);
            *clock.0.lock().unwrap() += Duration::from_millis(took);
        }));
    }
    Engine::new(fake, clock.clone(), settings, budget)
}
