//! A session that comes from outside is counted from its first byte, and is whole or not there.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::*;
use crate::clock::{Clock, Moment};
use crate::ids::SessionName;
use crate::session::{
    InputKind, Joined, ListPage, NewSession, Pieces, SessionFilter, Snapshot, TurnContent, TurnRequest,
};

struct Still;

impl Clock for Still {
    fn now(&self) -> Moment {
        Moment::default()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(50)
    }
}

fn book() -> Arc<SessionBook<()>> {
    let limits = SessionLimits {
        sessions_max: 2,
        sessions_pinned_max: 1,
        session_labels_max: 2,
        session_bytes_max: 10_000,
        sessions_bytes_max: 12_000,
        sessions_disk_bytes_max: 1 << 20,
        session_watches_max: 1,
    };
    Arc::new(SessionBook::new(limits, Arc::new(Still)))
}

fn key(owner: &str, name: &str) -> SessionKey {
    SessionKey { owner: owner.into(), name: name.into() }
}

const TTL: Duration = Duration::from_secs(9);

/// Returns a session of another book with this number of tokens, as it comes.
fn arrived(key: SessionKey, tokens: usize) -> Arrived {
    let book = book();
    let from = self::key("uid:9", "from");
    let (model, terms) = ("m".into(), Terms::after_use(TTL));
    let new =
        NewSession { key: from.clone(), model, terms, history: Default::default(), cache_salt: "s".into() };
    book.create(new).unwrap();
    let request = TurnRequest {
        model: None,
        input: InputKind::Raw,
        expected_token_count: None,
        input_bytes: 0,
        history: None,
    };
    let (guard, _) = book.begin(&from, &request, ()).unwrap();
    guard.commit(vec![7; tokens], TurnContent::Raw).unwrap();
    let Snapshot { outline, contents } = book.snapshot(&from).unwrap();
    let mut joined = Joined::default();
    for record in Pieces::new(&outline, contents.unwrap()) {
        joined.add(&record.outline, &record.content, usize::MAX).unwrap();
    }
    let (outline, contents) = joined.into_session().unwrap();
    let terms = Terms::after_use(TTL);
    Arrived { key, model: "m".into(), terms, outline, contents, replace: None }
}

fn bytes(book: &SessionBook<()>, owner: &str) -> u64 {
    book.totals(Some(&owner.into())).bytes
}

fn names(book: &SessionBook<()>, owner: &str) -> Vec<SessionName> {
    let page = ListPage { after: None, size: 10, filter: SessionFilter::default() };
    book.list(&owner.into(), &page).0.into_iter().map(|view| view.key.name).collect()
}

#[test]
fn a_session_that_came_is_the_owners_and_goes_on() {
    let book = book();
    let incoming = book.expect(&"uid:1".into());
    let view = book.take_in(incoming, arrived(key("uid:1", "a"), 10)).unwrap();
    assert_eq!((view.key, view.token_count, &*view.cache_salt), (key("uid:1", "a"), 10, "s"));
    assert_eq!(view.used, Still.wall());
    assert_eq!(book.read(&key("uid:1", "a"), |session| Ok(session.tokens().len())), Ok(10));
    assert!(book.cold(&key("uid:1", "a")).is_none());
    assert_eq!(view.bytes, bytes(&book, "uid:1"));
    let snapshot = book.snapshot(&key("uid:1", "a")).unwrap();
    assert_ne!(snapshot.outline.id.0, 0, "it has a number of this book");
}

#[test]
fn bytes_on_their_way_are_counted_until_they_are_dropped() {
    let book = book();
    let owner = "uid:1".into();
    let (mut one, mut other) = (book.expect(&owner), book.expect(&owner));
    book.grow(&mut one, 9_000).unwrap();
    book.grow(&mut one, 10_000).unwrap();
    assert_eq!(bytes(&book, "uid:1"), 10_000);
    let full = Error::SessionLimit { limit: "sessions_bytes_max", value: 12_000 };
    assert_eq!(book.grow(&mut other, 3_000), Err(full));
    // Nobody forgets an owner whose session is on its way.
    assert!(book.sweep().is_empty());
    drop(one);
    book.grow(&mut other, 3_000).unwrap();
    assert_eq!(bytes(&book, "uid:1"), 3_000);
    drop(other);
    assert_eq!(bytes(&book, "uid:1"), 0);
}

