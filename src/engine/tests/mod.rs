//! The engine driven by hand, tick by tick, on a backend whose tokens tell what was in the slot.

mod blocked;
mod caches;
mod choices;
mod crowds;
pub(super) mod grammars;
mod loads;
mod memory;
mod pace;
mod requests;
mod sessions;
mod sharing;
mod snapshots;
mod stays;

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot};

use super::core::Engine;
use super::*;
use crate::backend::KvDtype;
use crate::backend::fake::{Fake, next_token, spec};
use crate::clock::{Clock, Moment};
use crate::error::Error;
use crate::ids::{ConnectionId, SessionKey};
use crate::text::{TextFiles, Tokenizer};

pub(super) fn settings() -> EngineSettings {
    EngineSettings {
        kv_idle_bytes_max: None,
        kv_idle_caches_max: 1024,
        kv_dtype: KvDtype::Compute,
        prefill_chunk_tokens: 16,
        prefill_step: Duration::from_secs(1),
        prefill_stretch_percent: 300,
        running_sequences_max: 8,
        queue_length_max: 64,
        queue_length_per_client_max: 64,
        priority_ageing: Duration::from_secs(10),
        slow_reader: Duration::from_secs(60),
        mask_threads: 0,
        mask_max: Duration::from_secs(60),
    }
}

#[derive(Default)]
pub(super) struct HandClock(pub(super) Mutex<Duration>);

impl Clock for HandClock {
    fn now(&self) -> Moment {
        Moment::at(*self.0.lock().unwrap())
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + *self.0.lock().unwrap()
    }
}

struct Bench {
    engine: Engine<Fake>,
    clock: Arc<HandClock>,
    tokenizer: Tokenizer,
}

/// Room for all events of a test, so that none has to read while the engine runs.
const EVENTS: usize = 8192;

type Events = mpsc::Receiver<GenerateEvent>;

/// Ids below this are control tokens.
const CONTROL_TOKENS: u32 = 100;

pub(super) fn tokenizer() -> Tokenizer {
    tokenizer_with(&[])
}

