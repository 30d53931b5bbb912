//! Owners, limits, leases and guards.

use std::sync::Mutex;
use std::time::SystemTime;

use super::*;
use crate::clock::Moment;
use crate::session::{InputKind, Message, Role};

struct Hand(Mutex<SystemTime>);

impl Hand {
    fn set(&self, seconds: u64) {
        *self.0.lock().unwrap() = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    }
}

impl Clock for Hand {
    fn now(&self) -> Moment {
        Moment::default()
    }

    fn wall(&self) -> SystemTime {
        *self.0.lock().unwrap()
    }
}

fn book(sessions_max: u32) -> (Arc<SessionBook<Arc<()>>>, Arc<Hand>) {
    let clock = Arc::new(Hand(Mutex::new(SystemTime::UNIX_EPOCH)));
    let limits = SessionLimits { sessions_max, session_bytes_max: 100_000, sessions_bytes_max: 200_000 };
    (Arc::new(SessionBook::new(limits, clock.clone())), clock)
}

fn key(owner: &str, name: &str) -> SessionKey {
    SessionKey { owner: owner.into(), name: name.into() }
}

fn create(book: &SessionBook<Arc<()>>, owner: &str, name: &str) -> Result<SessionView, Error> {
    let ttl = Duration::from_secs(10);
    book.create(NewSession {
        key: key(owner, name),
        model: "m".into(),
        ttl,
        history: History::Auto,
        cache_salt: "".into(),
    })
}

const RAW: TurnRequest = TurnRequest {
    model: None,
    input: InputKind::Raw,
    expected_token_count: None,
    input_bytes: 0,
    history: None,
};

#[test]
fn names_are_unique_within_an_owner_and_limited() {
    let (book, _) = book(2);
    create(&book, "uid:1", "a").unwrap();
    assert_eq!(create(&book, "uid:1", "a"), Err(Error::SessionExists("a".into())));
    create(&book, "uid:2", "a").unwrap();
    create(&book, "uid:1", "b").unwrap();
    assert_eq!(create(&book, "uid:1", "c"), Err(Error::SessionLimit { limit: "sessions_max", value: 2 }));
    assert_eq!(book.count(), 3);
}

#[test]
fn another_owner_does_not_see_a_session() {
    let (book, _) = book(2);
    create(&book, "uid:1", "a").unwrap();
    let refused = book.delete(&key("uid:2", "a"));
    assert_eq!(refused, Err(Error::SessionNotFound("a".into())));
}

#[test]
fn dropping_the_guard_rolls_the_turn_back() {
    let (book, _) = book(2);
    create(&book, "uid:1", "a").unwrap();
    let hold = Arc::new(());
    let (guard, _) = book.begin(&key("uid:1", "a"), &RAW, hold.clone()).unwrap();
    assert!(book.begin(&key("uid:1", "a"), &RAW, hold.clone()).is_err());
    drop(guard);
    assert_eq!(Arc::strong_count(&hold), 1);
    let (guard, _) = book.begin(&key("uid:1", "a"), &RAW, hold).unwrap();
    assert_eq!(guard.commit(vec![1, 2], TurnContent::Raw), Ok(2));
    assert_eq!(book.with(&key("uid:1", "a"), |session, _| Ok(session.tokens().len())), Ok(2));
}

#[test]
fn deleting_a_session_drops_the_turns_hold_and_refuses_its_commit() {
    let (book, _) = book(2);
    create(&book, "uid:1", "a").unwrap();
    let hold = Arc::new(());
    let (guard, _) = book.begin(&key("uid:1", "a"), &RAW, hold.clone()).unwrap();
    book.delete(&key("uid:1", "a")).unwrap();
    assert_eq!(Arc::strong_count(&hold), 1);
    create(&book, "uid:1", "a").unwrap();
    assert!(guard.commit(vec![1], TurnContent::Raw).is_err());
    assert_eq!(book.with(&key("uid:1", "a"), |session, _| Ok(session.tokens().len())), Ok(0));
}

#[test]
fn a_fork_goes_on_independently() {
    let (book, _) = book(3);
    create(&book, "uid:1", "a").unwrap();
    let (guard, _) = book.begin(&key("uid:1", "a"), &RAW, Arc::default()).unwrap();
    guard.commit(vec![1, 2], TurnContent::Raw).unwrap();
    assert!(book.fork(&key("uid:1", "a"), "b".into(), None, Some(1)).is_err());
    book.fork(&key("uid:1", "a"), "b".into(), None, Some(2)).unwrap();
    let (guard, start) = book.begin(&key("uid:1", "b"), &RAW, Arc::default()).unwrap();
    assert_eq!(*start.tokens, [1, 2]);
    guard.commit(vec![1, 2, 3], TurnContent::Raw).unwrap();
    assert_eq!(book.with(&key("uid:1", "a"), |session, _| Ok(session.tokens().len())), Ok(2));
}

