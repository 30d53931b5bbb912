//! Which caches are there for a later request, and which bytes are freed first.

use super::*;
use crate::backend::fake::{KV_BYTES, WEIGHT_BYTES};

#[test]
fn a_raw_prompt_of_a_recurrent_model_is_found_when_it_is_sent_again() {
    let mut fake = Fake::default();
    fake.state_bytes = 50;
    let mut bench = Bench::with(fake, 10_000_000, |_| {});
    let raw: Vec<u32> = (0..300).map(|place| CONTROL_TOKENS + place * 7 % 800).collect();
    // Its caller leaves once it has been prefilled.
    let first = bench.submit(&raw, 100);
    while bench.stats().counters.decode_tokens_total == 0 {
        bench.ticks(1);
    }
    drop(first);
    bench.run();
    let run = |bench: &mut Bench, tokens: &[u32]| {
        let events = bench.submit(tokens, 5);
        bench.run();
        let outcome = drain(events);
        assert_eq!(outcome.tokens, alone(tokens, 5));
        outcome.cached
    };
    assert_eq!(run(&mut bench, &raw), 299, "sent again");
    assert_eq!(run(&mut bench, &raw), 299, "and again");
    assert_eq!(run(&mut bench, &[&raw[..], &[CONTROL_TOKENS]].concat()), 299, "continued otherwise");
    assert_eq!(run(&mut bench, &raw[..250]), 0, "not saved there");
}

#[test]
fn a_turn_finds_its_cache_though_an_empty_slab_fills_the_budget() {
    let room = 1000 * KV_BYTES;
    let mut bench = Bench::with(Fake::default(), WEIGHT_BYTES + room, |_| {});
    bench.engine.backend.kv_bytes_peak = 0;
    // Three at once open a slab of three slots; the last one leaves it empty.
    let long = bench.submit(&prompt(9, 200), 40);
    let short: Vec<Events> = (0..2).map(|seed| bench.submit(&prompt(seed, 20), 5)).collect();
    bench.run();
    drop(short);
    let context = [prompt(9, 200), drain(long).tokens].concat();
    let next = bench.submit(&context, 5);
    bench.run();
    assert_eq!(drain(next).cached, 239);
    let peak = bench.engine.backend.kv_bytes_peak;
    assert!(peak <= room, "parking holds {peak} of {room} bytes");
}

#[test]
fn empty_slabs_of_all_models_go_before_any_cache() {
    let room = 900 * KV_BYTES;
    let mut bench = Bench::with(Fake::default(), 2 * WEIGHT_BYTES + room, |settings| {
        settings.kv_idle_bytes_max = Some(room);
    });
    let (sender, _events) = mpsc::channel(8);
    bench.engine.command(Command::Load(LoadWork::new(spec("other"), sender)));
    bench.run();
    let other = |bench: &mut Bench, tokens: &[u32], max_tokens| {
        let (work, events) = bench.work(tokens, max_tokens);
        let model = bench.lease("other");
        bench.engine.command(Command::Generate(Box::new(GenerateWork { model, ..work })));
        bench.run();
        drain(events)
    };
    let first = bench.submit(&prompt(1, 100), 20);
    bench.run();
    drain(first);
    other(&mut bench, &prompt(2, 100), 20);
    // Both have an empty slab of 256 tokens and a cache of 119: one slab has to go for a slot of 512.
    let answer = other(&mut bench, &prompt(3, 300), 20);
    assert_eq!(answer.tokens, alone(&prompt(3, 300), 20));
    assert_eq!(other(&mut bench, &prompt(2, 100), 1).cached, 99);
    let again = bench.submit(&prompt(1, 100), 1);
    bench.run();
    assert_eq!(drain(again).cached, 99);
}

#[test]
fn parked_caches_are_bounded_in_number() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| settings.kv_idle_caches_max = 3);
    let run = |bench: &mut Bench, seed| {
        let events = bench.submit(&prompt(seed, 40), 1);
        bench.run();
        *bench.clock.0.lock().unwrap() += Duration::from_secs(1);
        drain(events).cached
    };
    assert!((0..5).all(|seed| run(&mut bench, seed) == 0));
    assert_eq!(bench.engine.backend.parked(), 3);
    assert_eq!([run(&mut bench, 4), run(&mut bench, 2), run(&mut bench, 0)], [39, 39, 0]);
}

