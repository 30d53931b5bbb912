//! Watching sessions: the owner's alone, whoever reads slowly, until the daemon ends.

use mlxd_client::v1::session_service_client::SessionServiceClient;
use mlxd_client::v1::{
    DeleteSessionRequest, ErrorReason, ForkSessionRequest, SessionChange, SessionChangeKind as Kind,
    UpdateSessionRequest, WatchSessionsRequest, WatchSessionsResponse, watch_sessions_response::Event,
};
use mlxd_client::{Client, WatchStream};
use tonic::Code;

use crate::daemon::connections::{client, on_tcp};
use crate::daemon::harness::{Daemon, MODEL, create, prompt, turn};

async fn delete(client: &Client, name: &str) {
    client.delete_session(DeleteSessionRequest { name: name.into() }).await.unwrap();
}

/// Reads until the changes begin; returns the names of what was there.
async fn ready(stream: &mut WatchStream) -> Vec<String> {
    let mut names = Vec::new();
    loop {
        match stream.next_event().await.unwrap().unwrap() {
            Event::Change(change) => {
                assert_eq!(change.kind(), Kind::Listed);
                assert_eq!(change.session.unwrap().name, change.name);
                names.push(change.name);
            }
            Event::Ready(_) => return names,
        }
    }
}

async fn change(stream: &mut WatchStream) -> SessionChange {
    match stream.next_event().await.unwrap().unwrap() {
        Event::Change(change) => change,
        Event::Ready(_) => panic!("ready twice"),
    }
}

/// Reads until a session is told with this kind.
async fn until(stream: &mut WatchStream, name: &str, kind: Kind) -> SessionChange {
    loop {
        let change = change(stream).await;
        if (change.name.as_str(), change.kind()) == (name, kind) {
            return change;
        }
    }
}

#[tokio::test]
async fn a_watcher_is_told_what_there_is_and_what_becomes_of_it() {
    let daemon = Daemon::start().await;
    create(&daemon.client, "b", MODEL).await;
    create(&daemon.client, "a", MODEL).await;
    let mut stream = daemon.client.watch_sessions(WatchSessionsRequest::default()).await.unwrap();
    assert_eq!(ready(&mut stream).await, ["a", "b"]);
    create(&daemon.client, "c", MODEL).await;
    let created = change(&mut stream).await;
    assert_eq!((created.kind(), created.name.as_str()), (Kind::Created, "c"));
    assert_eq!(created.session.unwrap().model, MODEL);

    let mut running = daemon.client.stream_generate(turn("a", "hang")).await.unwrap();
    running.next_event().await.unwrap();
    let busy = until(&mut stream, "a", Kind::Changed).await;
    assert!(busy.session.unwrap().busy && busy.changed_fields.contains(&"busy".into()));
    drop(running);
    let idle = until(&mut stream, "a", Kind::Changed).await;
    assert!(!idle.session.unwrap().busy);

    daemon.client.generate(turn("b", "one")).await.unwrap();
    loop {
        let turned = until(&mut stream, "b", Kind::Changed).await;
        let session = turned.session.unwrap();
        if session.turns.len() == 1 {
            assert!(session.token_count > 0 && turned.changed_fields.contains(&"token_count".into()));
            break;
        }
    }
    let labels = [("k".to_owned(), "v".to_owned())].into();
    let update = UpdateSessionRequest { name: "c".into(), labels, pinned: Some(true), ..Default::default() };
    daemon.client.update_session(update).await.unwrap();
    let updated = until(&mut stream, "c", Kind::Changed).await;
    for field in ["labels", "pinned"] {
        assert!(updated.changed_fields.contains(&field.to_owned()), "{:?}", updated.changed_fields);
    }
    let fork = ForkSessionRequest { name: "b".into(), new_name: "d".into(), ..Default::default() };
    daemon.client.fork_session(fork).await.unwrap();
    assert_eq!(until(&mut stream, "d", Kind::Created).await.session.unwrap().turns.len(), 1);
    delete(&daemon.client, "b").await;
    assert_eq!(until(&mut stream, "b", Kind::Deleted).await.session, None);
}

