//! Watchers learn the last state of every session of theirs, in the end, and cost no more than their owner.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::task::{Wake, Waker};
use std::time::{Duration, SystemTime};

use super::*;
use crate::clock::{Clock, Moment};
use crate::ids::SessionKey;
use crate::session::{
    Change, InputKind, Labels, NewSession, SessionView, Terms, TermsChange, TurnContent, TurnRequest,
};

struct Hand(Mutex<SystemTime>);

impl Clock for Hand {
    fn now(&self) -> Moment {
        Moment::default()
    }

    fn wall(&self) -> SystemTime {
        *self.0.lock().unwrap()
    }
}

struct World {
    book: Arc<SessionBook<()>>,
    clock: Arc<Hand>,
}

impl World {
    fn new() -> Self {
        let clock = Arc::new(Hand(Mutex::new(SystemTime::UNIX_EPOCH)));
        let limits = SessionLimits {
            sessions_max: 1000,
            sessions_pinned_max: 9,
            session_labels_max: 9,
            session_bytes_max: 1 << 20,
            sessions_bytes_max: 1 << 20,
            sessions_disk_bytes_max: 1 << 20,
            session_watches_max: 2,
        };
        Self { book: Arc::new(SessionBook::new(limits, clock.clone())), clock }
    }

    fn wait(&self, seconds: u64) {
        *self.clock.0.lock().unwrap() += Duration::from_secs(seconds);
    }

    fn create(&self, name: &str) {
        self.create_of("uid:1", name);
    }

    fn create_of(&self, owner: &str, name: &str) {
        let key = SessionKey { owner: owner.into(), name: name.into() };
        let terms = Terms::after_use(Duration::from_secs(10));
        let (history, cache_salt) = (Default::default(), "".into());
        self.book.create(NewSession { key, model: "m".into(), terms, history, cache_salt }).unwrap();
    }

    fn turn(&self, name: &str, tokens: usize) {
        let request = TurnRequest {
            model: None,
            input: InputKind::Raw,
            expected_token_count: None,
            input_bytes: 0,
            history: None,
        };
        let (guard, _) = self.book.begin(&key(name), &request, ()).unwrap();
        guard.commit(vec![1; tokens], TurnContent::Raw).unwrap();
    }

    fn label(&self, name: &str, labels: &[(&str, &str)], remove: &[&str]) {
        let label = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let change = TermsChange {
            set_labels: labels.iter().map(label).collect(),
            remove_labels: remove.iter().map(|key| (*key).to_owned()).collect(),
            ..TermsChange::default()
        };
        self.book.update(&key(name), change).unwrap();
    }

    fn watch(&self, filter: SessionFilter, changes_only: bool) -> SessionWatch<()> {
        self.book.watch("uid:1".into(), filter, changes_only).unwrap()
    }
}

fn key(name: &str) -> SessionKey {
    SessionKey { owner: "uid:1".into(), name: name.into() }
}

/// Returns what a watcher is told now, in words.
fn told(watch: &SessionWatch<()>) -> Vec<String> {
    let context = Context::from_waker(Waker::noop());
    let mut all = Vec::new();
    while let Poll::Ready(told) = watch.poll(&context) {
        assert!(!told.is_empty());
        all.extend(told.iter().map(word));
    }
    all
}

fn word(told: &Told) -> String {
    let Told::Change { name, change, merged } = told else { return "ready".into() };
    let tokens = |view: &SessionView| view.token_count;
    let what = match change {
        Change::Listed(view) => format!("listed {}", tokens(view)),
        Change::Created(view) => format!("created {}", tokens(view)),
        Change::Changed(view, fields) => format!("changed {} {fields:?}", tokens(view)),
        Change::Deleted => "deleted".into(),
        Change::Expired => "expired".into(),
        Change::Unlisted => "unlisted".into(),
    };
    format!("{name} {what} +{merged}")
}

