//! What a request gets, whoever else is there.

use super::*;
use crate::backend::fake::{CONTEXT, Faults, KV_BYTES, WEIGHT_BYTES};
use crate::prompt::MediaSpan;

#[test]
fn output_in_a_crowd_equals_output_alone() {
    let mut bench = Bench::new();
    let mut runs = Vec::new();
    for seed in 0..40 {
        let (prompt, tokens) = (prompt(seed, 1 + seed * 13 % 90), 1 + (seed * 17 % 50));
        runs.push((prompt.clone(), tokens, bench.submit(&prompt, tokens)));
        bench.ticks(seed as usize % 3);
    }
    bench.run();
    for (prompt, tokens, events) in runs {
        let outcome = drain(events);
        let expected = alone(&prompt, tokens as usize);
        assert_eq!(outcome.tokens, expected);
        assert_eq!(outcome.end.unwrap().tokens, expected);
    }
    let stats = bench.stats();
    assert_eq!(stats.counters.finished_total, 40);
    assert!(stats.models[0].slabs.iter().all(|class| class.slots_in_use == 0));
}

#[test]
fn output_goes_on_from_the_text_of_a_raw_prompt() {
    let mut bench = Bench::new();
    let prompt = prompt(1, 20);
    let (mut work, mut events) = bench.work(&prompt, 5);
    work.detokenizer = bench.tokenizer.detokenizer_after(&prompt);
    bench.engine.command(Command::Generate(Box::new(work)));
    bench.run();
    let (mut output, mut tokens) = (String::new(), prompt.clone());
    while let Ok(event) = events.try_recv() {
        if let GenerateEvent::Delta(delta) = event {
            output.push_str(&delta.text);
            tokens.extend(delta.tokens);
        }
    }
    let text = |tokens: &[u32]| bench.tokenizer.decode(tokens).unwrap();
    assert!(output.starts_with(' '), "{output:?}");
    assert_eq!(text(&prompt) + &output, text(&tokens));
}

#[test]
fn a_sequence_moves_to_a_larger_slot_when_it_outgrows_its_own() {
    let mut bench = Bench::new();
    let events = bench.submit(&[1, 2, 3], 1500);
    let other = bench.submit(&[4, 5], 400);
    bench.run();
    assert_eq!(drain(events).tokens, alone(&[1, 2, 3], 1500));
    assert_eq!(drain(other).tokens, alone(&[4, 5], 400));
}

#[test]
fn the_next_turn_finds_all_but_the_last_token() {
    let mut bench = Bench::new();
    let first = bench.submit(&prompt(1, 50), 10);
    bench.run();
    let mut context = prompt(1, 50);
    context.extend(drain(first).tokens);
    let before = bench.stats().counters.prefill_tokens_total;
    context.extend([7, 8, 9]);
    let second = bench.submit(&context, 5);
    bench.run();
    let outcome = drain(second);
    assert_eq!(outcome.cached, 59);
    assert_eq!(outcome.tokens, alone(&context, 5));
    assert_eq!(bench.stats().counters.prefill_tokens_total - before, 4);
}

#[test]
fn recurrent_states_are_saved_where_messages_end() {
    let mut fake = Fake::default();
    fake.state_bytes = 50;
    let mut bench = Bench::with(fake, 10_000_000, |_| {});
    // Three messages of 30 tokens, each begun by a control token.
    let message = |number: u32| {
        let words = (1..30).map(move |word| CONTROL_TOKENS + number * 40 + word);
        std::iter::once(number).chain(words)
    };
    let first: Vec<u32> = (1..4).flat_map(message).collect();
    let run = |bench: &mut Bench, tokens: &[u32]| {
        let events = bench.submit(tokens, 5);
        bench.run();
        let outcome = drain(events);
        assert_eq!(outcome.tokens, alone(tokens, 5));
        (outcome.cached, outcome.tokens)
    };
    let (_, answer) = run(&mut bench, &first);
    let next = [first.clone(), answer, vec![7, 8]].concat();
    assert_eq!(run(&mut bench, &next).0, 94, "its end");
    assert_eq!(run(&mut bench, &first).0, 60, "one token has to run, so it begins at a message");
    let other: Vec<u32> = message(1).chain(message(9)).collect();
    assert_eq!(run(&mut bench, &other).0, 30, "what both begin with");
    assert_eq!(bench.stats().models[0].kv_reserved_bytes, 0);
}

