//! How long a stream waits for its next token, whatever other models do.

use std::collections::VecDeque;

use super::*;
use crate::count::count;

const DECODE: Duration = Duration::from_millis(100);
const TOKEN: Duration = Duration::from_millis(3);

/// Two models on a device that takes this time for a step, and for each prefilled token of it.
fn two_models() -> Bench {
    let mut bench = Bench::with(Fake::default(), 100_000_000, |settings| {
        settings.prefill_chunk_tokens = 512;
        settings.prefill_step = Duration::from_millis(500);
        settings.prefill_stretch_percent = 250;
    });
    let clock = Arc::clone(&bench.clock);
    bench.engine.backend.pass =
        Some(Box::new(move |prefilled, _| *clock.0.lock().unwrap() += DECODE + TOKEN * prefilled));
    let (sender, _events) = mpsc::channel(8);
    bench.engine.command(Command::Load(LoadWork::new(spec("other"), sender)));
    bench.run();
    bench
}

impl Bench {
    fn ask_model(&mut self, model: &str, prompt: &[u32], max_tokens: u32) -> Events {
        let (mut work, events) = self.work(prompt, max_tokens);
        work.model = self.lease(model);
        self.engine.command(Command::Generate(Box::new(work)));
        events
    }

    /// Lets both models decode, so that it is known what that takes.
    fn decode_with_both(&mut self) {
        for model in ["m", "other"] {
            let _answer = self.ask_model(model, &prompt(9, 20), 9);
            self.run();
        }
    }

    /// Ticks; returns the times between the deltas of a stream.
    fn gaps(&mut self, events: &mut Events, ticks: u32) -> Vec<Duration> {
        let (mut gaps, mut last) = (Vec::new(), None);
        for _ in 0..ticks {
            self.engine.tick();
            while let Ok(event) = events.try_recv() {
                if let GenerateEvent::Delta(_) = event {
                    let now = self.clock.now();
                    gaps.extend(last.map(|last| now - last));
                    last = Some(now);
                }
            }
        }
        gaps
    }
}

#[test]
fn a_prompt_of_another_model_delays_a_stream_no_more_than_one_of_its_own() {
    for (stream, other) in [("m", "other"), ("other", "m"), ("m", "m")] {
        let mut bench = two_models();
        bench.decode_with_both();
        let mut events = bench.ask_model(stream, &prompt(1, 20), 2000);
        let quiet = bench.gaps(&mut events, 20);
        assert!(quiet.iter().all(|gap| *gap == DECODE), "{quiet:?}");
        let mut prompts: Vec<Events> =
            (2..6).map(|seed| bench.ask_model(other, &prompt(seed, 3000), 1)).collect();
        // What a token costs is learned from the first.
        bench.gaps(&mut events, 8);
        let mut gaps = bench.gaps(&mut events, 60);
        gaps.sort_unstable();
        assert!(gaps[gaps.len() * 95 / 100] <= DECODE * 5 / 2 + TOKEN, "{stream} beside {other}: {gaps:?}");
        assert!(prompts.iter_mut().any(|prompt| prompt.try_recv().is_ok()), "the prompts move on");
    }
}

#[test]
fn prompts_of_two_models_share_the_time_beside_a_stream() {
    let mut bench = two_models();
    let mut events = bench.ask_model("m", &prompt(1, 20), 2000);
    bench.gaps(&mut events, 20);
    let mut long = [bench.ask_model("m", &prompt(2, 3000), 1), bench.ask_model("other", &prompt(3, 3000), 1)];
    bench.gaps(&mut events, 8);
    let mut gaps = bench.gaps(&mut events, 100);
    gaps.sort_unstable();
    assert!(gaps[95] <= DECODE * 5 / 2 + DECODE + TOKEN, "{gaps:?}");
    let done = long.each_mut().map(|events| {
        let done = std::iter::from_fn(|| events.try_recv().ok()).filter_map(|event| match event {
            GenerateEvent::Progress { done_tokens } => Some(done_tokens),
            _ => None,
        });
        done.last().unwrap_or(0)
    });
    assert!(done.iter().all(|done| *done > 800), "both move on: {done:?}");
}

