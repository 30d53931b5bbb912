//! Owners, limits, leases and guards.

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use super::*;
use crate::clock::Moment;
use crate::session::{InputKind, Labels, Lease, ListPage, Message, Role, SessionFilter, TermsChange};

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
    let limits = SessionLimits {
        sessions_max,
        sessions_pinned_max: 2,
        session_labels_max: 3,
        session_bytes_max: 100_000,
        sessions_bytes_max: 200_000,
        sessions_disk_bytes_max: 600_000,
        session_watches_max: 2,
    };
    (Arc::new(SessionBook::new(limits, clock.clone())), clock)
}

fn key(owner: &str, name: &str) -> SessionKey {
    SessionKey { owner: owner.into(), name: name.into() }
}

fn create(book: &SessionBook<Arc<()>>, owner: &str, name: &str) -> Result<SessionView, Error> {
    let ttl = Duration::from_secs(10);
    let (history, cache_salt) = (History::Auto, "".into());
    let terms = Terms::after_use(ttl);
    book.create(NewSession { key: key(owner, name), model: "m".into(), terms, history, cache_salt })
}

/// A copy of all turns.
fn whole(name: &str) -> NewFork {
    let change = TermsChange::default();
    NewFork { name: name.into(), change, turn_count: None, expected_token_count: None }
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
    assert_eq!((book.totals(None).sessions, book.totals(Some(&"uid:2".into())).sessions), (3, 1));
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
    let copy = |expected| NewFork { expected_token_count: Some(expected), ..whole("b") };
    assert!(book.fork(&key("uid:1", "a"), copy(1)).is_err());
    book.fork(&key("uid:1", "a"), copy(2)).unwrap();
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
    assert_eq!(book.totals(None).sessions, 1);
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
    let mut page = ListPage { after: None, size: 2, filter: SessionFilter::default() };
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
    let content = TurnContent::Chat {
        messages: vec![named(bytes)],
        text: Some("hi".into()),
        text_is_whole: true,
        answer: None,
    };
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
    let fork = |name: &str| book.fork(&key("uid:1", "a"), whole(name)).map(drop);
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

type Book = SessionBook<Arc<()>>;

/// Returns a book as the next daemon has it, and the content that it reads.
fn restarted(book: &Book) -> (Arc<Book>, Vec<(SessionKey, Contents)>) {
    let page = ListPage { after: None, size: 1000, filter: SessionFilter::default() };
    let (views, _) = book.list(&"uid:1".into(), &page);
    let snapshots: Vec<_> = views.iter().filter_map(|view| book.snapshot(&view.key)).collect();
    let (after, _) = self::book(100);
    after.restore(snapshots.iter().map(|snapshot| (snapshot.outline.clone(), None)));
    let read = snapshots.into_iter().filter_map(|snapshot| {
        let Contents { messages, text, tokens } = snapshot.contents?;
        let messages = messages.iter().map(|message| Arc::new((**message).clone())).collect();
        Some((snapshot.outline.key, Contents { messages, text: (*text).into(), tokens: (*tokens).into() }))
    });
    (after, read.collect())
}

fn fill(book: &SessionBook<Arc<()>>, key: &SessionKey, contents: Contents) {
    let id = book.cold(key).unwrap();
    book.fill(key, id, Ok(contents));
}

#[test]
fn forks_share_their_bytes_over_a_restart_and_their_owner_is_not_locked_out() {
    let (before, _) = book(100);
    create(&before, "uid:1", "a").unwrap();
    say(&before, "a", 40_000).unwrap();
    say(&before, "a", 40_000).unwrap();
    (0..20).for_each(|at| drop(before.fork(&key("uid:1", "a"), whole(&format!("f{at}"))).unwrap()));
    say(&before, "f0", 10_000).unwrap();
    before.with(&key("uid:1", "f1"), |session, now| session.truncate_turns(1, now)).unwrap();
    let bytes = held(&before);
    let (after, read) = restarted(&before);
    assert!((80_000..=bytes).contains(&held(&after)), "{bytes} {}", held(&after));
    for (key, contents) in read {
        fill(&after, &key, contents);
    }
    assert!(held(&after) <= bytes);
    // They share their memory as well.
    let messages = |name| after.read(&key("uid:1", name), |session| Ok(session.messages().to_vec())).unwrap();
    let (a, f0, f1, f2) = (messages("a"), messages("f0"), messages("f1"), messages("f2"));
    assert!(Arc::ptr_eq(&a[0], &f0[0]) && Arc::ptr_eq(&a[1], &f0[1]) && Arc::ptr_eq(&a[0], &f1[0]));
    assert!(Arc::ptr_eq(&a[1], &f2[1]) && (f0.len(), f1.len()) == (3, 1));
    let tokens = |name| after.read(&key("uid:1", name), |session| Ok(session.tokens().clone())).unwrap();
    assert!(Arc::ptr_eq(&tokens("a"), &tokens("f2")) && !Arc::ptr_eq(&tokens("a"), &tokens("f1")));
    say(&after, "f3", 10_000).unwrap();
    // Again, and the last one gives everything back.
    let (last, read) = restarted(&after);
    assert!(held(&last) <= held(&after));
    read.iter().for_each(|(key, _)| drop(last.delete(key).unwrap()));
    assert_eq!(held(&last), 0);
}

#[test]
fn what_only_has_the_number_of_a_shared_part_keeps_its_own_content() {
    let (before, _) = book(100);
    create(&before, "uid:1", "a").unwrap();
    say(&before, "a", 10).unwrap();
    before.fork(&key("uid:1", "a"), whole("b")).unwrap();
    let (after, read) = restarted(&before);
    let [(a, of_a), (b, of_b)]: [_; 2] = read.try_into().unwrap();
    fill(&after, &a, of_a);
    let other = vec![Arc::new(named(10_000))];
    fill(&after, &b, Contents { messages: other.clone(), tokens: [9, 9].into(), ..of_b });
    let read = after.read(&b, |session| Ok((session.messages().to_vec(), session.tokens().to_vec())));
    assert_eq!(read.unwrap(), (other, vec![9, 9]));
}

#[test]
fn forks_are_limited_by_what_their_files_hold_where_sessions_are_stored() {
    let (book, _) = book(100);
    create(&book, "uid:1", "a").unwrap();
    say(&book, "a", 50_000).unwrap();
    let fork = |name: &str| book.fork(&key("uid:1", "a"), whole(name)).map(drop);
    (0..20).for_each(|at| fork(&format!("memory{at}")).unwrap());
    (0..20).for_each(|at| drop(book.delete(&key("uid:1", &format!("memory{at}"))).unwrap()));
    book.changes().listen();
    let refused = Err(Error::SessionLimit { limit: "sessions_disk_bytes_max", value: 600_000 });
    let forks = (0..20).take_while(|at| fork(&format!("f{at}")).is_ok()).count();
    assert_eq!((forks, fork("more")), (10, refused.clone()));
    assert_eq!(say(&book, "a", 49_000), refused);
    // What does not grow goes on, and what is given back can be used again.
    let turns = NewFork { turn_count: Some(0), ..whole("empty") };
    book.fork(&key("uid:1", "a"), turns).unwrap();
    book.read(&key("uid:1", "f0"), |_| Ok(())).unwrap();
    pin(&book, "f0", true).unwrap();
    book.with(&key("uid:1", "f0"), |session, now| session.truncate_turns(0, now)).unwrap();
    book.delete(&key("uid:1", "f1")).unwrap();
    (fork("again"), fork("more")).0.unwrap();
    // A restart counts the same.
    let (after, _) = restarted(&book);
    let on_disk = |book: &SessionBook<_>| book.owners.get(&"uid:1".into()).unwrap().on_disk.bytes();
    assert!((500_000..=on_disk(&book)).contains(&on_disk(&after)));
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

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn pin(book: &SessionBook<Arc<()>>, name: &str, pinned: bool) -> Result<SessionView, Error> {
    book.update(&key("uid:1", name), TermsChange { pinned: Some(pinned), ..TermsChange::default() })
}

#[test]
fn a_pinned_session_stays_until_it_is_deleted_or_unpinned() {
    let (book, clock) = book(9);
    create(&book, "uid:1", "a").unwrap();
    pin(&book, "a", true).unwrap();
    clock.set(1_000_000);
    assert!(book.sweep().is_empty());
    // Unpinning is a use: its lifetime begins anew.
    pin(&book, "a", false).unwrap();
    clock.set(1_000_009);
    assert!(book.sweep().is_empty());
    clock.set(1_000_010);
    assert_eq!(book.sweep(), [key("uid:1", "a")]);
}

#[test]
fn pins_are_limited_by_owner_and_forks_take_them_over() {
    let (book, _) = book(9);
    for name in ["a", "b"] {
        create(&book, "uid:1", name).unwrap();
    }
    pin(&book, "a", true).unwrap();
    let fork = book.fork(&key("uid:1", "a"), whole("f")).unwrap();
    assert!(fork.terms.pinned);
    let refused = Err(Error::SessionLimit { limit: "sessions_pinned_max", value: 2 });
    assert_eq!(pin(&book, "b", true), refused);
    assert_eq!(book.fork(&key("uid:1", "a"), whole("g")), refused);
    let unpinned = TermsChange { pinned: Some(false), ..TermsChange::default() };
    book.fork(&key("uid:1", "a"), NewFork { change: unpinned, ..whole("g") }).unwrap();
    // To pin again changes nothing, and what another owner has pinned does not count.
    pin(&book, "a", true).unwrap();
    create(&book, "uid:2", "a").unwrap();
    book.update(&key("uid:2", "a"), TermsChange { pinned: Some(true), ..TermsChange::default() }).unwrap();
    book.delete(&key("uid:1", "f")).unwrap();
    pin(&book, "b", true).unwrap();
}

#[test]
fn an_end_that_was_given_holds_whatever_the_session_is_used_for() {
    let (book, clock) = book(9);
    clock.set(1000);
    create(&book, "uid:1", "a").unwrap();
    clock.set(900);
    let until = Lease::Until(SystemTime::UNIX_EPOCH + Duration::from_secs(903));
    book.update(&key("uid:1", "a"), TermsChange { lease: Some(until), ..TermsChange::default() }).unwrap();
    clock.set(902);
    let (guard, _) = book.begin(&key("uid:1", "a"), &RAW, Arc::default()).unwrap();
    guard.commit(vec![1], TurnContent::Raw).unwrap();
    assert!(book.sweep().is_empty());
    clock.set(903);
    assert_eq!(book.sweep(), [key("uid:1", "a")]);
}

#[test]
fn labels_are_limited_in_number_and_bytes() {
    let (book, _) = book(9);
    create(&book, "uid:1", "a").unwrap();
    let before = held(&book);
    let set = |pairs: &[(&str, &str)]| {
        let change = TermsChange { set_labels: labels(pairs), ..TermsChange::default() };
        book.update(&key("uid:1", "a"), change)
    };
    set(&[("a", "1"), ("b", "2")]).unwrap();
    let many = Err(Error::SessionLimit { limit: "session_labels_max", value: 3 });
    assert_eq!(set(&[("c", "3"), ("d", "4")]), many);
    let long = "x".repeat(200_000);
    let bytes = Err(Error::SessionLimit { limit: "sessions_bytes_max", value: 200_000 });
    assert_eq!(set(&[("c", &long)]), bytes);
    assert!(held(&book) > before);
    let change = TermsChange { remove_labels: vec!["a".into(), "b".into()], ..TermsChange::default() };
    assert!(book.update(&key("uid:1", "a"), change).unwrap().terms.labels.is_empty());
    assert_eq!(held(&book), before);
}

#[test]
fn pages_of_a_filtered_list_follow_one_another() {
    let (book, _) = book(99);
    for (name, color) in [("a/1", "red"), ("b/1", "red"), ("b/2", "blue"), ("b/3", "red"), ("c/1", "red")] {
        let terms = Terms {
            labels: Arc::new(labels(&[("color", color), ("kind", "test")])),
            pinned: name == "b/3",
            ..Terms::after_use(Duration::from_secs(10))
        };
        let (history, cache_salt) = (History::Auto, "".into());
        let model = "m".into();
        book.create(NewSession { key: key("uid:1", name), model, terms, history, cache_salt }).unwrap();
    }
    let names = |filter: &SessionFilter| {
        let (mut after, mut all) = (None, Vec::new());
        loop {
            let page = ListPage { after, size: 1, filter: filter.clone() };
            let (views, more) = book.list(&"uid:1".into(), &page);
            all.extend(views.iter().map(|view| view.key.name.to_string()));
            after = views.last().map(|view| view.key.name.clone());
            if !more {
                return all;
            }
        }
    };
    let filter = SessionFilter::default;
    assert_eq!(names(&filter()).len(), 5);
    let red = SessionFilter { labels: labels(&[("color", "red")]), ..filter() };
    assert_eq!(names(&red), ["a/1", "b/1", "b/3", "c/1"]);
    assert_eq!(names(&SessionFilter { name_prefix: "b/".into(), ..red.clone() }), ["b/1", "b/3"]);
    assert_eq!(names(&SessionFilter { pinned: Some(false), ..red }), ["a/1", "b/1", "c/1"]);
    assert!(names(&SessionFilter { labels: labels(&[("color", "")]), ..filter() }).is_empty());
    assert!(names(&SessionFilter { name_prefix: "zz".into(), ..filter() }).is_empty());
    assert!(names(&SessionFilter { model: Some("other".into()), ..filter() }).is_empty());
}

#[test]
fn a_fork_begins_at_the_end_of_a_turn() {
    let (book, _) = book(9);
    create(&book, "uid:1", "a").unwrap();
    for _ in 0..3 {
        say(&book, "a", 10).unwrap();
    }
    let at = |name: &str, turns| {
        let fork = NewFork { turn_count: Some(turns), ..whole(name) };
        book.fork(&key("uid:1", "a"), fork).map(|view| (view.turns.len(), view.token_count))
    };
    assert_eq!((at("f", 2), at("g", 0), at("h", 3)), (Ok((2, 4)), Ok((0, 0)), Ok((3, 6))));
    assert!(matches!(at("i", 4), Err(Error::InvalidField { field, .. }) if field == "turn_count"));
    assert_eq!(book.totals(None).sessions, 4);
    // A turn that runs is not part of the copy.
    let _running = book.begin(&key("uid:1", "a"), &RAW, Arc::default()).unwrap();
    assert_eq!(at("i", 1), Ok((1, 2)));
}

#[test]
fn totals_are_of_one_owner_or_of_all() {
    let (book, _) = book(9);
    create(&book, "uid:1", "a").unwrap();
    create(&book, "uid:1", "b").unwrap();
    create(&book, "uid:2", "a").unwrap();
    pin(&book, "b", true).unwrap();
    say(&book, "a", 1000).unwrap();
    let _running = book.begin(&key("uid:1", "a"), &RAW, Arc::default()).unwrap();
    let own = book.totals(Some(&"uid:1".into()));
    assert_eq!((own.sessions, own.pinned, own.busy), (2, 1, 1));
    let other = book.totals(Some(&"uid:2".into()));
    assert_eq!((other.sessions, other.pinned, other.busy), (1, 0, 0));
    assert!(own.bytes > 1000 + other.bytes);
    assert_eq!(book.totals(None).bytes, own.bytes + other.bytes);
    assert_eq!(book.totals(Some(&"uid:3".into())), SessionTotals::default());
}