#[test]
fn forks_share_what_they_have_in_common_in_any_order() {
    let mut bench = Bench::new();
    let first = bench.submit(&prompt(1, 40), 8);
    bench.run();
    let mut base = prompt(1, 40);
    base.extend(drain(first).tokens);
    let branches: Vec<Vec<u32>> = (0..3).map(|branch| [base.clone(), vec![branch, 5]].concat()).collect();
    let runs: Vec<Events> = branches.iter().map(|branch| bench.submit(branch, 6)).collect();
    bench.run();
    for (branch, events) in branches.iter().zip(runs) {
        let outcome = drain(events);
        assert_eq!((outcome.cached, outcome.tokens), (47, alone(branch, 6)));
    }
}

#[test]
fn caches_are_not_shared_between_principals() {
    let mut bench = Bench::new();
    let first = bench.submit(&prompt(1, 40), 1);
    bench.run();
    drain(first);
    let (mut work, events) = bench.work(&prompt(1, 40), 1);
    work.origin.owner.principal = "other".into();
    bench.engine.command(Command::Generate(Box::new(work)));
    bench.run();
    assert_eq!(drain(events).cached, 0);
}

#[test]
fn a_cache_of_other_media_is_used_up_to_it() {
    let mut bench = Bench::new();
    let mut run = |hash: u8| {
        let (mut work, events) = bench.work(&prompt(1, 40), 1);
        work.prompt.media = [MediaSpan { at: 10, len: 20, hash: [hash; 32] }].into();
        bench.engine.command(Command::Generate(Box::new(work)));
        bench.run();
        drain(events).cached
    };
    assert_eq!([run(1), run(1), run(2), run(1)], [0, 39, 10, 39]);
}

#[test]
fn a_forgotten_session_leaves_no_cache() {
    let mut bench = Bench::new();
    let session = SessionKey { owner: "p".into(), name: "s".into() };
    let (mut work, events) = bench.work(&prompt(1, 40), 1);
    work.origin.session = Some(session.clone());
    bench.engine.command(Command::Generate(Box::new(work)));
    bench.run();
    drain(events);
    assert_eq!(bench.stats().models[0].kv_idle_bytes, 40 * KV_BYTES);
    bench.engine.command(Command::Forget(session));
    assert_eq!(bench.stats().models[0].kv_idle_bytes, 0);
}

#[test]
fn a_caller_that_leaves_costs_no_further_step() {
    let mut bench = Bench::new();
    let decoding = bench.submit(&[1, 2, 3], 1000);
    let prefilling = bench.submit(&prompt(2, 4000), 10);
    bench.ticks(5);
    let before = bench.stats();
    drop((decoding, prefilling));
    bench.run();
    let after = bench.stats();
    assert_eq!(after.counters.steps_total, before.counters.steps_total);
    assert_eq!(after.counters.cancelled_total, 2);
    assert!(after.models[0].slabs.iter().all(|class| class.slots_in_use == 0));
}

#[test]
fn a_deadline_ends_what_runs_and_what_waits() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| settings.running_sequences_max = 1);
    let mut runs = vec![];
    for _ in 0..2 {
        let (mut work, events) = bench.work(&[1, 2], 1000);
        work.origin.deadline = Some(Moment::at(Duration::from_secs(1)));
        bench.engine.command(Command::Generate(Box::new(work)));
        runs.push(events);
    }
    bench.ticks(3);
    *bench.clock.0.lock().unwrap() = Duration::from_secs(2);
    bench.run();
    for events in runs {
        assert_eq!(drain(events).end, Err(Error::Deadline));
    }
}

#[test]
fn logits_that_are_not_finite_end_that_sequence_alone() {
    let mut bench =
        Bench::with(Fake::with(Faults { poison: Some(999), ..Faults::default() }), 10_000_000, |_| {});
    let fine = bench.submit(&[1, 2], 5);
    let poisoned = bench.submit(&[1, 999], 5);
    bench.run();
    assert_eq!(drain(poisoned).end, Err(Error::NonFiniteLogits));
    assert_eq!(drain(fine).tokens, alone(&[1, 2], 5));
    assert_eq!(bench.stats().models[0].kv_idle_bytes, 6 * KV_BYTES, "a poisoned cache is not parked");
}

#[test]
fn a_device_error_ends_the_model_and_a_new_load_serves_again() {
    let mut bench =
        Bench::with(Fake::with(Faults { error_at: Some(6), ..Faults::default() }), 10_000_000, |_| {});
    let events = bench.submit(&[1, 2], 50);
    let (late, refused) = bench.work(&[1], 1);
    bench.run();
    assert!(matches!(drain(events).end, Err(Error::Internal(_))));
    assert!(bench.stats().models.is_empty());
    bench.load();
    // Its lease is of the model that was lost.
    bench.engine.command(Command::Generate(Box::new(late)));
    assert_eq!(drain(refused).end, Err(Error::ModelUnloaded("m".into())));
    let again = bench.submit(&[1], 3);
    bench.run();
    assert_eq!(drain(again).tokens, alone(&[1], 3));
}