/// Runs a prompt to its end; returns it with the answer, and how much of it was cached.
fn turn(bench: &mut Bench, prompt: &[u32]) -> (Vec<u32>, u32) {
    let events = bench.submit(prompt, 5);
    bench.run();
    *bench.clock.0.lock().unwrap() += Duration::from_secs(1);
    let outcome = drain(events);
    assert_eq!(outcome.tokens, alone(prompt, 5));
    ([prompt, &outcome.tokens].concat(), outcome.cached)
}

#[test]
fn a_turn_copies_its_new_tokens_only() {
    for state_bytes in [0, 50] {
        let mut fake = Fake::default();
        fake.state_bytes = state_bytes;
        let mut bench = Bench::with(fake, 10_000_000, |_| {});
        let (mut context, _) = turn(&mut bench, &prompt(1, 200));
        assert_eq!(bench.engine.backend.parked_tokens, 204);
        for seed in 2..5 {
            context.extend(prompt(seed, 10));
            let (longer, cached) = turn(&mut bench, &context);
            assert_eq!(cached as usize, context.len() - 11);
            context = longer;
        }
        let Fake { parked_tokens, restored_tokens, .. } = bench.engine.backend;
        // Ends of 15 and 30 tokens are copied together.
        assert_eq!((parked_tokens, restored_tokens), (204 + 15 + 30 + 15, 0));
        // Once somebody else had the slot, all is copied back.
        turn(&mut bench, &prompt(9, 20));
        context.extend(prompt(5, 10));
        turn(&mut bench, &context);
        assert_eq!(bench.engine.backend.restored_tokens, context.len() as u64 - 11);
    }
}

#[test]
fn forks_of_a_session_find_what_its_slot_has_and_share_it() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |_| {});
    let (context, _) = turn(&mut bench, &prompt(1, 200));
    let forks: Vec<Vec<u32>> = (2..10).map(|seed| [&context[..], &prompt(seed, 10)].concat()).collect();
    let running: Vec<Events> = forks.iter().map(|fork| bench.submit(fork, 5)).collect();
    bench.run();
    for (fork, events) in forks.iter().zip(running) {
        let outcome = drain(events);
        assert_eq!((outcome.cached, outcome.tokens), (204, alone(fork, 5)));
    }
    assert_eq!(bench.stats().models[0].kv_idle_bytes, (204 + 8 * 15) * KV_BYTES);
    // Whoever comes next, in which order ever, finds his own.
    for fork in forks.iter().rev() {
        let (_, cached) = turn(&mut bench, &[&fork[..], &alone(fork, 5), &[7]].concat());
        assert_eq!(cached as usize, fork.len() + 4);
    }
}

#[test]
fn a_prompt_that_is_edited_shares_what_stands_before_it() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |_| {});
    let (context, _) = turn(&mut bench, &prompt(1, 200));
    let edited = [&context[..100], &prompt(2, 60)].concat();
    let (longer, cached) = turn(&mut bench, &edited);
    assert_eq!(cached, 100);
    assert_eq!(bench.stats().models[0].kv_idle_bytes, (204 + 64) * KV_BYTES);
    // Both are there.
    assert_eq!(turn(&mut bench, &[&context[..], &[7]].concat()).1, 204);
    assert_eq!(turn(&mut bench, &[&longer[..], &[7]].concat()).1, 164);
}

/// Returns a bench with a parked cache of 204 tokens, and room for `tokens` besides two slots of 256.
fn with_a_cache_and_room_for(tokens: u64) -> (Bench, Vec<u32>) {
    let room = (512 + 204 + tokens) * KV_BYTES;
    let mut bench = Bench::with(Fake::default(), WEIGHT_BYTES + room, |settings| {
        settings.kv_idle_bytes_max = Some(room);
    });
    let (context, _) = turn(&mut bench, &prompt(1, 200));
    bench.engine.rest();
    (bench, context)
}

