//! Terms of sessions over the wire: lifetimes, labels, pins, lists of some; and where a session can be cut.

use std::collections::HashMap;
use std::time::Duration;

use mlxd::clock::{Clock as _, SystemClock};
use mlxd_client::Error;
use mlxd_client::v1::{
    CreateSessionRequest, ErrorReason, ForkSessionRequest, GenerateRequest, GetSessionRequest,
    ListSessionsRequest, Message, Session, TruncateSessionRequest, UpdateSessionRequest,
    truncate_session_request::To, update_session_request::Lifetime,
};
use prost_types::Timestamp;

use crate::daemon::folder::{END, answer_start, ids, message};
use crate::daemon::harness::{Daemon, MODEL, prompt, turn};

fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn session(name: &str, pairs: &[(&str, &str)]) -> CreateSessionRequest {
    let (name, model) = (name.to_owned(), MODEL.to_owned());
    CreateSessionRequest { name, model, labels: labels(pairs), ..Default::default() }
}

fn update(name: &str) -> UpdateSessionRequest {
    UpdateSessionRequest { name: name.into(), ..Default::default() }
}

async fn names(daemon: &Daemon, request: ListSessionsRequest) -> Vec<String> {
    let (mut names, mut request) = (Vec::new(), ListSessionsRequest { page_size: 1, ..request });
    loop {
        let page = daemon.client.list_sessions(request.clone()).await.unwrap();
        names.extend(page.sessions.into_iter().map(|session| session.name));
        if page.next_page_token.is_empty() {
            return names;
        }
        request.page_token = page.next_page_token;
    }
}

fn field<T: std::fmt::Debug>(outcome: Result<T, Error>) -> String {
    outcome.unwrap_err().call().unwrap().metadata["field"].clone()
}

fn limit<T: std::fmt::Debug>(outcome: Result<T, Error>) -> String {
    let error = outcome.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::SessionLimit);
    error.call().unwrap().metadata["limit"].clone()
}

#[tokio::test]
async fn labels_are_set_replaced_and_removed_and_sessions_found_by_them() {
    let daemon = Daemon::start().await;
    for (name, kind) in [("a/1", "chat"), ("a/2", "test"), ("b/1", "test")] {
        let created = daemon.client.create_session(session(name, &[("kind", kind), ("by", "me")])).await;
        assert_eq!(created.unwrap().labels, labels(&[("kind", kind), ("by", "me")]));
    }
    let test = || ListSessionsRequest { labels: labels(&[("kind", "test")]), ..Default::default() };
    assert_eq!(names(&daemon, test()).await, ["a/2", "b/1"]);
    let in_a = ListSessionsRequest { name_prefix: "a/".into(), ..test() };
    assert_eq!(names(&daemon, in_a).await, ["a/2"]);
    let change = UpdateSessionRequest {
        labels: labels(&[("kind", "test"), ("more", "")]),
        remove_labels: vec!["by".into(), "unknown".into()],
        ..update("a/1")
    };
    let changed = daemon.client.update_session(change).await.unwrap();
    assert_eq!(changed.labels, labels(&[("kind", "test"), ("more", "")]));
    assert_eq!(names(&daemon, test()).await, ["a/1", "a/2", "b/1"]);
    let fork = ForkSessionRequest { name: "a/1".into(), new_name: "f".into(), ..Default::default() };
    assert_eq!(daemon.client.fork_session(fork).await.unwrap().labels, changed.labels);
}

#[tokio::test]
async fn labels_and_filters_have_limits() {
    let daemon = Daemon::with(|config| config.limits.session_labels_max = 1).await;
    let two = session("a", &[("a", "1"), ("b", "2")]);
    assert_eq!(limit(daemon.client.create_session(two).await), "session_labels_max");
    daemon.client.create_session(session("a", &[("a", "1")])).await.unwrap();
    let set = |pairs: &[(&str, &str)]| UpdateSessionRequest { labels: labels(pairs), ..update("a") };
    assert_eq!(limit(daemon.client.update_session(set(&[("b", "2")])).await), "session_labels_max");
    assert_eq!(field(daemon.client.update_session(set(&[("a b", "2")])).await), "labels");
    let long = "x".repeat(1025);
    assert_eq!(field(daemon.client.update_session(set(&[("a", &long)])).await), "labels[a]");
    let keys = UpdateSessionRequest { remove_labels: vec!["a".into(), "b".into()], ..update("a") };
    assert_eq!(field(daemon.client.update_session(keys).await), "remove_labels");
    let list = |pairs: &[(&str, &str)], name_prefix: &str| ListSessionsRequest {
        labels: labels(pairs),
        name_prefix: name_prefix.into(),
        ..Default::default()
    };
    assert_eq!(field(daemon.client.list_sessions(list(&[("a", ""), ("b", "")], "")).await), "labels");
    assert_eq!(field(daemon.client.list_sessions(list(&[], "a*")).await), "name_prefix");
}