#[test]
fn a_load_whose_pieces_take_time_stretches_the_gaps_of_a_stream_at_most_threefold() {
    let mut bench = two_models();
    bench.decode_with_both();
    let mut events = bench.ask_model("m", &prompt(1, 20), 2000);
    let quiet = bench.gaps(&mut events, 20);
    assert!(quiet.iter().all(|gap| *gap == DECODE), "{quiet:?}");
    let clock = Arc::clone(&bench.clock);
    bench.engine.backend.pieces = 50;
    bench.engine.backend.pass_piece = Some(Box::new(move || *clock.0.lock().unwrap() += DECODE));
    let (sender, mut load) = mpsc::channel(100);
    bench.engine.command(Command::Load(LoadWork::new(spec("third"), sender)));
    let gaps = bench.gaps(&mut events, 80);
    // The end of a tick, where a gap ends here, is later than its delta: once by a step of the warm-up.
    let most = DECODE * 3 + TOKEN * 13;
    assert!(gaps.len() > 70 && gaps.iter().all(|gap| *gap <= most), "{gaps:?}");
    assert!(gaps[..50].iter().all(|gap| *gap <= DECODE * 3), "{gaps:?}");
    let events: Vec<LoadEvent> = std::iter::from_fn(|| load.try_recv().ok()).collect();
    assert!(matches!(events.last(), Some(LoadEvent::Loaded(..))), "{} events", events.len());
}

/// Callers of every kind that harm others, as far as the engine sees them; each tick they are at it again.
#[derive(Default)]
struct Attackers {
    long: Vec<Events>,
    left: VecDeque<Events>,
    unread: Option<Events>,
    names: u32,
}

impl Attackers {
    fn attack(&mut self, bench: &mut Bench, prefills: &str) {
        self.names += 1;
        let seed = 10 + self.names;
        let ended = |events: &mut Events| {
            std::iter::from_fn(|| events.try_recv().ok())
                .any(|event| matches!(event, GenerateEvent::Ended(..)))
        };
        // Long prompts, before all others of the model.
        self.long.retain_mut(|events| !ended(events));
        while self.long.len() < 3 {
            let (mut work, events) = bench.work(&prompt(seed + count(self.long.len()), 1500), 1);
            work.model = bench.lease(prefills);
            (work.origin.owner.connection, work.origin.priority) = (ConnectionId(1), Priority::Interactive);
            bench.engine.command(Command::Generate(Box::new(work)));
            self.long.push(events);
        }
        // Streams that are left soon, each under another name, and one that nobody reads.
        let (mut work, events) = bench.work(&prompt(seed, 30), 400);
        work.origin.owner.client = format!("invented-{}", self.names).into();
        bench.engine.command(Command::Generate(Box::new(work)));
        self.left.push_back(events);
        self.left.drain(..self.left.len().saturating_sub(3));
        if self.unread.is_none() {
            let (sender, events) = mpsc::channel(1);
            let work = bench.work_with(bench.lease("m"), &prompt(7, 20), 4000, sender);
            bench.engine.command(Command::Generate(Box::new(work)));
            self.unread = Some(events);
        }
        // Questions whether a model would fit.
        for _ in 0..64 {
            let (reply, _answer) = oneshot::channel();
            bench.engine.command(Command::Fits(spec("third"), reply));
        }
    }
}

#[test]
fn beside_attackers_of_every_kind_the_gaps_of_streams_stay_below_three_times_the_quiet_ones() {
    let mut bench = two_models();
    bench.decode_with_both();
    let mut streams: Vec<Events> = (1..5)
        .map(|stream| {
            let (mut work, events) = bench.work(&prompt(stream, 20), 2000);
            work.origin.owner.connection = ConnectionId(100 + u64::from(stream));
            bench.engine.command(Command::Generate(Box::new(work)));
            events
        })
        .collect();
    bench.gaps(&mut streams[0], 20);
    let quiet = bench.gaps(&mut streams[0], 20);
    assert!(quiet.iter().all(|gap| *gap == DECODE), "{quiet:?}");
    let mut attackers = Attackers::default();
    let (mut gaps, mut last) = (Vec::new(), vec![None; streams.len()]);
    for tick in 0..400 {
        // Now of their model, now of another.
        if tick == 200 {
            attackers.long.clear();
        }
        attackers.attack(&mut bench, if tick < 200 { "m" } else { "other" });
        bench.engine.tick();
        for (events, last) in streams.iter_mut().zip(&mut last) {
            while let Ok(event) = events.try_recv() {
                assert!(!matches!(event, GenerateEvent::Ended(..)), "{event:?}");
                if let GenerateEvent::Delta(_) = event {
                    let now = bench.clock.now();
                    // What a token costs is learned from the first.
                    gaps.extend(last.filter(|_| tick >= 20).map(|last| now - last));
                    *last = Some(now);
                }
            }
        }
    }
    gaps.sort_unstable();
    assert!(gaps.len() >= 4 * 370, "{} tokens", gaps.len());
    assert!(gaps[gaps.len() * 95 / 100] <= DECODE * 3, "{gaps:?}");
    let prefilled = bench.stats().counters.prefill_tokens_total;
    assert!(prefilled > 400 * 30, "the prompts move on: {prefilled} tokens");
}

