//! Requests that wait for memory, and those that pass them.

use super::*;
use crate::backend::fake::{Faults, KV_BYTES, WEIGHT_BYTES};

/// Bytes of a slot that ends with 1024 tokens, and of the one of 256 that it begins in.
const LARGE: u64 = (1024 + 256) * KV_BYTES;

/// Bytes of a slot for up to 256 tokens.
const SMALL: u64 = 256 * KV_BYTES;

fn with_room(bytes: u64) -> Bench {
    Bench::with(Fake::default(), WEIGHT_BYTES + bytes, |_| {})
}

/// Returns a bench with two models, one of which has to go for a request of 1000 tokens.
fn with_room_for_one(pinned: bool) -> Bench {
    let mut bench = with_room(1024 * KV_BYTES + WEIGHT_BYTES / 2);
    let (events, _loading) = mpsc::channel(8);
    let stay = Stay { keep_alive: None, pin: Some(pinned) };
    bench.engine.command(Command::Load(LoadWork { stay, ..LoadWork::new(spec("other"), events) }));
    bench.run();
    bench
}

impl Bench {
    fn request_on(&mut self, model: &str, max_tokens: u32) -> Events {
        let (mut work, events) = self.work(&[1, 2, 3], max_tokens);
        work.model = self.lease(model);
        self.engine.command(Command::Generate(Box::new(work)));
        events
    }

    fn request(&mut self, client: &str, priority: Priority, max_tokens: u32) -> Events {
        let (mut work, events) = self.work(&[1, 2, 3], max_tokens);
        work.origin = WorkOrigin { priority, ..self.origin(client) };
        self.engine.command(Command::Generate(Box::new(work)));
        events
    }

    /// Ticks until a request ends; returns the number of ticks.
    fn until_end(&mut self, mut events: Events) -> u32 {
        for ticks in 0..20_000 {
            while let Ok(event) = events.try_recv() {
                if let GenerateEvent::Ended(outcome) = event {
                    outcome.unwrap();
                    return ticks;
                }
            }
            self.engine.tick();
        }
        panic!("the request does not end");
    }
}

fn has_started(events: &mut Events) -> bool {
    matches!(events.try_recv(), Ok(GenerateEvent::Started { .. }))
}

#[test]
fn a_waiting_giant_does_not_block_what_fits() {
    for same_client in [true, false] {
        let mut bench = with_room(LARGE + SMALL);
        let client = |name| if same_client { "a" } else { name };
        let first = bench.request("a", Priority::Normal, 1000);
        bench.ticks(3);
        let mut giant = bench.request(client("b"), Priority::Normal, 1000);
        let small = bench.request(client("c"), Priority::Normal, 9);
        assert!(bench.until_end(small) < 20, "it needs nothing that the giant waits for");
        assert!(!has_started(&mut giant), "its memory is in use");
        bench.until_end(first);
        bench.ticks(2);
        assert!(has_started(&mut giant));
        bench.run();
    }
}

#[test]
fn an_aged_giant_of_the_background_does_not_block_what_fits() {
    let mut bench = with_room(LARGE + SMALL);
    let first = bench.request("a", Priority::Normal, 1000);
    bench.ticks(3);
    let mut giant = bench.request("b", Priority::Background, 1000);
    bench.ticks(1);
    *bench.clock.0.lock().unwrap() += Duration::from_secs(60);
    for _ in 0..5 {
        let small = bench.request("c", Priority::Interactive, 9);
        assert!(bench.until_end(small) < 20);
    }
    assert!(!has_started(&mut giant));
    bench.until_end(first);
    bench.ticks(2);
    assert!(has_started(&mut giant));
    bench.run();
}

