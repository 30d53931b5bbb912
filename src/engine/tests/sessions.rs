//! What sessions ask of the engine besides generations: contexts that are only computed, pins, and what is
//! cached.

use super::*;
use crate::backend::fake::{Faults, KV_BYTES};
use crate::engine::{CachedAsk, CachedKv, Salt};

pub(super) fn session(name: &str) -> SessionKey {
    SessionKey { owner: "p".into(), name: name.into() }
}

impl Bench {
    /// Runs a request of a session.
    pub(super) fn run_in(&mut self, name: &str, pinned: bool, tokens: &[u32], max_tokens: u32) -> Outcome {
        let (mut work, events) = self.work(tokens, max_tokens);
        (work.origin.session, work.origin.pinned) = (Some(session(name)), pinned);
        self.engine.command(Command::Generate(Box::new(work)));
        self.run();
        drain(events)
    }

    pub(super) fn found(&mut self, model: &str, owner: &str, tokens: &[u32]) -> CachedKv {
        let (model, salt) = (model.into(), Salt::default());
        let asked = CachedAsk { model, owner: owner.into(), salt, tokens: tokens.into() };
        let (reply, mut answer) = oneshot::channel();
        self.engine.command(Command::Cached(vec![asked], reply));
        answer.try_recv().unwrap()[0]
    }
}

#[test]
fn a_context_that_is_only_computed_is_found_whole_by_the_next_turn() {
    for state_bytes in [0, 50] {
        let mut fake = Fake::default();
        fake.state_bytes = state_bytes;
        let mut bench = Bench::with(fake, 10_000_000, |settings| settings.prefill_chunk_tokens = 64);
        let context = prompt(1, 300);
        let only = bench.run_in("s", false, &context, 0);
        let end = only.end.unwrap();
        assert_eq!((end.finish, end.tokens.len(), only.tokens.len(), only.cached), (Finish::Length, 0, 0, 0));
        assert_eq!(bench.stats().counters.decode_tokens_total, 0);
        assert_eq!(bench.found("m", "p", &context).tokens, 300);
        let turn = [&context[..], &[7]].concat();
        let next = bench.run_in("s", false, &turn, 5);
        assert_eq!((next.cached, next.tokens), (300, alone(&turn, 5)));
    }
}

#[test]
fn contexts_share_steps_and_limits_with_everybody_else() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| settings.running_sequences_max = 1);
    let stream = bench.submit(&prompt(1, 20), 30);
    let (work, context) = bench.work(&prompt(2, 200), 0);
    bench.engine.command(Command::Generate(Box::new(work)));
    bench.run();
    assert_eq!(drain(stream).tokens, alone(&prompt(1, 20), 30));
    assert!(drain(context).end.is_ok());
    // A caller who leaves ends it.
    let left = bench.submit(&prompt(3, 4000), 0);
    bench.ticks(2);
    let before = bench.stats().counters.prefill_tokens_total;
    drop(left);
    bench.run();
    // The step that was running when he left.
    assert!(bench.stats().counters.prefill_tokens_total - before <= 512);
    assert_eq!(bench.stats().counters.cancelled_total, 1);
}

#[test]
fn a_context_without_finite_logits_is_not_kept() {
    let faults = Faults { poison: Some(999), ..Faults::default() };
    let mut bench = Bench::with(Fake::with(faults), 10_000_000, |_| {});
    let outcome = bench.run_in("s", false, &[&prompt(1, 20)[..], &[999]].concat(), 0);
    assert_eq!(outcome.end, Err(Error::NonFiniteLogits));
    assert_eq!(bench.stats().models[0].kv_idle_bytes, 0);
}

#[test]
fn what_is_cached_is_told_to_its_owner_alone() {
    let mut bench = Bench::new();
    let tokens = prompt(1, 40);
    bench.run_in("s", false, &tokens, 0);
    let found = CachedKv { tokens: 40, bytes: 40 * KV_BYTES };
    assert_eq!(bench.found("m", "p", &[&tokens[..], &[5, 6]].concat()), found);
    assert_eq!(bench.found("m", "p", &tokens[..10]).tokens, 10);
    for (model, owner) in [("m", "other"), ("other", "p")] {
        assert_eq!(bench.found(model, owner, &tokens), CachedKv::default());
    }
    assert_eq!(bench.found("m", "p", &[]), CachedKv::default());
}

#[test]
fn a_pinned_sessions_cache_outlasts_those_that_were_used_later() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| settings.kv_idle_caches_max = 2);
    let of = |seed| prompt(seed, 40);
    bench.run_in("pinned", true, &of(1), 0);
    bench.run_in("s", false, &of(2), 0);
    drop(bench.submit(&of(3), 1));
    bench.run();
    bench.run_in("t", false, &of(4), 0);
    let cached = |bench: &mut Bench, seed| bench.found("m", "p", &of(seed)).tokens > 0;
    assert!(cached(&mut bench, 1) && cached(&mut bench, 4));
    assert!(!cached(&mut bench, 2));
    // It is unpinned while a turn of another runs, which is pinned meanwhile.
    let (mut work, events) = bench.work(&of(5), 3);
    work.origin.session = Some(session("u"));
    bench.engine.command(Command::Generate(Box::new(work)));
    bench.ticks(2);
    bench.engine.command(Command::PinSession(session("u"), true));
    bench.engine.command(Command::PinSession(session("pinned"), false));
    bench.run();
    assert!(drain(events).end.is_ok());
    for seed in 6..9 {
        bench.run_in("v", false, &of(seed), 0);
    }
    assert!(cached(&mut bench, 5) && !cached(&mut bench, 1));
}