#[test]
fn a_full_queue_refuses_with_its_limit() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| settings.queue_length_max = 1);
    let waiting = bench.submit(&[1], 1);
    let refused = bench.submit(&[2], 1);
    assert!(matches!(drain(refused).end, Err(Error::QueueFull { limit: "queue_length_max", value: 1, .. })));
    bench.run();
    assert!(drain(waiting).end.is_ok());
}

#[test]
fn what_can_never_fit_is_refused_and_what_fits_later_waits() {
    let room = WEIGHT_BYTES + 300 * KV_BYTES;
    let mut bench = Bench::with(Fake::default(), room, |_| {});
    let never = bench.submit(&[1], 1000);
    let runs: Vec<Events> = (0..3).map(|seed| bench.submit(&prompt(seed, 20), 30)).collect();
    bench.run();
    let refusal = drain(never).end;
    assert!(
        matches!(refusal, Err(Error::KvTooLarge { available_bytes, .. }) if available_bytes == 300 * KV_BYTES)
    );
    for (seed, events) in (0..3).zip(runs) {
        assert_eq!(drain(events).tokens, alone(&prompt(seed, 20), 30));
    }
    let held = bench.stats().models[0].clone();
    assert!(held.kv_slab_bytes + held.kv_idle_bytes <= 300 * KV_BYTES);
}

#[test]
fn a_model_that_needs_room_gets_what_another_caches() {
    let mut bench = Bench::with(Fake::default(), 2 * WEIGHT_BYTES + 300 * KV_BYTES, |_| {});
    let (sender, _events) = mpsc::channel(8);
    bench.engine.command(Command::Load(LoadWork::new(spec("other"), sender)));
    bench.run();
    let first = bench.submit(&[1, 2, 3], 5);
    bench.run();
    drain(first);
    let (work, events) = bench.work(&[4, 5], 5);
    let model = bench.lease("other");
    bench.engine.command(Command::Generate(Box::new(GenerateWork { model, ..work })));
    bench.run();
    assert_eq!(drain(events).tokens, alone(&[4, 5], 5));
}

#[test]
fn a_score_has_an_entry_for_each_token_but_the_first() {
    let mut bench = Bench::new();
    let (reply, mut answer) = oneshot::channel();
    let work = ScoreWork {
        origin: bench.origin("c"),
        model: bench.lease("m"),
        prompt: prompt(3, 300).into(),
        score_from: 0,
        top_logprobs: 0,
        keep_alive: None,
        reply,
    };
    bench.engine.command(Command::Score(Box::new(work)));
    bench.run();
    let scored = answer.try_recv().unwrap().unwrap();
    assert_eq!((scored.scores.len(), scored.cached_tokens), (300, 0));
    assert!(scored.scores[0].is_none());
    let tokens: Vec<u32> = scored.scores.iter().flatten().map(|score| score.chosen.0).collect();
    assert_eq!(tokens, prompt(3, 300)[1..]);
}

#[test]
fn a_busy_model_is_not_unloaded() {
    let mut bench = Bench::new();
    let events = bench.submit(&[1], 5);
    let unload = |bench: &mut Bench| {
        let (reply, mut answer) = oneshot::channel();
        bench.engine.command(Command::Unload("m".into(), reply));
        answer.try_recv().unwrap()
    };
    assert!(matches!(unload(&mut bench), Err(Error::ModelBusy { running: 1, .. })));
    bench.run();
    drain(events);
    assert!(unload(&mut bench).unwrap() >= WEIGHT_BYTES);
    assert!(matches!(unload(&mut bench), Err(Error::ModelNotLoaded(_))));
    assert!(matches!(bench.load().last(), Some(LoadEvent::Loaded(..))));
}

#[test]
fn draining_refuses_new_work_and_lets_running_work_end() {
    let mut bench = Bench::new();
    let running = bench.submit(&[1], 20);
    let (reply, mut answer) = oneshot::channel();
    bench.engine.command(Command::Drain(Duration::from_secs(9), reply));
    let refused = bench.submit(&[2], 1);
    bench.run();
    assert_eq!(answer.try_recv(), Ok(()));
    assert_eq!(drain(refused).end, Err(Error::Draining));
    assert_eq!(drain(running).tokens.len(), 20);
}