#[test]
fn a_giant_that_needs_everything_waits_for_those_before_it_and_no_longer() {
    let mut bench = with_room(LARGE + SMALL);
    let _first = bench.request("a", Priority::Normal, 400);
    bench.ticks(3);
    // Beside it there is no room for another.
    let (mut work, mut giant) = bench.work(&prompt(1, 1000), 20);
    work.origin = bench.origin("b");
    bench.engine.command(Command::Generate(Box::new(work)));
    let short = bench.request("c", Priority::Normal, 9);
    assert!(bench.until_end(short) < 20, "it ends before the first may");
    // A stream of requests that never ends by itself.
    let mut stream: Vec<Events> = Vec::new();
    for tick in 0..2000 {
        stream.retain_mut(|events| {
            !std::iter::from_fn(|| events.try_recv().ok())
                .any(|event| matches!(event, GenerateEvent::Ended(_)))
        });
        while stream.len() < 4 {
            let events = bench.request(&format!("c{}", tick % 7), Priority::Normal, 30 + tick % 50);
            stream.push(events);
        }
        bench.ticks(1);
        if has_started(&mut giant) {
            assert!(tick < 500, "those before it may draw 400 tokens, and those that passed it end by then");
            return;
        }
    }
    panic!("the giant starves");
}

#[test]
fn another_models_requests_do_not_starve_a_giant() {
    let mut bench = Bench::with(Fake::default(), 2 * WEIGHT_BYTES + LARGE + SMALL, |_| {});
    let (sender, _events) = mpsc::channel(8);
    bench.engine.command(Command::Load(LoadWork::new(spec("other"), sender)));
    bench.run();
    let elsewhere = |bench: &mut Bench, max_tokens| {
        let (mut work, events) = bench.work(&[5, 6], max_tokens);
        work.model = bench.lease("other");
        bench.engine.command(Command::Generate(Box::new(work)));
        events
    };
    let mut stream = vec![elsewhere(&mut bench, 240), elsewhere(&mut bench, 200)];
    bench.ticks(3);
    let mut giant = bench.request("b", Priority::Normal, 1000);
    for tick in 0..2000 {
        for events in &mut stream {
            let ended = std::iter::from_fn(|| events.try_recv().ok())
                .any(|event| matches!(event, GenerateEvent::Ended(_)));
            if ended {
                *events = elsewhere(&mut bench, 240);
            }
        }
        bench.ticks(1);
        if has_started(&mut giant) {
            assert!(tick < 600, "{tick}");
            return;
        }
    }
    panic!("the giant starves");
}

#[test]
fn a_running_load_is_waited_for_not_counted_as_permanent() {
    // Beside another model's weights, the request does not fit.
    let mut bench = with_room(1024 * KV_BYTES + WEIGHT_BYTES / 2);
    for fails in [true, false] {
        bench.engine.backend.faults.loads_fail = fails;
        bench.engine.rest();
        let (sender, mut load) = mpsc::channel(8);
        bench.engine.command(Command::Load(LoadWork::new(spec("other"), sender)));
        bench.ticks(1);
        let mut events = bench.request("a", Priority::Normal, 1000);
        bench.ticks(1);
        assert!(load.try_recv().is_err() && events.try_recv().is_err(), "it waits for the load");
        bench.run();
        drain(events).end.unwrap();
        assert_eq!(bench.engine.models.len(), 1, "the idle one made room");
    }
}

#[test]
fn an_idle_model_goes_for_a_request_that_has_no_room_beside_it_unless_it_is_pinned_or_leased() {
    for pinned in [false, true] {
        let mut bench = with_room_for_one(pinned);
        let small = bench.request("a", Priority::Normal, 9);
        bench.run();
        drain(small).end.unwrap();
        assert_eq!(bench.engine.models.len(), 2, "there was room for both");
        let large = bench.request("a", Priority::Normal, 1000);
        bench.run();
        let refused = matches!(drain(large).end, Err(Error::KvTooLarge { .. }));
        assert_eq!(refused, pinned);
        assert_eq!(bench.engine.models.len(), if refused { 2 } else { 1 });
        assert_eq!(bench.stats().counters.evictions_total, u64::from(!refused));
    }
}