#[test]
fn an_expired_session_is_gone_before_and_after_the_sweep() {
    let (book, clock) = book(1);
    create(&book, "uid:1", "a").unwrap();
    clock.set(10);
    assert!(book.begin(&key("uid:1", "a"), &RAW, Arc::default()).is_err());
    create(&book, "uid:1", "b").unwrap();
    assert_eq!(book.sweep(), [key("uid:1", "a")]);
    assert_eq!(book.count(), 1);
}

#[test]
fn a_clock_that_is_set_back_ends_no_lease_early_and_stops_none() {
    let (book, clock) = book(3);
    let is_there = |name| book.with(&key("uid:1", name), |session, _| Ok(session.view())).is_ok();
    clock.set(1000);
    create(&book, "uid:1", "before").unwrap();
    clock.set(100);
    create(&book, "uid:1", "while").unwrap();
    assert!(is_there("before") && is_there("while"));
    clock.set(109);
    assert!(book.sweep().is_empty());
    clock.set(110);
    assert_eq!(book.sweep().len(), 2);
    *clock.0.lock().unwrap() = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
    create(&book, "uid:1", "after").unwrap();
    assert!(is_there("after"));
}

#[test]
fn pages_follow_one_another_in_order() {
    let (book, _) = book(9);
    for name in ["c", "a", "b"] {
        create(&book, "uid:1", name).unwrap();
    }
    let mut page = ListPage { after: None, size: 2, model: None };
    let (first, more) = book.list(&"uid:1".into(), &page);
    let names: Vec<_> = first.iter().map(|view| view.key.name.to_string()).collect();
    assert_eq!((names, more), (vec!["a".into(), "b".into()], true));
    page.after = Some("b".into());
    let (last, more) = book.list(&"uid:1".into(), &page);
    assert_eq!((last.len(), more), (1, false));
}

fn named(bytes: usize) -> Message {
    Message { name: "x".repeat(bytes), ..Message::text(Role::User, "hi") }
}

/// Commits a chat turn whose message has a name of `bytes`.
fn say(book: &Arc<SessionBook<Arc<()>>>, name: &str, bytes: usize) -> Result<(), Error> {
    let request = TurnRequest { input: InputKind::Chat, input_bytes: bytes, ..RAW };
    let (guard, start) = book.begin(&key("uid:1", name), &request, Arc::new(()))?;
    let tokens = [&*start.tokens, &[1, 2]].concat();
    let content =
        TurnContent::Chat { messages: vec![named(bytes)], text: Some("hi".into()), text_is_whole: true };
    guard.commit(tokens, content).map(drop)
}

fn held(book: &SessionBook<Arc<()>>) -> u64 {
    book.owners.get(&"uid:1".into()).unwrap().held.bytes()
}

#[test]
fn forks_share_their_bytes_and_the_last_one_gives_them_back() {
    let (book, _) = book(100);
    create(&book, "uid:1", "a").unwrap();
    say(&book, "a", 50_000).unwrap();
    let before = held(&book);
    let fork = |name: &str| book.fork(&key("uid:1", "a"), name.into(), None, None).map(drop);
    (0..30).for_each(|at| fork(&format!("f{at}")).unwrap());
    assert!(held(&book) < before + 30 * 1000, "{before} {}", held(&book));
    // What a fork adds is its own.
    say(&book, "f0", 20_000).unwrap();
    assert!(held(&book) > before + 20_000);
    let delete = |name: &str| drop(book.delete(&key("uid:1", name)).unwrap());
    (0..30).for_each(|at| delete(&format!("f{at}")));
    assert_eq!(held(&book), before);
    delete("a");
    assert_eq!(held(&book), 0);
}

#[test]
fn a_session_and_its_owner_hold_limited_bytes_of_every_field() {
    let (book, _) = book(100);
    let refused = |outcome: Result<(), Error>| match outcome {
        Err(Error::SessionLimit { limit, .. }) => limit,
        other => panic!("{other:?}"),
    };
    for name in ["a", "b", "c"] {
        create(&book, "uid:1", name).unwrap();
    }
    say(&book, "a", 60_000).unwrap();
    assert_eq!(refused(say(&book, "a", 60_000)), "session_bytes_max");
    say(&book, "a", 30_000).unwrap();
    say(&book, "b", 90_000).unwrap();
    assert_eq!(refused(say(&book, "c", 50_000)), "sessions_bytes_max");
    // Others have their own room, and a turn that is rolled back takes none.
    create(&book, "uid:2", "a").unwrap();
    let before = held(&book);
    let (mut guard, _) = book.begin(&key("uid:1", "c"), &RAW, Arc::new(())).unwrap();
    guard.reserve(10_000).unwrap();
    assert_eq!(held(&book), before + 10_000);
    assert_eq!(refused(guard.reserve(90_000)), "sessions_bytes_max");
    drop(guard);
    assert_eq!(held(&book), before);
    book.with(&key("uid:1", "a"), |session, now| session.truncate_turns(0, now)).unwrap();
    say(&book, "c", 50_000).unwrap();
}