#[test]
fn output_ends_at_the_context() {
    let mut bench = Bench::new();
    let events = bench.submit(&prompt(1, CONTEXT - 3), 3);
    bench.run();
    assert_eq!(drain(events).tokens.len(), 3);
}

#[test]
fn the_handle_learns_of_a_panic() {
    let fake = Fake::with(Faults { panic_at: Some(1), ..Faults::default() });
    let make = move || Ok((fake, Fake::info()));
    let residency =
        ResidencySettings { memory_budget_bytes: Some(1_000_000), ..ResidencySettings::default() };
    let (handle, thread) = start(settings(), residency, Arc::new(HandClock::default()), make).unwrap();
    assert!(handle.is_alive());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut events = runtime.block_on(handle.load(spec("m"), Stay::default())).unwrap();
    // The warming run is the first step.
    while events.blocking_recv().is_some() {}
    assert!(thread.join().is_err());
    assert!(!handle.is_alive());
    assert_eq!(runtime.block_on(handle.load(spec("m"), Stay::default())).map(drop), Err(Error::EngineDead));
}

#[test]
fn a_reader_that_stalls_holds_its_model_no_longer_than_the_limit() {
    let mut bench = Bench::new();
    let unload = |bench: &mut Bench| {
        let (reply, mut answer) = oneshot::channel();
        bench.engine.command(Command::Unload("m".into(), reply));
        answer.try_recv().unwrap()
    };
    let (work, _) = bench.work(&[1, 2], 400);
    let (events, mut unread) = mpsc::channel(4);
    bench.engine.command(Command::Generate(Box::new(GenerateWork { events, ..work })));
    bench.ticks(300);
    assert_eq!(unload(&mut bench), Err(Error::ModelBusy { model: "m".into(), running: 1 }));
    *bench.clock.0.lock().unwrap() += settings().slow_reader;
    bench.ticks(1);
    assert!(unload(&mut bench).is_ok(), "an unread end holds nothing");
    let end = std::iter::from_fn(|| unread.try_recv().ok()).last();
    let limit = settings().slow_reader;
    assert!(
        matches!(end, Some(GenerateEvent::Ended(Err(Error::SlowReader { limit: told }))) if told == limit)
    );
}

#[test]
fn the_end_of_a_load_that_nobody_reads_holds_nothing() {
    let mut bench = Bench::new();
    let (sender, mut unread) = mpsc::channel(8);
    bench.engine.command(Command::Load(LoadWork::new(spec("m"), sender)));
    let (reply, mut answer) = oneshot::channel();
    bench.engine.command(Command::Unload("m".into(), reply));
    assert_eq!(answer.try_recv().unwrap(), Ok(WEIGHT_BYTES));
    let Ok(LoadEvent::Loaded(_, door, None)) = unread.try_recv() else { panic!("the model was resident") };
    assert!(door.lease().is_none());
}

#[test]
fn a_model_with_a_lease_is_not_unloaded() {
    let mut bench = Bench::new();
    let lease = bench.lease("m");
    let unload = |bench: &mut Bench| {
        let (reply, mut answer) = oneshot::channel();
        bench.engine.command(Command::Unload("m".into(), reply));
        answer.try_recv().unwrap()
    };
    assert_eq!(unload(&mut bench), Err(Error::ModelBusy { model: "m".into(), running: 1 }));
    assert!(bench.engine.table().borrow().lease(&"m".into()).is_some(), "it can be used meanwhile");
    drop(lease);
    assert_eq!(unload(&mut bench), Ok(WEIGHT_BYTES));
    assert_eq!(bench.engine.table().borrow().state(&"m".into()), ModelState::Available);
}

#[test]
fn a_deleted_sessions_turn_ends_and_leaves_no_cache() {
    let mut bench = Bench::new();
    let (deleted, watch) = tokio::sync::watch::channel(false);
    let (working, mut ended) = mpsc::channel(1);
    let (mut work, events) = bench.work(&prompt(1, 40), 100);
    work.origin.turn = Some(TurnTie { deleted: watch, working });
    bench.engine.command(Command::Generate(Box::new(work)));
    bench.ticks(8);
    assert!(ended.try_recv().is_err_and(|error| error == mpsc::error::TryRecvError::Empty));
    // Nobody reads, and nobody has left.
    deleted.send_replace(true);
    bench.run();
    assert!(ended.try_recv().is_err_and(|error| error == mpsc::error::TryRecvError::Disconnected));
    assert!(matches!(drain(events).end, Err(Error::Cancelled(why)) if why.contains("session")));
    let again = bench.submit(&prompt(1, 40), 1);
    bench.run();
    assert_eq!(drain(again).cached, 0);
}