#[tokio::test]
async fn a_pinned_session_does_not_expire_and_the_engine_knows_of_it() {
    let daemon = Daemon::with(|config| config.limits.sessions_pinned_max = 1).await;
    let pinned = CreateSessionRequest { pinned: true, ..session("a", &[]) };
    let created = daemon.client.create_session(pinned.clone()).await.unwrap();
    assert!(created.pinned && created.expire_time.is_none() && created.ttl.is_some());
    let other = CreateSessionRequest { name: "b".into(), ..pinned };
    assert_eq!(limit(daemon.client.create_session(other).await), "sessions_pinned_max");
    daemon.client.generate(turn("a", "one")).await.unwrap();
    let fork = ForkSessionRequest { name: "a".into(), new_name: "f".into(), ..Default::default() };
    assert_eq!(limit(daemon.client.fork_session(fork.clone()).await), "sessions_pinned_max");
    let free = ForkSessionRequest { pinned: Some(false), ..fork };
    assert!(!daemon.client.fork_session(free).await.unwrap().pinned);
    let only = |pinned| ListSessionsRequest { pinned: Some(pinned), ..Default::default() };
    assert_eq!(
        (names(&daemon, only(true)).await, names(&daemon, only(false)).await),
        (vec!["a".to_owned()], vec!["f".to_owned()])
    );
    let unpin = UpdateSessionRequest { pinned: Some(false), ..update("a") };
    assert!(daemon.client.update_session(unpin).await.unwrap().expire_time.is_some());
    daemon.client.generate(turn("a", "two")).await.unwrap();
    assert_eq!(daemon.engine.pinned(), [true, false]);
    let pins = daemon.engine.pins();
    assert!(pins.len() == 1 && pins[0].0.ends_with("/a") && !pins[0].1);
}

#[tokio::test]
async fn a_lifetime_follows_use_or_ends_at_a_given_time() {
    let daemon = Daemon::start().await;
    let at = |seconds| Timestamp::from(SystemClock::new().wall() + Duration::from_secs(seconds));
    let end = at(3600);
    let request = CreateSessionRequest { expire_time: Some(end), ..session("a", &[]) };
    let created = daemon.client.create_session(request.clone()).await.unwrap();
    assert_eq!((created.expire_time, created.ttl), (Some(end), None));
    daemon.client.generate(turn("a", "one")).await.unwrap();
    let get = GetSessionRequest { name: "a".into(), ..Default::default() };
    let used = daemon.client.get_session(get).await.unwrap().session.unwrap();
    assert_eq!(used.expire_time, Some(end));
    let ttl = prost_types::Duration { seconds: 60, nanos: 0 };
    let both = CreateSessionRequest { name: "b".into(), ttl: Some(ttl), ..request };
    assert_eq!(field(daemon.client.create_session(both).await), "expire_time");
    let set = |lifetime| UpdateSessionRequest { lifetime: Some(lifetime), ..update("a") };
    let changed = daemon.client.update_session(set(Lifetime::Ttl(ttl))).await.unwrap();
    assert!(changed.ttl == Some(ttl) && changed.expire_time.unwrap().seconds <= at(60).seconds);
    for bad in [at(0), at(1 << 32), Timestamp { seconds: 0, nanos: -1 }] {
        let refused = daemon.client.update_session(set(Lifetime::ExpireTime(bad))).await;
        assert_eq!(field(refused), "expire_time");
    }
    let gone = UpdateSessionRequest { name: "none".into(), ..Default::default() };
    let error = daemon.client.update_session(gone).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::SessionNotFound);
}

async fn cut(daemon: &Daemon, to: To) -> Result<Session, Error> {
    let request = TruncateSessionRequest { name: "s".into(), to: Some(to), ..Default::default() };
    daemon.client.truncate_session(request).await
}

async fn held(daemon: &Daemon) -> (Vec<String>, Vec<u32>) {
    let name = "s".into();
    let request =
        GetSessionRequest { name, include_messages: true, include_token_ids: true, ..Default::default() };
    let got = daemon.client.get_session(request).await.unwrap();
    (got.messages.iter().map(Message::text).collect(), got.token_ids)
}

