//! Caches of sessions that leave the engine to be saved, and come back.

use super::sessions::session;
use super::*;
use crate::backend::fake::{KV_BYTES, WEIGHT_BYTES};
use crate::engine::{AdoptWork, CachedAsk, ExportAsk, KvCopy, KvOutbox, KvRoom, KvSegment, RoomAsk};

/// Time that a token takes to prefill: far longer than writing its few bytes.
const TOKEN: Duration = Duration::from_millis(1);

/// A bench that hands caches over, and where they arrive.
fn saving(budget: u64, state_bytes: u64, change: impl Fn(&mut EngineSettings)) -> (Bench, Evicted) {
    let mut fake = Fake::default();
    fake.state_bytes = state_bytes;
    let mut bench = Bench::with(fake, budget, |settings| {
        settings.prefill_chunk_tokens = 512;
        change(settings);
    });
    let clock = Arc::clone(&bench.clock);
    bench.engine.backend.pass =
        Some(Box::new(move |prefilled, _| *clock.0.lock().unwrap() += TOKEN / 10 + TOKEN * prefilled));
    let (copies, evicted) = mpsc::channel(4);
    bench.engine.command(Command::SaveEvicted(KvOutbox { copies, hurry: Arc::default() }));
    (bench, evicted)
}

/// Lets parked caches have all of the budget.
fn all_idle(settings: &mut EngineSettings) {
    settings.kv_idle_bytes_max = Some(u64::MAX);
}

type Evicted = mpsc::Receiver<KvCopy>;

fn ask(tokens: &[u32]) -> CachedAsk {
    CachedAsk { model: "m".into(), owner: "p".into(), salt: Salt::default(), tokens: tokens.into() }
}

impl Bench {
    fn export(&mut self, tokens: &[u32], if_worth: bool) -> Result<Option<KvCopy>, Error> {
        let (reply, mut answer) = oneshot::channel();
        self.engine.command(Command::Export(Box::new(ExportAsk { of: ask(tokens), if_worth }), reply));
        answer.try_recv().unwrap()
    }

    fn adopt(
        &mut self,
        name: &str,
        tokens: &[u32],
        from: u32,
        segments: Vec<KvSegment>,
    ) -> Result<u64, Error> {
        let read = from..segments.last().map_or(from, |last| last.tokens.end);
        let work = AdoptWork {
            model: self.lease("m"),
            owner: "p".into(),
            salt: Salt::default(),
            session: session(name),
            pinned: false,
            tokens: tokens[..read.end as usize].into(),
            read,
            segments,
            charge: self.engine.saving.charge(0),
        };
        let (reply, mut answer) = oneshot::channel();
        self.engine.command(Command::Adopt(Box::new(work), reply));
        answer.try_recv().unwrap()
    }

    fn unload(&mut self) {
        let (reply, mut answer) = oneshot::channel();
        self.engine.command(Command::Unload("m".into(), reply));
        answer.try_recv().unwrap().unwrap();
    }

    fn in_flight(&mut self) -> u64 {
        self.stats().snapshot_bytes
    }
}

#[test]
fn caches_of_sessions_outlive_their_model_and_the_next_turn_computes_only_what_is_new() {
    for state_bytes in [0, 50] {
        let (mut bench, mut evicted) = saving(10_000_000, state_bytes, |_| {});
        let (first, other) = (prompt(1, 300), prompt(2, 200));
        let turn = [&first[..], &bench.run_in("s", false, &first, 5).tokens, &[7]].concat();
        bench.run_in("", false, &other, 5);
        bench.unload();
        let copies: Vec<KvCopy> = std::iter::from_fn(|| evicted.try_recv().ok()).collect();
        let names: Vec<_> = copies.iter().map(|copy| copy.session.clone().unwrap().name).collect();
        assert_eq!(names, ["".into(), "s".into()], "the last used first");
        assert_eq!(*copies[1].tokens(), turn[..304]);
        bench.load();
        let mut copies = copies.into_iter().skip(1);
        let (segments, _charge) = copies.next().unwrap().into_parts();
        assert_eq!(bench.found("m", "p", &turn).tokens, 0);
        bench.adopt("s", &turn, 0, segments).unwrap();
        let next = bench.run_in("s", false, &turn, 5);
        assert_eq!((next.cached, &next.tokens), (304, &alone(&turn, 5)), "{state_bytes}");
    }
}

