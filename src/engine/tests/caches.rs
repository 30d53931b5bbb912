//! Who finds what a request left behind.

use super::*;

const TOKENS: u32 = 120;

/// Sends a prompt; returns its output, and how much of the prompt was cached.
fn send(bench: &mut Bench, cache: CacheUse, principal: &str, tokens: &[u32]) -> u32 {
    let (mut work, events) = bench.work(tokens, 5);
    work.origin.cache = cache;
    work.origin.owner.principal = principal.into();
    bench.engine.command(Command::Generate(Box::new(work)));
    bench.run();
    let outcome = drain(events);
    assert_eq!(outcome.tokens, alone(tokens, 5));
    outcome.cached
}

fn shared(salt: u8) -> CacheUse {
    CacheUse::Shared(Salt([salt; 32]))
}

fn idle_bytes(bench: &mut Bench) -> u64 {
    bench.stats().models[0].kv_idle_bytes
}

#[test]
fn a_request_without_reuse_finds_nothing_and_leaves_nothing() {
    let (mut bench, tokens) = (Bench::new(), prompt(1, TOKENS));
    assert_eq!(send(&mut bench, CacheUse::Off, "p", &tokens), 0);
    assert_eq!(idle_bytes(&mut bench), 0);
    assert_eq!(send(&mut bench, CacheUse::default(), "p", &tokens), 0, "nothing was left");
    let left = idle_bytes(&mut bench);
    assert_eq!(send(&mut bench, CacheUse::Off, "p", &tokens), 0, "what is there is not looked up");
    assert_eq!(idle_bytes(&mut bench), left);
    assert_eq!(send(&mut bench, CacheUse::default(), "p", &tokens), TOKENS - 1);
}

#[test]
fn salts_and_principals_keep_caches_apart() {
    let (mut bench, tokens) = (Bench::new(), prompt(1, TOKENS));
    for (salt, principal) in [(0, "p"), (1, "p"), (2, "p"), (1, "q")] {
        assert_eq!(send(&mut bench, shared(salt), principal, &tokens), 0, "{salt} of {principal}");
    }
    for (salt, principal) in [(0, "p"), (1, "p"), (2, "p"), (1, "q")] {
        assert_eq!(send(&mut bench, shared(salt), principal, &tokens), TOKENS - 1, "{salt} of {principal}");
    }
}

#[test]
fn a_prefix_of_another_principal_takes_as_long_as_one_that_nobody_sent() {
    let (known, unknown) = (prompt(1, TOKENS), prompt(2, TOKENS));
    let cost = |tokens: &[u32]| {
        let mut bench = Bench::new();
        send(&mut bench, CacheUse::default(), "p", &known);
        let before = bench.stats().counters;
        let (mut work, mut events) = bench.work(tokens, 5);
        work.origin.owner.principal = "q".into();
        bench.engine.command(Command::Generate(Box::new(work)));
        let mut ticks = 0;
        while !std::iter::from_fn(|| events.try_recv().ok())
            .any(|event| matches!(event, GenerateEvent::Delta(_)))
        {
            bench.ticks(1);
            ticks += 1;
        }
        let after = bench.stats().counters;
        (ticks, after.prefill_tokens_total - before.prefill_tokens_total, after.cached_tokens_total)
    };
    assert_eq!(cost(&known), cost(&unknown));
    assert_eq!(cost(&known).1, u64::from(TOKENS));
}

/// The ticks that a prompt takes until its first token, and what it adds to the counters and makes a backend
/// copy in all.
fn cost(bench: &mut Bench, tokens: &[u32]) -> (u32, [u64; 7]) {
    let count = |bench: &mut Bench| {
        let (all, fake) = (bench.stats().counters, &bench.engine.backend);
        let (prefilled, cached) = (all.prefill_tokens_total, all.cached_tokens_total);
        let (drawn, steps) = (all.decode_tokens_total, all.steps_total);
        [prefilled, cached, drawn, steps, fake.parked_tokens, fake.restored_tokens, fake.cleared_tokens]
    };
    let before = count(bench);
    let (mut work, mut events) = bench.work(tokens, 5);
    work.origin.owner.principal = "q".into();
    bench.engine.command(Command::Generate(Box::new(work)));
    let mut ticks = 0;
    let mut has_begun = || {
        std::iter::from_fn(|| events.try_recv().ok()).any(|event| matches!(event, GenerateEvent::Delta(_)))
    };
    while !has_begun() {
        bench.ticks(1);
        ticks += 1;
    }
    bench.run();
    let after = count(bench);
    (ticks, std::array::from_fn(|at| after[at] - before[at]))
}

#[test]
fn in_200_tries_a_prefix_of_another_principal_takes_the_steps_and_copies_of_one_that_nobody_sent() {
    let mut bench = Bench::new();
    for number in 0..200 {
        // No two begin alike.
        let [foreign, unknown] =
            [0, 1].map(|odd| [&[2 * number + odd][..], &prompt(2 * number + odd, TOKENS - 1)].concat());
        send(&mut bench, CacheUse::default(), "p", &foreign);
        let asks = if number % 2 == 0 { [&foreign, &unknown] } else { [&unknown, &foreign] };
        let costs = asks.map(|tokens| cost(&mut bench, tokens));
        assert_eq!(costs[0], costs[1], "try {number}");
        assert_eq!(costs[0].1[..2], [u64::from(TOKENS), 0], "try {number}");
    }
}

/// Two requests without reuse, of which one was preempted for a third, which runs.
fn preempted() -> (Bench, [Events; 2]) {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| settings.running_sequences_max = 2);
    let mut ask = |client: &str, seed| {
        let (mut work, events) = bench.work(&prompt(seed, 20), 60);
        work.origin = WorkOrigin { cache: CacheUse::Off, ..bench.origin(client) };
        bench.engine.command(Command::Generate(Box::new(work)));
        bench.ticks(10);
        events
    };
    let runs = [ask("a", 1), ask("a", 2)];
    drop(ask("b", 3));
    assert_eq!(bench.stats().counters.preemptions_total, 1);
    assert!(idle_bytes(&mut bench) > 0, "it waits for its own");
    (bench, runs)
}

#[test]
fn a_preempted_request_without_reuse_continues_where_it_was_and_leaves_nothing() {
    let (mut bench, runs) = preempted();
    bench.run();
    for (seed, events) in (1..).zip(runs) {
        assert_eq!(drain(events).tokens, alone(&prompt(seed, 20), 60));
    }
    assert_eq!(bench.stats().counters.prefill_tokens_total, 60, "three prompts of 20");
    assert_eq!(idle_bytes(&mut bench), 0);
}

#[test]
fn a_request_without_reuse_that_is_cancelled_while_it_waits_leaves_nothing() {
    let (mut bench, runs) = preempted();
    drop(runs);
    bench.run();
    assert_eq!(idle_bytes(&mut bench), 0);
}