/// Returns a tokenizer some of whose tokens have other texts.
fn tokenizer_with(texts: &[(u32, &str)]) -> Tokenizer {
    let text = |id: u32| {
        let other = texts.iter().find(|(of, _)| *of == id);
        other.map_or_else(|| format!("t{id}"), |(_, text)| (*text).to_owned())
    };
    let vocabulary: serde_json::Map<String, serde_json::Value> =
        (0..1000).map(|id| (text(id), id.into())).collect();
    let model = serde_json::json!({ "type": "WordLevel", "vocab": vocabulary, "unk_token": "t0" });
    // Tokens that begin messages, say.
    let control: Vec<serde_json::Value> = (0..CONTROL_TOKENS)
        .map(|id| {
            serde_json::json!({
                "id": id, "content": format!("t{id}"), "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "added_tokens": control, "model": model,
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "decoder": null, "normalizer": null,
        "post_processor": null, "truncation": null, "padding": null,
    });
    let tokenizer = Some(tokenizer.to_string().into_bytes());
    Tokenizer::new(&TextFiles { tokenizer, ..TextFiles::default() }).unwrap()
}

/// Each client has a connection of its own.
fn connection_of(client: &str) -> ConnectionId {
    ConnectionId(client.bytes().fold(0, |number, byte| number << 8 | u64::from(byte)))
}

impl Bench {
    fn with(fake: Fake, budget: u64, change: impl Fn(&mut EngineSettings)) -> Self {
        let mut settings = settings();
        change(&mut settings);
        let clock = Arc::new(HandClock::default());
        let tokenizer = tokenizer();
        let engine = Engine::new(fake, clock.clone(), settings, budget);
        let mut bench = Self { engine, clock, tokenizer };
        assert!(matches!(bench.load().last(), Some(LoadEvent::Loaded(..))));
        bench
    }

    fn new() -> Self {
        Self::with(Fake::default(), 10_000_000, |_| {})
    }

    fn load(&mut self) -> Vec<LoadEvent> {
        let (sender, mut events) = mpsc::channel(8);
        self.engine.command(Command::Load(LoadWork::new(spec("m"), sender)));
        self.run();
        std::iter::from_fn(|| events.try_recv().ok()).collect()
    }

    fn lease(&self, model: &str) -> ModelLease {
        self.engine.table().borrow().lease(&model.into()).expect("the model is resident")
    }

    fn origin(&self, client: &str) -> WorkOrigin {
        WorkOrigin {
            request: "r".into(),
            owner: Owner { principal: "p".into(), connection: connection_of(client), client: client.into() },
            priority: Priority::Normal,
            session: None,
            pinned: false,
            turn: None,
            cache: CacheUse::default(),
            arrived: self.clock.now(),
            deadline: None,
        }
    }

    fn work(&self, tokens: &[u32], max_tokens: u32) -> (GenerateWork, Events) {
        let (events, receiver) = mpsc::channel(EVENTS);
        (self.work_with(self.lease("m"), tokens, max_tokens, events), receiver)
    }

    fn work_with(
        &self,
        model: ModelLease,
        tokens: &[u32],
        max_tokens: u32,
        events: mpsc::Sender<GenerateEvent>,
    ) -> GenerateWork {
        let off = |value| Penalty { value, context_size: 0 };
        let sampling = Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            typical_p: 1.0,
            seed: 0,
            repetition: off(1.0),
            presence: off(0.0),
            frequency: off(0.0),
            logit_bias: vec![],
            xtc: None,
            dry: None,
        };
        let stopping = Stopping { max_tokens, stop_strings: Arc::new([]), stop_token_ids: vec![] };
        GenerateWork {
            origin: self.origin("c"),
            model,
            prompt: tokens.to_vec().into(),
            sampling,
            stopping,
            constraint: None,
            top_logprobs: None,
            tokenizer: self.tokenizer.clone(),
            detokenizer: self.tokenizer.detokenizer(),
            reading: None,
            keep_alive: None,
            events,
            others: vec![],
        }
    }

    fn submit(&mut self, tokens: &[u32], max_tokens: u32) -> Events {
        let (work, events) = self.work(tokens, max_tokens);
        self.engine.command(Command::Generate(Box::new(work)));
        events
    }

    fn ticks(&mut self, ticks: usize) {
        for _ in 0..ticks {
            self.engine.tick();
        }
    }

    fn run(&mut self) {
        for _ in 0..10_000 {
            if self.engine.is_idle() {
                return;
            }
            self.engine.tick();
        }
        panic!("the engine does not come to rest");
    }

    fn stats(&mut self) -> EngineStats {
        let (reply, mut answer) = oneshot::channel();
        self.engine.command(Command::Stats(reply));
        answer.try_recv().unwrap()
    }
}

/// What a run brought: how it ended, its tokens by deltas, and how much was cached.
struct Outcome {
    end: Result<Generated, Error>,
    tokens: Vec<u32>,
    cached: u32,
}

fn drain(mut events: Events) -> Outcome {
    let (mut end, mut tokens, mut cached) = (None, vec![], 0);
    while let Ok(event) = events.try_recv() {
        assert!(end.is_none(), "nothing follows the end");
        match event {
            GenerateEvent::Started { cached_tokens, .. } => cached = cached_tokens,
            GenerateEvent::Progress { .. } => {}
            GenerateEvent::Delta(delta) => tokens.extend(delta.tokens),
            GenerateEvent::Ended(outcome) => end = Some(outcome),
        }
    }
    Outcome { end: end.expect("every run ends"), tokens, cached }
}

fn alone(prompt: &[u32], tokens: usize) -> Vec<u32> {
    let mut context = prompt.to_vec();
    for _ in 0..tokens {
        context.push(next_token(&context));
    }
    context[prompt.len()..].to_vec()
}

fn prompt(seed: u32, length: u32) -> Vec<u32> {
    (0..length).map(|place| (seed * 31 + place * 7) % 1000).collect()
}