#[tokio::test]
async fn a_watch_ends_with_the_daemon_and_says_so() {
    let mut daemon = Daemon::start().await;
    let request = WatchSessionsRequest { changes_only: true, ..Default::default() };
    let mut stream = daemon.client.watch_sessions(request).await.unwrap();
    assert!(ready(&mut stream).await.is_empty());
    daemon.stop();
    let error = stream.next_event().await.unwrap_err();
    let call = error.call().unwrap();
    assert_eq!((call.code, call.reason), (Code::Unavailable, ErrorReason::Draining));
    assert!(error.is_retryable());
    drop(stream);
    daemon.ended().await.unwrap();
}

#[tokio::test]
async fn a_watcher_sees_only_its_own_sessions() {
    let (daemon, _token) = on_tcp(|_| {}).await;
    create(&daemon.client, "mine", MODEL).await;
    let other = client(&daemon, "secret").await;
    let mut stream = other.watch_sessions(WatchSessionsRequest::default()).await.unwrap();
    assert!(ready(&mut stream).await.is_empty());
    create(&daemon.client, "also-mine", MODEL).await;
    daemon.client.generate(turn("mine", "one")).await.unwrap();
    delete(&daemon.client, "mine").await;
    create(&other, "theirs", MODEL).await;
    assert_eq!(change(&mut stream).await.name, "theirs");
}

#[tokio::test]
async fn a_watch_has_the_filter_of_a_list_and_a_limit() {
    let daemon = Daemon::with(|config| config.limits.session_watches_max = 1).await;
    create(&daemon.client, "x/1", MODEL).await;
    create(&daemon.client, "y/1", MODEL).await;
    let filter = WatchSessionsRequest { name_prefix: "x/".into(), ..Default::default() };
    let mut stream = daemon.client.watch_sessions(filter.clone()).await.unwrap();
    assert_eq!(ready(&mut stream).await, ["x/1"]);
    delete(&daemon.client, "y/1").await;
    delete(&daemon.client, "x/1").await;
    let gone = change(&mut stream).await;
    assert_eq!((gone.name.as_str(), gone.kind()), ("x/1", Kind::Deleted));
    let error = daemon.client.watch_sessions(filter.clone()).await.map(drop).unwrap_err();
    let call = error.call().unwrap();
    assert_eq!((call.code, call.reason), (Code::ResourceExhausted, ErrorReason::SessionLimit));
    assert_eq!(call.metadata["limit"], "session_watches_max");
    drop(stream);
    // The daemon learns that the caller has left.
    while daemon.client.watch_sessions(filter.clone()).await.is_err() {}
    let bad = WatchSessionsRequest { name_prefix: "a b".into(), ..Default::default() };
    let refused = daemon.client.watch_sessions(bad).await.map(drop).unwrap_err();
    assert_eq!(refused.reason(), ErrorReason::InvalidField);
}

#[tokio::test]
async fn one_that_never_reads_keeps_nobody_waiting_and_learns_the_last_state() {
    let daemon = Daemon::start().await;
    create(&daemon.client, "s", MODEL).await;
    let mut calls = SessionServiceClient::new(daemon.narrow().await);
    let mut stream = calls.watch_sessions(WatchSessionsRequest::default()).await.unwrap().into_inner();
    // More than an unread connection holds.
    let note = "x".repeat(1000);
    for number in 0..300 {
        let labels = [("note".to_owned(), format!("{note}{number}"))].into();
        let update = UpdateSessionRequest { name: "s".into(), labels, ..Default::default() };
        daemon.client.update_session(update).await.unwrap();
    }
    daemon.client.generate(prompt("a")).await.unwrap();
    delete(&daemon.client, "s").await;
    loop {
        let WatchSessionsResponse { event } = stream.message().await.unwrap().unwrap();
        if let Some(Event::Change(change)) = event
            && change.kind() == Kind::Deleted
        {
            assert_eq!(change.name, "s");
            break;
        }
    }
}