#[test]
fn what_is_refused_leaves_nothing_behind() {
    let book = book();
    let take_in = |arrived: Arrived| book.take_in(book.expect(&"uid:1".into()), arrived);
    take_in(arrived(key("uid:1", "a"), 10)).unwrap();
    let held = bytes(&book, "uid:1");
    assert_eq!(take_in(arrived(key("uid:1", "a"), 10)), Err(Error::SessionExists("a".into())));
    let large = take_in(arrived(key("uid:1", "b"), 2_400));
    assert_eq!(large, Err(Error::SessionLimit { limit: "session_bytes_max", value: 10_000 }));
    let labels = Arc::new((0..3).map(|n| (n.to_string(), String::new())).collect());
    let labelled = arrived(key("uid:1", "b"), 10);
    let refused = take_in(Arrived { terms: Terms { labels, ..labelled.terms.clone() }, ..labelled });
    assert_eq!(refused, Err(Error::SessionLimit { limit: "session_labels_max", value: 2 }));
    assert_eq!((names(&book, "uid:1"), bytes(&book, "uid:1")), (vec!["a".into()], held));
    take_in(arrived(key("uid:1", "b"), 10)).unwrap();
    let many = Error::SessionLimit { limit: "sessions_max", value: 2 };
    assert_eq!(book.refuse_arrival(&key("uid:1", "c"), None), Err(many.clone()));
    assert_eq!(take_in(arrived(key("uid:1", "c"), 10)), Err(many));
    assert_eq!(book.refuse_arrival(&key("uid:2", "a"), None), Ok(()));
}

#[test]
fn a_session_that_came_takes_the_place_of_another_in_one_step_or_that_one_stays() {
    let book = book();
    let a = key("uid:1", "a");
    let take_in = |tokens: usize, expected_token_count: Option<u32>| {
        let replace = Some(Replace { expected_token_count });
        book.take_in(book.expect(&"uid:1".into()), Arrived { replace, ..arrived(a.clone(), tokens) })
    };
    let refusal = |expected, actual| Error::SessionMoved { session: "a".into(), expected, actual };
    assert_eq!(take_in(10, Some(3)), Err(refusal(3, 0)));
    let first = take_in(10, Some(0)).unwrap();
    let held = bytes(&book, "uid:1");
    // What is refused leaves all of it as it was.
    assert_eq!(take_in(20, Some(9)), Err(refusal(9, 10)));
    let large = Error::SessionLimit { limit: "session_bytes_max", value: 10_000 };
    assert_eq!(take_in(2_400, Some(10)), Err(large));
    let request = TurnRequest {
        model: None,
        input: InputKind::Raw,
        expected_token_count: None,
        input_bytes: 0,
        history: None,
    };
    let (turn, _) = book.begin(&a, &request, ()).unwrap();
    assert_eq!(take_in(20, None), Err(Error::SessionBusy("a".into())));
    drop(turn);
    let still = book.read(&a, |session| Ok(session.view())).unwrap();
    assert_eq!((still.id, still.tokens, bytes(&book, "uid:1")), (first.id, first.tokens, held));
    // The one that goes does not count as one of two.
    book.take_in(book.expect(&"uid:1".into()), arrived(key("uid:1", "b"), 10)).unwrap();
    let second = take_in(20, Some(10)).unwrap();
    assert_eq!((second.token_count, names(&book, "uid:1").len()), (20, 2));
    assert_ne!(second.id, first.id);
    assert_eq!(book.take_gone(), [first.id]);
    assert!(book.owner_of(first.id).is_none() && book.owner_of(second.id).is_some());
}