#[test]
fn the_caches_of_other_weights_under_the_same_name_and_revision_are_others() {
    let (mut bench, mut evicted) = saving(10_000_000, 0, |_| {});
    let mut computes = |content| {
        bench.unload();
        bench.engine.backend.content = content;
        bench.load();
        bench.run_in("s", false, &prompt(1, 300), 5);
        let copy = bench.export(&prompt(1, 300), false).unwrap().unwrap();
        drop(evicted.try_recv());
        (copy.facts.revision, copy.facts.computes)
    };
    let (first, other, again) = (computes(1), computes(2), computes(1));
    assert_eq!((&first.0, &first), (&other.0, &again));
    assert_ne!(first.1, other.1);
}

#[test]
fn what_waits_to_be_written_is_charged_until_it_is_given_back() {
    let (mut bench, mut evicted) = saving(10_000_000, 0, |_| {});
    bench.run_in("s", false, &prompt(1, 300), 5);
    assert_eq!(bench.in_flight(), 0);
    bench.unload();
    assert_eq!(bench.in_flight(), 304 * KV_BYTES);
    let (segments, charge) = evicted.try_recv().unwrap().into_parts();
    drop(segments);
    assert_eq!(bench.in_flight(), 304 * KV_BYTES, "as long as the charge is held");
    drop(charge);
    assert_eq!(bench.in_flight(), 0);
}

#[test]
fn a_cache_without_a_session_one_that_is_not_worth_it_and_one_too_many_are_dropped() {
    let (mut bench, mut evicted) = saving(10_000_000, 0, |_| {});
    let anonymous = bench.submit(&prompt(1, 300), 5);
    bench.run();
    drop(anonymous);
    for seed in 2..9 {
        bench.run_in(&format!("s{seed}"), false, &prompt(seed, 100), 5);
    }
    bench.unload();
    let copies: Vec<KvCopy> = std::iter::from_fn(|| evicted.try_recv().ok()).collect();
    assert_eq!(copies.len(), 4, "as many as somebody takes");
    assert_eq!(bench.stats().counters.snapshots_dropped_total, 3);
    // Where nothing takes time, nothing is worth a file.
    let (mut bench, mut evicted) = saving(10_000_000, 0, |_| {});
    bench.engine.backend.pass = None;
    bench.run_in("s", false, &prompt(1, 300), 5);
    assert!(bench.export(&prompt(1, 300), true).unwrap().is_none());
    bench.unload();
    assert!(evicted.try_recv().is_err());
}

#[test]
fn an_eviction_saves_what_the_budget_has_room_for_and_nothing_of_what_a_request_needs() {
    let room = 1300 * KV_BYTES;
    let (mut bench, mut evicted) = saving(WEIGHT_BYTES + room, 0, |settings| {
        settings.kv_idle_bytes_max = Some(400 * KV_BYTES);
    });
    bench.run_in("a", false, &prompt(1, 300), 5);
    bench.run_in("b", false, &prompt(2, 300), 5);
    assert_eq!(evicted.try_recv().unwrap().session, Some(session("a")), "both exceed what may be idle");
    // A slot of 1,024 tokens leaves no room for the other cache.
    let long = bench.submit(&prompt(3, 900), 50);
    bench.run();
    assert!(drain(long).end.is_ok());
    assert!(evicted.try_recv().is_err(), "the memory of b's is needed at once");
    assert_eq!(bench.found("m", "p", &prompt(2, 300)).tokens, 0);
}

#[test]
fn a_session_is_exported_while_its_cache_stays_if_there_is_room_for_both() {
    let (mut bench, _evicted) = saving(10_000_000, 0, all_idle);
    let context = prompt(1, 300);
    assert!(bench.export(&context, false).unwrap().is_none(), "nothing is cached");
    bench.run_in("s", false, &context, 5);
    let copy = bench.export(&context, true).unwrap().unwrap();
    assert_eq!((copy.tokens().len(), bench.in_flight()), (304, 304 * KV_BYTES));
    assert_eq!(bench.found("m", "p", &context).tokens, 300);
    drop(copy);
    assert_eq!(bench.in_flight(), 0);
    bench.engine.rest();
    let held = bench.engine.used_bytes();
    bench.configure(|settings| settings.memory_budget_bytes = Some(held + 303 * KV_BYTES));
    let refused = bench.export(&context, false).unwrap_err();
    let (needed_bytes, available_bytes) = (304 * KV_BYTES, 303 * KV_BYTES);
    assert_eq!(refused, Error::KvShortage { needed_bytes, available_bytes });
}

#[test]
fn a_session_that_is_saved_at_ever_shorter_lengths_is_not_cut_into_ever_more_segments() {
    let (mut bench, _evicted) = saving(10_000_000, 0, all_idle);
    let context = prompt(1, 300);
    bench.run_in("s", false, &context, 5);
    for length in (20..300).rev().step_by(7) {
        drop(bench.export(&context[..length], false).unwrap().unwrap());
    }
    let copy = bench.export(&context, false).unwrap().unwrap();
    assert_eq!((copy.segments.len(), copy.tokens().len()), (16, 304));
}

