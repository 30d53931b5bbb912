//! Several choices of one prompt: each is what it would be alone, and the prompt is computed once.

use super::*;
use crate::backend::fake::{KV_BYTES, WEIGHT_BYTES};

impl Bench {
    /// Submits a request with sampled choices; returns the events of each.
    fn choices(
        &mut self,
        tokens: &[u32],
        (count, max_tokens): (usize, u32),
        change: impl Fn(&mut GenerateWork),
    ) -> Vec<Events> {
        let (mut work, first) = self.work(tokens, max_tokens);
        (work.sampling.temperature, work.sampling.seed) = (1.0, 7);
        let (others, receivers): (Vec<_>, Vec<_>) = (1..count).map(|_| mpsc::channel(EVENTS)).unzip();
        work.others = others;
        change(&mut work);
        self.engine.command(Command::Generate(Box::new(work)));
        std::iter::once(first).chain(receivers).collect()
    }

    /// Runs a request by itself that has the seed of a choice.
    fn choice_alone(&mut self, tokens: &[u32], max_tokens: u32, number: u64) -> Vec<u32> {
        let (mut work, events) = self.work(tokens, max_tokens);
        (work.sampling.temperature, work.sampling.seed) = (1.0, 7 + number);
        work.origin.cache = CacheUse::Off;
        self.engine.command(Command::Generate(Box::new(work)));
        self.run();
        drain(events).tokens
    }

    fn prefilled(&mut self) -> u64 {
        self.stats().counters.prefill_tokens_total
    }
}

/// Checks that all have ended well and each is what it is alone.
fn check(bench: &mut Bench, tokens: &[u32], max_tokens: u32, choices: Vec<Events>) {
    let outcomes: Vec<Outcome> = choices.into_iter().map(drain).collect();
    for (number, outcome) in (0..).zip(&outcomes) {
        assert_eq!(outcome.tokens, bench.choice_alone(tokens, max_tokens, number), "choice {number}");
        assert_eq!(outcome.end.as_ref().unwrap().tokens, outcome.tokens);
    }
    let different: std::collections::BTreeSet<_> = outcomes.iter().map(|outcome| &outcome.tokens).collect();
    assert_eq!(different.len(), outcomes.len(), "each has its own random numbers");
    assert!(bench.stats().models[0].slabs.iter().all(|class| class.slots_in_use == 0));
}

#[test]
fn each_choice_is_what_it_is_alone_and_the_prompt_is_computed_once() {
    let mut bench = Bench::new();
    let prompt = prompt(1, 50);
    let choices = bench.choices(&prompt, (5, 30), |_| {});
    let neighbour = bench.submit(&[1, 2, 3], 40);
    bench.run();
    assert_eq!(bench.prefilled(), 53);
    assert_eq!(drain(neighbour).tokens, alone(&[1, 2, 3], 40));
    check(&mut bench, &prompt, 30, choices);
}

#[test]
fn choices_without_a_place_wait_for_one() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| settings.running_sequences_max = 2);
    let prompt = prompt(1, 50);
    let choices = bench.choices(&prompt, (5, 30), |_| {});
    bench.run();
    assert_eq!(bench.prefilled(), 50);
    assert_eq!(bench.stats().counters.finished_total, 1, "they are one request");
    check(&mut bench, &prompt, 30, choices);
}

#[test]
fn choices_without_memory_wait_for_it() {
    // Room for two slots and what is parked.
    let budget = WEIGHT_BYTES + 3 * 256 * KV_BYTES;
    let mut bench = Bench::with(Fake::default(), budget, |_| {});
    let prompt = prompt(1, 50);
    let choices = bench.choices(&prompt, (5, 100), |_| {});
    bench.run();
    check(&mut bench, &prompt, 100, choices);
}

#[test]
fn idle_caches_go_for_a_prompt_that_choices_share() {
    // Room for two slots and some caches of others.
    let budget = WEIGHT_BYTES + (2 * 256 + 120) * KV_BYTES;
    let mut bench = Bench::with(Fake::default(), budget, |settings| {
        settings.kv_idle_bytes_max = Some(u64::MAX);
    });
    for seed in 2..10 {
        let idle = bench.submit(&prompt(seed, 50), 1);
        bench.run();
        drain(idle);
    }
    let before = bench.prefilled();
    let prompt = prompt(1, 50);
    let choices = bench.choices(&prompt, (2, 20), |_| {});
    bench.run();
    assert_eq!(bench.prefilled() - before, 50);
    check(&mut bench, &prompt, 20, choices);
}

#[test]
fn choices_end_with_the_error_of_a_device_that_fails_where_they_part() {
    for ticks in 0..8 {
        let mut bench = Bench::new();
        let choices = bench.choices(&prompt(1, 50), (4, 20), |_| {});
        bench.ticks(ticks);
        bench.engine.backend.faults.next_step_fails = true;
        bench.run();
        for events in choices {
            assert!(matches!(drain(events).end, Err(Error::Internal(_))), "after {ticks} ticks");
        }
    }
}

