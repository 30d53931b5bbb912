//! To others a session does not exist: every call about it answers as for one that never was.

use mlxd_client::v1::{
    CreateSessionRequest, DeleteSessionRequest, ErrorReason, ExportSessionRequest, ExtendSessionRequest,
    ForkSessionRequest, GetModelRequest, GetSessionRequest, GetStatsRequest, ListModelsRequest,
    ListSessionsRequest, SaveSessionRequest, ScoreRequest, TruncateSessionRequest, UpdateSessionRequest,
    score_request, truncate_session_request::To,
};
use mlxd_client::{Client, Error};

use crate::daemon::connections::{client, on_tcp};
use crate::daemon::harness::{MODEL, turn};

/// The same calls about a session, by whoever asks.
async fn calls(client: &Client, name: &str) -> Vec<Error> {
    let name = || name.to_owned();
    let input = Some(score_request::Input::Text("a".into()));
    let score = ScoreRequest { session: name(), input, ..Default::default() };
    let cut = TruncateSessionRequest { name: name(), to: Some(To::TurnCount(0)), ..Default::default() };
    let fork = ForkSessionRequest { name: name(), new_name: "mine".into(), ..Default::default() };
    let get = GetSessionRequest { name: name(), ..Default::default() };
    let export = ExportSessionRequest { name: name(), ..Default::default() };
    let save = SaveSessionRequest { name: name(), ..Default::default() };
    let update = UpdateSessionRequest { name: name(), pinned: Some(true), ..Default::default() };
    vec![
        client.get_session(get).await.unwrap_err(),
        client.update_session(update).await.unwrap_err(),
        client.extend_session(ExtendSessionRequest::prompt(name(), "x")).await.unwrap_err(),
        client.fork_session(fork).await.unwrap_err(),
        client.truncate_session(cut).await.unwrap_err(),
        client.delete_session(DeleteSessionRequest { name: name() }).await.unwrap_err(),
        client.export_session(export).await.map(drop).unwrap_err(),
        client.save_session(save).await.unwrap_err(),
        client.generate(turn(&name(), "x")).await.unwrap_err(),
        client.stream_generate(turn(&name(), "x")).await.map(drop).unwrap_err(),
        client.score(score).await.unwrap_err(),
    ]
}

/// What an error says, without the name that was asked for.
fn said(error: &Error, name: &str) -> (ErrorReason, String, Vec<String>) {
    let call = error.call().unwrap();
    let mut metadata: Vec<String> = call.metadata.values().map(|value| value.replace(name, "?")).collect();
    metadata.sort_unstable();
    (call.reason, call.message.replace(name, "?"), metadata)
}

#[tokio::test]
async fn to_another_principal_a_session_answers_as_one_that_never_was() {
    let (daemon, _token) = on_tcp(|_| {}).await;
    let request = CreateSessionRequest { name: "secret".into(), model: MODEL.into(), ..Default::default() };
    daemon.client.create_session(request.clone()).await.unwrap();
    daemon.client.generate(turn("secret", "one")).await.unwrap();
    let other = client(&daemon, "secret").await;
    let (theirs, none) = (calls(&other, "secret").await, calls(&other, "absent").await);
    for (theirs, none) in theirs.iter().zip(&none) {
        assert_eq!(said(theirs, "secret"), said(none, "absent"));
        assert_eq!(theirs.reason(), ErrorReason::SessionNotFound);
    }
    // The name is free, and what has it then is another session.
    assert_eq!(other.create_session(request).await.unwrap().token_count, 0);
    let own = daemon.client.get_session(GetSessionRequest { name: "secret".into(), ..Default::default() });
    assert_eq!(own.await.unwrap().session.unwrap().turns.len(), 1);
}

#[tokio::test]
async fn lists_and_counts_do_not_tell_of_others_sessions() {
    let (daemon, _token) = on_tcp(|_| {}).await;
    let request = |name: &str| {
        let (name, model) = (name.to_owned(), MODEL.to_owned());
        CreateSessionRequest { name, model, pinned: true, ..Default::default() }
    };
    for name in ["a", "b"] {
        daemon.client.create_session(request(name)).await.unwrap();
    }
    daemon.client.generate(turn("a", "one")).await.unwrap();
    let other = client(&daemon, "secret").await;
    let seen = async || {
        let sessions = other.list_sessions(ListSessionsRequest::default()).await.unwrap().sessions.len();
        let stats = other.get_stats(GetStatsRequest {}).await.unwrap();
        let models = other.list_models(ListModelsRequest::default()).await.unwrap().models;
        let model = other.get_model(GetModelRequest { model: MODEL.into() }).await.unwrap();
        let counts = [stats.sessions, stats.pinned_sessions, stats.busy_sessions, model.session_count];
        (sessions, counts, models[0].session_count, stats.session_bytes)
    };
    assert_eq!(seen().await, (0, [0; 4], 0, 0));
    other.create_session(request("a")).await.unwrap();
    let (sessions, counts, listed, bytes) = seen().await;
    assert_eq!((sessions, counts, listed), (1, [1, 1, 0, 1], 1));
    assert!(bytes > 0);
    // Nor do they tell what is cached or was computed of others.
    let stats = other.get_stats(GetStatsRequest {}).await.unwrap();
    let (memory, slabs) = (stats.memory.unwrap(), stats.slabs);
    let caches = [memory.kv_idle_bytes, memory.kv_reserved_bytes, memory.snapshot_bytes];
    let process = [memory.mlx_active_bytes, memory.mlx_peak_bytes, memory.process_resident_bytes];
    assert_eq!((caches, process), ([0; 3], [0; 3]));
    let tokens = [stats.prefill_tokens_total, stats.cached_tokens_total, stats.decode_tokens_total];
    assert_eq!((tokens, stats.steps_total), ([0; 3], 0));
    assert!(memory.weight_bytes > 0 && slabs.is_empty());
    let model = other.get_model(GetModelRequest { model: MODEL.into() }).await.unwrap();
    assert_eq!(model.kv_idle_bytes, 0);
    // The daemon's own user sees how many there are of all.
    let all = daemon.client.get_stats(GetStatsRequest {}).await.unwrap();
    assert_eq!((all.sessions, all.pinned_sessions), (3, 3));
    assert!(all.memory.unwrap().kv_idle_bytes > 0);
    assert_eq!(daemon.client.list_sessions(ListSessionsRequest::default()).await.unwrap().sessions.len(), 2);
}