#[test]
fn what_comes_back_makes_room_by_evicting_older_caches_or_does_not_come_back() {
    let (mut bench, _evicted) = saving(10_000_000, 0, all_idle);
    let (old, other) = (prompt(1, 300), prompt(2, 300));
    bench.run_in("s", false, &old, 5);
    let segments = bench.export(&old, false).unwrap().unwrap().into_parts().0;
    bench.engine.command(Command::Forget(session("s")));
    bench.run_in("other", false, &other, 5);
    bench.engine.rest();
    let held = bench.engine.used_bytes();
    bench.configure(|settings| settings.memory_budget_bytes = Some(held + 100 * KV_BYTES));
    let tokens = [&old[..], &alone(&old, 5)].concat();
    bench.adopt("s", &tokens, 0, segments.clone()).unwrap();
    assert_eq!((bench.found("m", "p", &old).tokens, bench.found("m", "p", &other).tokens), (300, 0));
    // More than there can ever be room for.
    bench.engine.command(Command::Forget(session("s")));
    bench.configure(|settings| settings.memory_budget_bytes = Some(WEIGHT_BYTES + 303 * KV_BYTES));
    assert!(matches!(bench.adopt("s", &tokens, 0, segments), Err(Error::KvShortage { .. })));
    assert_eq!(bench.engine.backend.parked(), 0);
}

#[test]
fn what_comes_back_shares_what_is_there_and_continues_nothing_that_is_not() {
    let (mut bench, _evicted) = saving(10_000_000, 0, |_| {});
    let first = prompt(1, 300);
    let turn = [&first[..], &bench.run_in("s", false, &first, 5).tokens, &prompt(5, 20)].concat();
    let all = [&turn[..], &bench.run_in("s", false, &turn, 5).tokens].concat();
    let segments = bench.export(&all, false).unwrap().unwrap().into_parts().0;
    let starts: Vec<u32> = segments.iter().map(|segment| segment.tokens.start).collect();
    assert_eq!(starts, [0, 304], "a turn adds a segment");
    bench.engine.command(Command::Forget(session("s")));
    // Another one that begins alike was computed meanwhile.
    bench.run_in("fork", false, &[&first[..], &all[300..310]].concat(), 3);
    let before = bench.stats().models[0].kv_idle_bytes;
    let rest = segments[1..].to_vec();
    bench.adopt("s", &all, 304, rest.clone()).unwrap();
    let added = bench.stats().models[0].kv_idle_bytes - before;
    assert_eq!(added, (all.len() as u64 - 1 - 304) * KV_BYTES, "the first 304 tokens are shared");
    let next = [&all[..], &[9]].concat();
    let turn = bench.run_in("s", false, &next, 5);
    assert_eq!((turn.cached as usize, &turn.tokens), (all.len() - 1, &alone(&next, 5)));
    bench.engine.command(Command::Forget(session("s")));
    bench.engine.command(Command::Forget(session("fork")));
    assert!(bench.adopt("s", &all, 304, rest).is_err(), "what it continues is gone");
    assert_eq!(bench.stats().models[0].kv_idle_bytes, 0);
}

#[test]
fn a_recurrent_session_comes_back_with_its_checkpoints() {
    let (mut bench, mut evicted) = saving(10_000_000, 50, |_| {});
    // Messages begin at control tokens.
    let first: Vec<u32> = [&[3][..], &[500; 40], &[4], &[600; 40], &[5], &[700; 9]].concat();
    bench.run_in("s", false, &first, 5);
    let cut = [&first[..82], &[8]].concat();
    let expected = bench.found("m", "p", &cut).tokens;
    assert!(expected >= 41, "there is a checkpoint where a message begins: {expected}");
    bench.unload();
    let copy = evicted.try_recv().unwrap();
    let (tokens, segments) = (copy.tokens(), copy.into_parts().0);
    bench.load();
    bench.adopt("s", &tokens, 0, segments).unwrap();
    assert_eq!(bench.found("m", "p", &cut).tokens, expected);
    assert_eq!(bench.run_in("s", false, &cut, 5).tokens, alone(&cut, 5));
}