#[test]
fn states_of_a_prompt_are_shared_by_its_choices() {
    let mut fake = Fake::default();
    fake.state_bytes = 50;
    let mut bench = Bench::with(fake, 10_000_000, |_| {});
    let prompt: Vec<u32> = (0..90).map(|place| if place % 30 == 0 { place } else { place + 100 }).collect();
    let choices = bench.choices(&prompt, (4, 20), |_| {});
    bench.run();
    assert_eq!(bench.prefilled(), 90);
    check(&mut bench, &prompt, 20, choices);
}

#[test]
fn choices_that_may_leave_no_cache_share_their_prompt_all_the_same() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| settings.running_sequences_max = 2);
    let prompt = prompt(1, 50);
    let choices = bench.choices(&prompt, (5, 30), |work| work.origin.cache = CacheUse::Off);
    bench.run();
    assert_eq!(bench.prefilled(), 50);
    assert_eq!(bench.stats().models[0].kv_idle_bytes, 0, "nothing is left");
    check(&mut bench, &prompt, 30, choices);
}

#[test]
fn choices_that_end_with_their_first_token_need_no_slot() {
    let mut bench = Bench::new();
    let prompt = prompt(1, 50);
    let choices = bench.choices(&prompt, (4, 1), |_| {});
    bench.run();
    assert_eq!(bench.stats().counters.steps_total, 4, "those of the prompt, in chunks of 16");
    check(&mut bench, &prompt, 1, choices);
}

#[test]
fn a_caller_that_leaves_stops_all_its_choices() {
    for ticks in [1, 5, 9] {
        let mut bench =
            Bench::with(Fake::default(), 10_000_000, |settings| settings.running_sequences_max = 2);
        let choices = bench.choices(&prompt(1, 50), (5, 1000), |_| {});
        bench.ticks(ticks);
        drop(choices);
        let before = bench.stats().counters.steps_total;
        bench.run();
        let stats = bench.stats();
        assert_eq!(stats.counters.steps_total, before);
        assert_eq!(stats.counters.cancelled_total, 1);
        assert!(stats.models[0].slabs.iter().all(|class| class.slots_in_use == 0));
    }
}

#[test]
fn a_deadline_ends_all_choices_whether_they_have_begun_or_not() {
    for ticks in [1, 9] {
        let mut bench =
            Bench::with(Fake::default(), 10_000_000, |settings| settings.running_sequences_max = 2);
        let deadline = Some(Moment::at(Duration::from_secs(1)));
        let choices = bench.choices(&prompt(1, 50), (5, 1000), |work| work.origin.deadline = deadline);
        bench.ticks(ticks);
        *bench.clock.0.lock().unwrap() = Duration::from_secs(2);
        bench.run();
        for events in choices {
            assert_eq!(drain(events).end, Err(Error::Deadline));
        }
    }
}

#[test]
fn choices_count_in_the_queue_before_and_after_their_prompt() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| {
        (settings.running_sequences_max, settings.queue_length_max) = (1, 4);
    });
    let running = bench.submit(&[1], 1000);
    bench.ticks(2);
    let choices = bench.choices(&prompt(1, 50), (3, 30), |_| {});
    let one = bench.submit(&[2], 1);
    let refused = drain(bench.submit(&[3], 1)).end;
    assert!(
        matches!(refused, Err(Error::QueueFull { limit: "queue_length_max", value: 4, .. })),
        "{refused:?}"
    );
    drop(running);
    // The first choice runs; its others will wait.
    bench.ticks(2);
    let fits = bench.submit(&[4], 1);
    let refused = drain(bench.submit(&[5], 1)).end;
    assert!(matches!(refused, Err(Error::QueueFull { .. })), "{refused:?}");
    bench.run();
    assert!([one, fits].into_iter().all(|events| drain(events).end.is_ok()));
    check(&mut bench, &prompt(1, 50), 30, choices);
}

#[test]
fn choices_take_as_many_places_of_a_full_queue_as_they_need() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| {
        (settings.queue_length_max, settings.queue_length_per_client_max) = (8, 6);
    });
    let on =
        |connection| move |work: &mut GenerateWork| work.origin.owner.connection = ConnectionId(connection);
    let flood: Vec<Events> = (0..8).map(|_| bench.ask("a", Priority::Normal, 2, on(1))).collect();
    let more: Vec<Events> = (0..2).map(|_| bench.ask("b", Priority::Normal, 2, on(2))).collect();
    let choices = bench.choices(&prompt(1, 50), (3, 5), |work| {
        (work.origin.owner.connection, work.origin.owner.client) = (ConnectionId(3), "c".into());
    });
    bench.run();
    check(&mut bench, &prompt(1, 50), 5, choices);
    let is_ok = |events: Vec<Events>| -> Vec<bool> {
        events.into_iter().map(|events| drain(events).end.is_ok()).collect()
    };
    let expected = [true, true, true, false, false, false, false, false];
    assert_eq!((is_ok(flood), is_ok(more)), (expected.to_vec(), vec![true, true]));
}