#[test]
fn a_leased_neighbour_is_waited_for_and_goes_when_its_last_user_does() {
    let mut bench = with_room_for_one(false);
    let leases = [bench.lease("other"), bench.lease("other")];
    let mut large = bench.request("a", Priority::Normal, 1000);
    for lease in leases {
        bench.ticks(20);
        assert!(large.try_recv().is_err(), "it neither starts nor is refused");
        // What leaves room for it, or ends in time, or is the neighbour's, passes.
        let small = bench.request("b", Priority::Normal, 9);
        let others = bench.request_on("other", 9);
        for events in [small, others] {
            assert!(bench.until_end(events) < 20);
        }
        drop(lease);
    }
    bench.run();
    drain(large).end.unwrap();
    assert_eq!(bench.engine.models.len(), 1);
    assert_eq!(bench.stats().counters.evictions_total, 1);
}

#[test]
fn calls_that_came_before_are_waited_for_and_later_ones_are_not() {
    for overlaps in [false, true] {
        let mut bench = with_room_for_one(false);
        let before = bench.request_on("other", 50);
        bench.pass(Duration::from_secs(1));
        bench.ticks(3);
        let mut large = bench.request("a", Priority::Normal, 1000);
        bench.pass(Duration::from_secs(1));
        bench.ticks(3);
        let later = overlaps.then(|| bench.request_on("other", 200));
        bench.until_end(before);
        bench.ticks(5);
        if let Some(later) = later {
            let refused = Error::KvCrowded {
                needed_bytes: LARGE - SMALL,
                available_bytes: 1024 * KV_BYTES - WEIGHT_BYTES / 2,
                in_the_way: vec!["other".into()],
            };
            assert_eq!(drain(large).end.err(), Some(refused));
            bench.run();
            drain(later).end.unwrap();
        } else {
            assert!(has_started(&mut large));
            bench.run();
        }
    }
}

#[test]
fn of_two_that_wait_for_each_others_models_the_one_that_came_first_runs() {
    for first in ["m", "other"] {
        let mut bench = with_room_for_one(false);
        let second = if first == "m" { "other" } else { "m" };
        let runs = bench.request_on(first, 1000);
        bench.pass(Duration::from_secs(1));
        let gives_way = bench.request_on(second, 1000);
        bench.run();
        drain(runs).end.unwrap();
        let refused = drain(gives_way).end;
        assert!(matches!(refused, Err(Error::KvCrowded { in_the_way, .. }) if in_the_way == [first.into()]));
    }
}

#[test]
fn an_idle_neighbour_goes_for_what_is_missing_beside_an_open_slot() {
    // Beside two slots of 256 tokens and one of 1024, there is not quite room for another of 1024.
    let mut bench = with_room(WEIGHT_BYTES + 2 * SMALL + 2 * 1024 * KV_BYTES - WEIGHT_BYTES / 2);
    let (events, _loading) = mpsc::channel(8);
    bench.engine.command(Command::Load(LoadWork::new(spec("other"), events)));
    bench.run();
    let first = bench.request("a", Priority::Normal, 900);
    let short = bench.request("b", Priority::Normal, 9);
    bench.until_end(short);
    let class = bench.stats().models[0].slabs[0];
    assert_eq!((class.slots, class.slots_in_use), (2, 1));
    let mut second = bench.request("c", Priority::Normal, 900);
    bench.ticks(3);
    assert!(has_started(&mut second), "its slot was open, and the neighbour left room to grow");
    assert_eq!(bench.engine.models.len(), 1);
    bench.run();
    drain(first).end.unwrap();
}

#[test]
fn what_runs_is_waited_for_where_no_idle_model_would_make_room() {
    // Either one runs, beside the idle model or not.
    let mut bench = with_room(1024 * KV_BYTES + WEIGHT_BYTES);
    let (events, _loading) = mpsc::channel(8);
    bench.engine.command(Command::Load(LoadWork::new(spec("other"), events)));
    bench.run();
    let first = bench.request("a", Priority::Normal, 900);
    bench.ticks(5);
    let second = bench.request("b", Priority::Normal, 900);
    bench.ticks(20);
    assert_eq!(bench.engine.models.len(), 2, "nothing is evicted in vain");
    bench.run();
    for events in [first, second] {
        drain(events).end.unwrap();
    }
}