fn tokens(count: usize) -> To {
    To::TokenCount(u32::try_from(count).unwrap())
}

#[tokio::test]
async fn an_answer_is_cut_to_its_remaining_tokens_and_the_next_turn_goes_on_from_there() {
    let daemon = Daemon::start().await;
    daemon.client.create_session(session("s", &[])).await.unwrap();
    daemon.client.generate(turn("s", "one")).await.unwrap();
    let asked = [message("user", "one"), answer_start()].concat();
    // Of "yes" and the end of the turn, "ye" is left.
    assert_eq!(cut(&daemon, tokens(asked.len() + 2)).await.unwrap().token_count as usize, asked.len() + 2);
    let remaining = [asked.clone(), ids("ye")].concat();
    assert_eq!(held(&daemon).await, (vec!["one".into(), "ye".into()], remaining.clone()));
    daemon.client.generate(turn("s", "two")).await.unwrap();
    let context = [remaining, vec![END], message("user", "two"), answer_start()].concat();
    assert_eq!(daemon.engine.last_context(), context);
    assert_eq!(held(&daemon).await.0, ["one", "ye", "two", "yes"]);
}

#[tokio::test]
async fn an_answer_is_left_out_by_its_first_token_or_by_its_message() {
    let daemon = Daemon::start().await;
    daemon.client.create_session(session("s", &[])).await.unwrap();
    let asked = [message("user", "one"), answer_start()].concat();
    for to in [tokens(asked.len()), To::MessageCount(1)] {
        cut(&daemon, To::TurnCount(0)).await.unwrap();
        daemon.client.generate(turn("s", "one")).await.unwrap();
        cut(&daemon, to).await.unwrap();
        assert_eq!(held(&daemon).await, (vec!["one".into()], asked.clone()));
    }
    daemon.client.generate(turn("s", "two")).await.unwrap();
    let context = [message("user", "one"), message("user", "two"), answer_start()].concat();
    assert_eq!(daemon.engine.last_context(), context);
    assert_eq!(held(&daemon).await.0, ["one", "two", "yes"]);
    assert_eq!(field(cut(&daemon, To::MessageCount(9)).await), "message_count");
}

#[tokio::test]
async fn a_text_that_is_cut_before_its_answer_is_continued_raw_or_rendered_anew() {
    let daemon = Daemon::start().await;
    daemon.client.create_session(session("s", &[])).await.unwrap();
    for text in ["one", "two"] {
        daemon.client.generate(turn("s", text)).await.unwrap();
    }
    let first = [message("user", "one"), answer_start(), ids("yes"), vec![END]].concat();
    let after = [first.clone(), message("user", "two")].concat();
    cut(&daemon, tokens(first.len() + 2)).await.unwrap();
    let remaining = after[..first.len() + 2].to_vec();
    assert_eq!(held(&daemon).await, (vec!["one".into(), "yes".into()], remaining.clone()));
    let fork = ForkSessionRequest { name: "s".into(), new_name: "raw".into(), ..Default::default() };
    daemon.client.fork_session(fork).await.unwrap();
    daemon.client.generate(GenerateRequest { session: "raw".into(), ..prompt("x") }).await.unwrap();
    assert_eq!(daemon.engine.last_context(), [remaining, ids("x")].concat());
    daemon.client.generate(turn("s", "three")).await.unwrap();
    let context = [first, message("user", "three"), answer_start()].concat();
    assert_eq!(daemon.engine.last_context(), context);
}

#[tokio::test]
async fn a_fork_begins_at_the_end_of_a_turn() {
    let daemon = Daemon::start().await;
    daemon.client.create_session(session("s", &[])).await.unwrap();
    for text in ["one", "two"] {
        daemon.client.generate(turn("s", text)).await.unwrap();
    }
    let at = |turns| ForkSessionRequest {
        name: "s".into(),
        new_name: format!("f{turns}"),
        turn_count: Some(turns),
        ..Default::default()
    };
    assert_eq!(daemon.client.fork_session(at(1)).await.unwrap().turns.len(), 1);
    assert_eq!(field(daemon.client.fork_session(at(3)).await), "turn_count");
    daemon.client.generate(turn("f1", "three")).await.unwrap();
    let context = [message("user", "one"), answer_start(), ids("yes"), vec![END]].concat();
    let context = [context, message("user", "three"), answer_start()].concat();
    assert_eq!(daemon.engine.last_context(), context);
}