/// What a step takes on a CPU with few cores, and each row of it and each prefilled token: four rows take 20
/// ms, 32 take 132, and the smallest prefill takes 32.
const STEP: Duration = Duration::from_millis(4);
const ROW: Duration = Duration::from_millis(4);
const PROMPT: Duration = Duration::from_millis(2);

/// A model, and another, on such a device.
fn on_few_cores() -> Bench {
    let mut bench = Bench::with(Fake::default(), 100_000_000, |settings| {
        settings.prefill_chunk_tokens = 512;
        settings.prefill_stretch_percent = 230;
        settings.running_sequences_max = 32;
    });
    let clock = Arc::clone(&bench.clock);
    bench.engine.backend.pass = Some(Box::new(move |prefilled, rows| {
        *clock.0.lock().unwrap() += STEP + ROW * rows + PROMPT * prefilled;
    }));
    let (sender, _events) = mpsc::channel(8);
    bench.engine.command(Command::Load(LoadWork::new(spec("other"), sender)));
    bench.run();
    bench
}

/// A stream, and when its last delta came.
struct Stream {
    prompt: Vec<u32>,
    events: Events,
    tokens: Vec<u32>,
    last: Option<Moment>,
}

/// Streams of one connection.
struct Streams(Vec<Stream>);

impl Streams {
    fn new(bench: &mut Bench, count: u32, priority: Priority) -> Self {
        let ask = |seed| {
            let prompt = prompt(seed, 20);
            let (mut work, events) = bench.work(&prompt, 3000);
            work.origin.owner.connection = ConnectionId(100);
            work.origin.priority = priority;
            bench.engine.command(Command::Generate(Box::new(work)));
            Stream { prompt, events, tokens: vec![], last: None }
        };
        Self((1..=count).map(ask).collect())
    }

    /// Reads what came; returns the gaps.
    fn read(&mut self, bench: &Bench) -> Vec<Duration> {
        let mut gaps = Vec::new();
        for stream in &mut self.0 {
            while let Ok(event) = stream.events.try_recv() {
                assert!(!matches!(event, GenerateEvent::Ended(..)), "{event:?}");
                if let GenerateEvent::Delta(delta) = event {
                    stream.tokens.extend(delta.tokens);
                    let now = bench.clock.now();
                    gaps.extend(stream.last.map(|last| now - last));
                    stream.last = Some(now);
                }
            }
        }
        gaps
    }

    /// Ticks while others are at it; returns the 95th percentile of the gaps, after the first of them.
    fn p95(&mut self, bench: &mut Bench, ticks: u32, mut others: impl FnMut(&mut Bench)) -> Duration {
        let mut gaps = Vec::new();
        for tick in 0..ticks {
            others(bench);
            bench.engine.tick();
            let read = self.read(bench);
            gaps.extend(read.into_iter().filter(|_| tick >= 20));
        }
        gaps.sort_unstable();
        gaps[gaps.len() * 95 / 100]
    }

    /// Checks that each has what it has alone.
    fn check(&self) {
        for stream in &self.0 {
            assert_eq!(stream.tokens, alone(&stream.prompt, stream.tokens.len()));
        }
    }
}

/// Calls of one connection, as many at once as there may be, each under another name; all are made again when
/// they have ended.
#[derive(Default)]
struct Names {
    calls: Vec<Events>,
    names: u32,
    ended: u32,
}

impl Names {
    fn attack(&mut self, bench: &mut Bench, tokens: u32, priority: Priority) {
        self.calls.retain_mut(|events| {
            let ended = std::iter::from_fn(|| events.try_recv().ok())
                .any(|event| matches!(event, GenerateEvent::Ended(Ok(_))));
            self.ended += u32::from(ended);
            !ended
        });
        if !self.calls.is_empty() {
            return;
        }
        for number in 0..64 {
            self.names += 1;
            // From the second time on all but the last token of a prompt is cached.
            let (mut work, events) = bench.work(&prompt(20 + number, 4), tokens);
            work.origin.owner.client = format!("invented-{}", self.names).into();
            work.origin.priority = priority;
            bench.engine.command(Command::Generate(Box::new(work)));
            self.calls.push(events);
        }
    }
}