#[test]
fn a_slab_that_is_not_opened_ends_its_request_alone() {
    let mut bench = Bench::new();
    let running = bench.request("a", Priority::Normal, 100);
    bench.ticks(3);
    bench.engine.backend.faults.slab_tokens_max = Some(256);
    let refused = bench.submit(&prompt(1, 300), 9);
    bench.run();
    assert_eq!(drain(running).tokens, alone(&[1, 2, 3], 100));
    let shortage = Error::KvShortage { needed_bytes: 512 * KV_BYTES, available_bytes: 256 * KV_BYTES };
    assert_eq!(drain(refused).end.err(), Some(shortage), "with the device's numbers");
    let stats = bench.stats();
    assert_eq!((stats.models.len(), stats.counters.refused_total), (1, 1));
    // Without the slots that nobody asked for, there is memory.
    bench.engine.backend.faults.slab_tokens_max = Some(1024);
    let again = bench.submit(&prompt(1, 700), 9);
    bench.run();
    assert_eq!(drain(again).tokens, alone(&prompt(1, 700), 9));
}

#[test]
fn a_stream_that_cannot_grow_goes_on_when_the_device_has_memory_again() {
    let mut bench = Bench::new();
    bench.engine.backend.faults.slab_tokens_max = Some(256);
    let mut growing = bench.request("b", Priority::Normal, 400);
    bench.ticks(300);
    assert!(has_started(&mut growing));
    for _ in 0..3 {
        bench.pass(Duration::from_secs(2));
        bench.ticks(10);
        let model = &bench.stats().models[0];
        assert_eq!((model.running_sequences, model.queued_sequences), (0, 1), "it waits");
    }
    let other = bench.request("a", Priority::Normal, 9);
    assert!(bench.until_end(other) < 20, "others run meanwhile");
    bench.engine.backend.faults.slab_tokens_max = None;
    bench.pass(Duration::from_secs(2));
    bench.run();
    assert_eq!(drain(growing).tokens, alone(&[1, 2, 3], 400));
}

#[test]
fn what_is_cached_anywhere_goes_for_a_slab_that_the_device_has_no_memory_for() {
    for (prompt_tokens, max_tokens) in [(3, 400), (300, 9)] {
        let mut bench = Bench::new();
        let (events, _loading) = mpsc::channel(8);
        bench.engine.command(Command::Load(LoadWork::new(spec("other"), events)));
        bench.run();
        let small = [bench.submit(&prompt(1, 100), 9), bench.request_on("other", 90)];
        bench.run();
        small.into_iter().for_each(|events| drop(drain(events).end.unwrap()));
        bench.engine.rest();
        let held = bench.engine.backend.kv_bytes(|_| true);
        assert_eq!(held, (108 + 92) * KV_BYTES);
        bench.engine.backend.faults.kv_bytes_max = Some(held + (512 - 150) * KV_BYTES);
        let large = bench.submit(&prompt(2, prompt_tokens), max_tokens);
        bench.run();
        assert_eq!(drain(large).tokens, alone(&prompt(2, prompt_tokens), max_tokens as usize));
        assert_eq!(bench.stats().counters.refused_total, 0);
    }
}

#[test]
fn of_three_models_two_may_wait_for_the_third() {
    // Beside `heavy`, neither has room for its request; beside each other they have.
    let mut fake = Fake::default();
    fake.weights = [("heavy".into(), 6 * WEIGHT_BYTES)].into();
    let mut bench = Bench::with(fake, 2 * WEIGHT_BYTES + 1100 * KV_BYTES, |_| {});
    for model in ["other", "heavy"] {
        let (events, _loading) = mpsc::channel(8);
        bench.engine.command(Command::Load(LoadWork::new(spec(model), events)));
        bench.run();
    }
    let before = bench.request_on("heavy", 50);
    bench.pass(Duration::from_secs(1));
    bench.ticks(3);
    let both = ["m", "other"].map(|model| bench.request_on(model, 1000));
    bench.run();
    for events in [before].into_iter().chain(both) {
        drain(events).end.unwrap();
    }
}