/// Runs a context with `own` tokens after the first 100, while another sequence has the slab's other slot.
/// Returns it with its answer, and how many tokens were copied for its cache.
fn edit(bench: &mut Bench, context: &[u32], own: u32) -> (Vec<u32>, u64) {
    let before = bench.engine.backend.parked_tokens;
    let edited = [&context[..100], &prompt(2, own)].concat();
    let beside = bench.submit(&prompt(9, 20), 150);
    let events = bench.submit(&edited, 5);
    bench.ticks(100);
    let outcome = drain(events);
    assert_eq!(outcome.tokens, alone(&edited, 5));
    let copied = bench.engine.backend.parked_tokens - before;
    drop(beside);
    bench.run();
    ([&edited[..], &outcome.tokens].concat(), copied)
}

fn cached_of(bench: &mut Bench, context: &[u32]) -> u32 {
    turn(bench, &[context, &[7]].concat()).1
}

#[test]
fn a_cut_that_the_device_does_not_make_costs_no_more_than_what_it_would_share() {
    let (mut bench, context) = with_a_cache_and_room_for(1000);
    bench.engine.backend.faults.splitting_fails = true;
    let (edited, copied) = edit(&mut bench, &context, 60);
    assert_eq!(copied, 164);
    assert_eq!((cached_of(&mut bench, &edited), cached_of(&mut bench, &context)), (164, 204));
}

#[test]
fn nothing_is_cut_for_a_cache_that_has_no_room() {
    let (mut bench, context) = with_a_cache_and_room_for(10);
    assert_eq!(edit(&mut bench, &context, 120).1, 0);
    assert_eq!(cached_of(&mut bench, &context), 204);
}

#[test]
fn a_cut_takes_no_more_than_the_budget_has_for_the_moment() {
    let (mut bench, context) = with_a_cache_and_room_for(170);
    bench.engine.backend.kv_bytes_peak = 0;
    let (edited, copied) = edit(&mut bench, &context, 60);
    let peak = bench.engine.backend.kv_bytes_peak;
    assert!(peak <= (512 + 204 + 170) * KV_BYTES, "{peak}");
    assert_eq!(copied, 164, "it shares nothing");
    assert_eq!((cached_of(&mut bench, &edited), cached_of(&mut bench, &context)), (164, 204));
}

#[test]
fn a_cache_that_shares_a_part_of_another_one_may_take_the_room_of_the_rest() {
    let (mut bench, context) = with_a_cache_and_room_for(10);
    let (edited, _) = edit(&mut bench, &context, 60);
    assert_eq!(cached_of(&mut bench, &edited), 164);
}

/// Lets a session leave something in a slot of a slab that another sequence uses.
fn left_beside_another() -> (Bench, Events, SessionKey) {
    let mut bench = Bench::new();
    let session = SessionKey { owner: "p".into(), name: "s".into() };
    let stays = bench.submit(&prompt(9, 20), 200);
    let (mut work, leaves) = bench.work(&prompt(1, 100), 5);
    work.origin.session = Some(session.clone());
    bench.engine.command(Command::Generate(Box::new(work)));
    bench.ticks(30);
    drain(leaves);
    assert_eq!(bench.engine.backend.cleared_tokens, 0);
    (bench, stays, session)
}

#[test]
fn what_a_deleted_session_left_in_a_slot_is_cleared() {
    let (mut bench, _stays, session) = left_beside_another();
    bench.engine.command(Command::Forget(session));
    bench.ticks(1);
    assert_eq!(bench.engine.backend.cleared_tokens, 104);
}

#[test]
fn a_slots_next_owner_does_not_wait_for_what_was_left_long_ago() {
    let (mut bench, _stays, _session) = left_beside_another();
    bench.pass(Duration::from_secs(4));
    bench.ticks(1);
    assert_eq!(bench.engine.backend.cleared_tokens, 0, "its session may go on yet");
    bench.pass(Duration::from_secs(1));
    bench.ticks(1);
    assert_eq!(bench.engine.backend.cleared_tokens, 104);
    let (mut work, events) = bench.work(&prompt(3, 20), 5);
    work.origin.owner.principal = "q".into();
    bench.engine.command(Command::Generate(Box::new(work)));
    bench.ticks(20);
    assert_eq!(drain(events).tokens, alone(&prompt(3, 20), 5));
    assert_eq!(bench.engine.backend.cleared_tokens, 104);
}