#[test]
fn those_that_are_there_come_first_and_then_what_changes() {
    let world = World::new();
    world.create("b");
    world.create("a");
    world.turn("a", 5);
    let watch = world.watch(SessionFilter::default(), false);
    world.create("0");
    assert_eq!(told(&watch), ["a listed 5 +0", "b listed 0 +0", "ready", "0 created 0 +0"]);
    assert!(told(&watch).is_empty());
    world.wait(1);
    world.turn("b", 3);
    assert_eq!(told(&watch), ["b changed 3 [TokenCount, Turns, LastUse, Expiry] +1"]);
    world.book.delete(&key("a")).unwrap();
    assert_eq!(told(&watch), ["a deleted +0"]);
    world.wait(11);
    world.book.sweep().iter().for_each(drop);
    assert_eq!(told(&watch), ["0 expired +0", "b expired +0"]);
}

#[test]
fn only_changes_are_told_to_whoever_wants_no_more() {
    let world = World::new();
    world.create("a");
    let watch = world.watch(SessionFilter::default(), true);
    assert_eq!(told(&watch), ["ready"]);
    world.label("a", &[("k", "v")], &[]);
    assert_eq!(told(&watch), ["a changed 0 [Labels] +0"]);
    // What changes nothing that is shown is not told.
    world.label("a", &[("k", "v")], &[]);
    assert!(told(&watch).is_empty());
}

#[test]
fn a_turn_that_runs_is_told() {
    let world = World::new();
    world.create("a");
    let watch = world.watch(SessionFilter::default(), true);
    told(&watch);
    let request = TurnRequest {
        model: None,
        input: InputKind::Raw,
        expected_token_count: None,
        input_bytes: 0,
        history: None,
    };
    let (guard, _) = world.book.begin(&key("a"), &request, ()).unwrap();
    assert_eq!(told(&watch), ["a changed 0 [Busy] +0"]);
    drop(guard);
    assert_eq!(told(&watch), ["a changed 0 [Busy] +0"]);
}

#[test]
fn a_slow_reader_is_told_the_last_state_and_how_many_it_missed() {
    let world = World::new();
    world.create("a");
    let watch = world.watch(SessionFilter::default(), true);
    told(&watch);
    for tokens in 1..=100 {
        world.turn("a", tokens);
    }
    assert_eq!(told(&watch), ["a changed 100 [TokenCount, Turns] +199"]);
    // A session that came and went is not told at all.
    world.create("b");
    world.book.delete(&key("b")).unwrap();
    assert!(told(&watch).is_empty());
    // One of the same name that is another is.
    world.book.delete(&key("a")).unwrap();
    world.create("a");
    assert_eq!(told(&watch), ["a deleted +1", "a created 0 +0"]);
}

#[test]
fn one_that_never_reads_costs_no_more_than_the_sessions_that_there_are() {
    let world = World::new();
    world.create("stays");
    let watch = world.watch(SessionFilter::default(), false);
    for number in 0..10_000 {
        let name = format!("s{number}");
        world.create(&name);
        world.turn(&name, 1);
        world.book.delete(&key(&name)).unwrap();
    }
    assert_eq!(told(&watch), ["stays listed 0 +0", "ready"]);
}

#[test]
fn a_filter_is_entered_and_left() {
    let world = World::new();
    let labels = Labels::from([("team".to_owned(), "a".to_owned())]);
    let filter = SessionFilter { labels, name_prefix: "x/".into(), ..SessionFilter::default() };
    let watch = world.watch(filter, false);
    assert_eq!(told(&watch), ["ready"]);
    world.create("x/1");
    world.create("y/1");
    world.label("y/1", &[("team", "a")], &[]);
    assert!(told(&watch).is_empty());
    world.label("x/1", &[("team", "a")], &[]);
    assert_eq!(told(&watch), ["x/1 listed 0 +0"]);
    world.label("x/1", &[("team", "b")], &[]);
    assert_eq!(told(&watch), ["x/1 unlisted +0"]);
    world.book.delete(&key("x/1")).unwrap();
    assert!(told(&watch).is_empty());
}

#[test]
fn an_expired_session_whose_name_is_taken_again_expired() {
    let world = World::new();
    world.create("a");
    let watch = world.watch(SessionFilter::default(), true);
    told(&watch);
    world.wait(11);
    world.create("a");
    assert_eq!(told(&watch), ["a expired +1", "a created 0 +0"]);
}