/// Lets a stream of 1000 tokens begin on a model, and a request of higher class take its place.
fn preempted_on(bench: &mut Bench, model: &str) -> [Events; 2] {
    let mut ask = |priority, max_tokens| {
        let (mut work, events) = bench.work(&[1, 2, 3], max_tokens);
        work.model = bench.lease(model);
        work.origin.priority = priority;
        bench.engine.command(Command::Generate(Box::new(work)));
        bench.ticks(20);
        events
    };
    [ask(Priority::Background, 1000), ask(Priority::Interactive, 100)]
}

#[test]
fn streams_that_have_begun_end_as_promised_though_the_budget_shrinks() {
    let mut bench = Bench::with(Fake::default(), 2 * WEIGHT_BYTES + 3 * LARGE, |settings| {
        settings.running_sequences_max = 1;
    });
    let (events, _loading) = mpsc::channel(8);
    bench.engine.command(Command::Load(LoadWork::new(spec("other"), events)));
    bench.run();
    let streams = ["m", "other"].map(|model| preempted_on(&mut bench, model));
    assert_eq!(bench.stats().counters.preemptions_total, 2);
    bench.configure(|settings| settings.memory_budget_bytes = Some(WEIGHT_BYTES + SMALL));
    // Who comes now is refused, or waits for them.
    let refused = bench.request("a", Priority::Normal, 1000);
    let later: Vec<Events> = (0..3).map(|_| bench.request("a", Priority::Normal, 9)).collect();
    bench.run();
    assert!(matches!(drain(refused).end, Err(Error::KvTooLarge { .. })));
    for [stream, other] in streams {
        assert_eq!(drain(stream).tokens, alone(&[1, 2, 3], 1000));
        drain(other).end.unwrap();
    }
    for events in later {
        let end = drain(events).end;
        assert!(matches!(end, Ok(_) | Err(Error::KvCrowded { .. })), "{end:?}");
    }
    bench.ticks(1);
    assert!(bench.engine.used_bytes() <= WEIGHT_BYTES + SMALL, "the budget holds again");
}

#[test]
fn a_cache_that_is_not_parked_ends_nothing() {
    let faults = Faults { parking_fails: true, ..Faults::default() };
    let mut bench = Bench::with(Fake::with(faults), 10_000_000, |_| {});
    for _ in 0..2 {
        let events = bench.submit(&prompt(1, 40), 5);
        bench.run();
        let outcome = drain(events);
        assert_eq!((outcome.cached, outcome.tokens), (0, alone(&prompt(1, 40), 5)));
    }
    assert_eq!(bench.stats().models[0].kv_idle_bytes, 0);
}

#[test]
fn a_slab_that_does_not_become_a_cache_ends_nothing() {
    let room = 300 * KV_BYTES;
    let mut bench = Bench::with(Fake::default(), WEIGHT_BYTES + room, |settings| {
        settings.kv_idle_bytes_max = Some(room);
    });
    for parking_fails in [true, true, false] {
        bench.engine.backend.faults.parking_fails = parking_fails;
        let events = bench.submit(&prompt(1, 200), 20);
        bench.run();
        assert_eq!(drain(events).tokens, alone(&prompt(1, 200), 20));
        let model = &bench.stats().models[0];
        assert_eq!((model.kv_slab_bytes, model.kv_idle_bytes == 0), (0, parking_fails));
    }
}

#[test]
fn whoever_left_a_running_load_is_forgotten() {
    let mut bench = with_room(WEIGHT_BYTES);
    let (sender, mut stays) = mpsc::channel(8);
    bench.engine.command(Command::Load(LoadWork::new(spec("other"), sender)));
    for _ in 0..5 {
        let (sender, leaves) = mpsc::channel(8);
        bench.engine.command(Command::Load(LoadWork::new(spec("other"), sender)));
        drop(leaves);
    }
    assert_eq!(bench.engine.loads[0].listeners(), 2, "the one who stays, and the last");
    bench.run();
    let events: Vec<LoadEvent> = std::iter::from_fn(|| stays.try_recv().ok()).collect();
    assert!(matches!(events.last(), Some(LoadEvent::Loaded(..))));
}