#[test]
fn a_cache_of_an_earlier_tenancy_is_not_taken_over() {
    let (mut bench, mut evicted) = saving(10_000_000, 0, |_| {});
    bench.run_in("s", false, &prompt(1, 300), 5);
    let stale = Tenancy::new(bench.lease("m").assets().clone()).lease();
    bench.unload();
    let copy = evicted.try_recv().unwrap();
    bench.load();
    let (tokens, (segments, _charge)) = (copy.tokens(), copy.into_parts());
    let work = AdoptWork {
        model: stale,
        owner: "p".into(),
        salt: Salt::default(),
        session: session("s"),
        pinned: false,
        read: 0..304,
        tokens,
        segments,
        charge: bench.engine.saving.charge(0),
    };
    let (reply, mut answer) = oneshot::channel();
    bench.engine.command(Command::Adopt(Box::new(work), reply));
    assert_eq!(answer.try_recv().unwrap(), Err(Error::ModelUnloaded("m".into())));
}

#[test]
fn a_load_waits_until_the_caches_that_make_room_for_it_are_written() {
    // For the one its cache has to go, for the other the whole model.
    for large in [900, 1050] {
        let (mut bench, mut evicted) = saving(WEIGHT_BYTES + 1000 * KV_BYTES, 0, all_idle);
        bench.engine.backend.weights = [("large".into(), large * KV_BYTES)].into();
        bench.run_in("s", false, &prompt(1, 300), 5);
        let (events, mut loading) = mpsc::channel(8);
        bench.engine.command(Command::Load(LoadWork::new(spec("large"), events)));
        bench.ticks(20);
        let told = loading.try_recv();
        assert!(told.is_err(), "it has not begun, and is not refused: {told:?}");
        assert_eq!(bench.in_flight(), 304 * KV_BYTES);
        drop(evicted.try_recv().unwrap());
        bench.run();
        let told = std::iter::from_fn(|| loading.try_recv().ok()).last();
        assert!(matches!(told, Some(LoadEvent::Loaded(..))), "{told:?}");
        assert_eq!(bench.engine.models.len(), if large == 900 { 2 } else { 1 });
    }
}

impl Bench {
    fn room(&mut self, tokens: &[u32], saved: u32) -> Option<KvRoom> {
        let (reply, mut answer) = oneshot::channel();
        let ask = RoomAsk { of: ask(tokens), saved, bytes: u64::from(saved) * KV_BYTES };
        self.engine.command(Command::Room(Box::new(ask), reply));
        answer.try_recv().unwrap()
    }
}

#[test]
fn what_is_read_has_its_room_before_it_is_read() {
    let (mut bench, _evicted) = saving(WEIGHT_BYTES + 1000 * KV_BYTES, 0, |settings| {
        settings.kv_idle_bytes_max = Some(500 * KV_BYTES);
    });
    let context = prompt(1, 300);
    assert!(bench.room(&context, 501).is_none(), "it could not stay");
    let room = bench.room(&context, 300).unwrap();
    assert_eq!((room.cached, bench.in_flight()), (0, 300 * KV_BYTES));
    let KvRoom { charge, .. } = bench.room(&prompt(2, 300), 450).unwrap();
    assert!(bench.room(&prompt(3, 300), 300).is_none(), "there is none left");
    drop((room, charge));
    bench.run_in("s", false, &context, 5);
    assert!(bench.room(&context, 300).is_none(), "it is cached");
    assert_eq!(bench.in_flight(), 0);
}

#[test]
fn a_session_that_could_not_come_back_is_not_saved() {
    let (mut bench, mut evicted) = saving(10_000_000, 0, |settings| {
        settings.kv_idle_bytes_max = Some(200 * KV_BYTES);
    });
    bench.run_in("s", false, &prompt(1, 300), 5);
    assert_eq!(bench.found("m", "p", &prompt(1, 300)).tokens, 0, "it is evicted at once");
    assert!(evicted.try_recv().is_err());
}

#[test]
fn a_request_that_waits_for_memory_asks_for_what_is_being_written() {
    let room = 1300 * KV_BYTES;
    let (mut bench, _) = saving(WEIGHT_BYTES + room, 0, all_idle);
    let (copies, mut evicted) = mpsc::channel(4);
    let hurry: Arc<tokio::sync::Notify> = Arc::default();
    bench.engine.command(Command::SaveEvicted(KvOutbox { copies, hurry: Arc::clone(&hurry) }));
    bench.run_in("s", false, &prompt(1, 300), 5);
    let copy = bench.export(&prompt(1, 300), false).unwrap().unwrap();
    let wakes = || {
        let mut notified = std::pin::pin!(hurry.notified());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        notified.as_mut().poll(&mut context).is_ready()
    };
    assert!(!wakes());
    let long = bench.submit(&prompt(3, 900), 50);
    bench.ticks(3);
    assert!(wakes(), "the budget has no room for both");
    assert!(evicted.try_recv().is_err());
    drop(copy);
    bench.run();
    assert_eq!(drain(long).tokens, alone(&prompt(3, 900), 50));
}