#[test]
fn beside_a_connection_with_many_calls_the_gaps_of_four_streams_stay_below_three_times_the_quiet_ones() {
    // Answers of two tokens of prompts that are cached, and long ones.
    for (tokens, least) in [(2, 300), (60, 40)] {
        let mut bench = on_few_cores();
        let mut streams = Streams::new(&mut bench, 4, Priority::Normal);
        let quiet = streams.p95(&mut bench, 60, |_| {});
        assert_eq!(quiet, STEP + ROW * 4);
        let mut names = Names::default();
        let p95 = streams.p95(&mut bench, 600, |bench| names.attack(bench, tokens, Priority::Normal));
        assert!(p95 <= quiet * 3, "{p95:?} beside answers of {tokens} tokens");
        assert!(names.ended >= least, "{} calls ended", names.ended);
        streams.check();
    }
}

#[test]
fn beside_long_prompts_of_a_connection_with_many_calls_the_gaps_stay_below_three_times_the_quiet_ones() {
    let mut bench = on_few_cores();
    let mut streams = Streams::new(&mut bench, 4, Priority::Normal);
    let quiet = streams.p95(&mut bench, 60, |_| {});
    let (mut names, mut long) = (Names::default(), Vec::new());
    let p95 = streams.p95(&mut bench, 600, |bench| {
        names.attack(bench, 60, Priority::Normal);
        if long.len() < 4 {
            let seed = 200 + count(long.len());
            let (mut work, events) = bench.work(&prompt(seed, 3000), 1);
            work.origin.priority = Priority::Interactive;
            bench.engine.command(Command::Generate(Box::new(work)));
            long.push(events);
        }
    });
    assert!(p95 <= quiet * 3, "{p95:?}");
    let prefilled = bench.stats().counters.prefill_tokens_total;
    assert!(prefilled >= 600 * 2 && names.ended > 0, "{prefilled} tokens, {} calls ended", names.ended);
    streams.check();
}

#[test]
fn interactive_streams_keep_their_gaps_beside_normal_calls_of_many_connections() {
    let mut bench = on_few_cores();
    let mut streams = Streams::new(&mut bench, 4, Priority::Interactive);
    let quiet = streams.p95(&mut bench, 60, |_| {});
    let (mut made, mut calls) = (0, Vec::<Events>::new());
    let p95 = streams.p95(&mut bench, 600, |bench| {
        let ended = |events: &mut Events| {
            std::iter::from_fn(|| events.try_recv().ok())
                .any(|event| matches!(event, GenerateEvent::Ended(Ok(_))))
        };
        calls.retain_mut(|events| !ended(events));
        while calls.len() < 24 {
            made += 1;
            let (mut work, events) = bench.work(&prompt(40 + made, 30), 30);
            work.origin.owner.connection = ConnectionId(200 + u64::from(made));
            bench.engine.command(Command::Generate(Box::new(work)));
            calls.push(events);
        }
    });
    assert!(p95 <= quiet * 3, "{p95:?}");
    assert!(made >= 24 * 3, "the others move on: {made}");
    streams.check();
}

#[test]
fn a_batch_of_another_model_does_not_slow_streams_down_more_than_one_of_their_own() {
    let mut bench = on_few_cores();
    let mut streams = Streams::new(&mut bench, 4, Priority::Normal);
    let quiet = streams.p95(&mut bench, 60, |_| {});
    let mut batch: Vec<Events> =
        (1..17).map(|seed| bench.ask_model("other", &prompt(seed, 20), 500)).collect();
    let p95 = streams.p95(&mut bench, 600, |_| {});
    assert!(p95 <= quiet * 3, "{p95:?}");
    let tokens = |events: &mut Events| {
        let events = std::iter::from_fn(|| events.try_recv().ok());
        events.map(|event| if let GenerateEvent::Delta(delta) = event { delta.tokens.len() } else { 0 }).sum()
    };
    let tokens: Vec<usize> = batch.iter_mut().map(tokens).collect();
    assert!(tokens.iter().all(|tokens| *tokens >= 100), "{tokens:?}");
    streams.check();
}

#[test]
fn all_rows_of_one_client_decode_in_every_step() {
    let mut bench = on_few_cores();
    let mut streams = Streams::new(&mut bench, 16, Priority::Normal);
    assert_eq!(streams.p95(&mut bench, 200, |_| {}), STEP + ROW * 16);
    let tokens: Vec<usize> = streams.0.iter().map(|stream| stream.tokens.len()).collect();
    assert!(tokens.iter().all(|tokens| *tokens >= 180), "{tokens:?}");
}