#[test]
fn watchers_are_of_one_owner_and_limited() {
    let world = World::new();
    let watch = world.watch(SessionFilter::default(), true);
    let other = world.book.watch("uid:2".into(), SessionFilter::default(), true).unwrap();
    assert_eq!((told(&watch), told(&other)), (vec!["ready".to_owned()], vec!["ready".to_owned()]));
    world.create("secret");
    assert!(told(&other).is_empty());
    world.create_of("uid:2", "own");
    assert_eq!(told(&other), ["own created 0 +0"]);
    let second = world.watch(SessionFilter::default(), true);
    let refused = world.book.watch("uid:1".into(), SessionFilter::default(), true);
    let limit = Error::SessionLimit { limit: "session_watches_max", value: 2 };
    assert_eq!(refused.err(), Some(limit));
    drop(second);
    world.watch(SessionFilter::default(), true);
    // An owner without sessions is not forgotten while somebody watches.
    world.book.delete(&key("secret")).unwrap();
    assert!(world.book.sweep().is_empty());
    told(&watch);
    world.create("again");
    assert_eq!(told(&watch), ["again created 0 +0"]);
}

#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn whoever_waits_is_woken_once_by_changes_of_its_own() {
    let world = World::new();
    let watch = world.watch(SessionFilter { name_prefix: "a".into(), ..SessionFilter::default() }, true);
    told(&watch);
    let count = Arc::new(Count::default());
    let waker = Waker::from(count.clone());
    assert!(watch.poll(&Context::from_waker(&waker)).is_pending());
    world.create("b");
    world.create_of("uid:2", "a");
    assert_eq!(count.0.load(Ordering::Relaxed), 0);
    world.create("a");
    world.turn("a", 1);
    assert_eq!(count.0.load(Ordering::Relaxed), 1);
    assert!(watch.poll(&Context::from_waker(&waker)).is_ready());
}

#[test]
fn a_watcher_that_reads_at_any_time_knows_in_the_end_what_there_is() {
    // What is known is kept up by what is told alone.
    for seed in 0..200_u64 {
        let world = World::new();
        let watch = world.watch(SessionFilter::default(), seed % 2 == 0);
        let mut known = BTreeMap::new();
        let mut state = seed;
        let mut below = |limit: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % limit
        };
        let read = |known: &mut BTreeMap<String, usize>| {
            let context = Context::from_waker(Waker::noop());
            while let Poll::Ready(told) = watch.poll(&context) {
                for one in told {
                    let Told::Change { name, change, .. } = one else { continue };
                    match change {
                        Change::Listed(view) | Change::Created(view) => {
                            let was = known.insert(name.to_string(), view.token_count);
                            assert_eq!(was, None, "seed {seed}");
                        }
                        Change::Changed(view, _) => {
                            let was = known.insert(name.to_string(), view.token_count);
                            assert!(was.is_some(), "seed {seed}");
                        }
                        Change::Deleted | Change::Expired | Change::Unlisted => {
                            assert!(known.remove(name.as_str()).is_some(), "seed {seed}");
                        }
                    }
                }
            }
        };
        for step in 0..60 {
            let name = format!("s{}", below(4));
            let is_there = world.book.read(&key(&name), |_| Ok(())).is_ok();
            match below(6) {
                0 if is_there => world.book.delete(&key(&name)).map(drop).unwrap(),
                1 if is_there => world.turn(&name, step),
                2 => world.wait(3),
                3 => drop(world.book.sweep()),
                4 => read(&mut known),
                _ if !is_there => world.create(&name),
                _ => {}
            }
        }
        drop(world.book.sweep());
        read(&mut known);
        let page = crate::session::ListPage { after: None, size: 9, filter: SessionFilter::default() };
        let there = world.book.list(&"uid:1".into(), &page).0;
        let there: BTreeMap<String, usize> =
            there.into_iter().map(|view| (view.key.name.to_string(), view.token_count)).collect();
        assert_eq!(known, there, "seed {seed}");
    }
}
