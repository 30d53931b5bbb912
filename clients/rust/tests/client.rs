//! The client against a fake daemon on a real socket.

#![allow(clippy::expect_used, reason = "helpers of tests")]

mod fake;

use std::time::Duration;

use fake::FakeDaemon;
use mlxd_client::v1::{
    CountTokensRequest, CreateSessionRequest, DeleteSessionRequest, ExportSessionRequest,
    ExtendSessionRequest, ForkSessionRequest, GenerateRequest, GetModelRequest, ImportStart,
    LoadModelRequest, LoadPhase, Message, ScoreRequest, SessionChangeKind, TokenIds, TruncateSessionRequest,
    UpdateSessionRequest, WatchSessionsRequest, load_model_response, score_request,
    stream_generate_response::Event, truncate_session_request, watch_sessions_response,
};
use mlxd_client::{BearerToken, Client, ConnectOptions, Error, ErrorReason, Request};

async fn start() -> (FakeDaemon, Client) {
    let fake = FakeDaemon::start();
    let client = Client::connect(&format!("unix://{}", fake.socket().display())).await.expect("connects");
    (fake, client)
}

fn chat(text: &str) -> GenerateRequest {
    GenerateRequest { model: "tiny".into(), ..GenerateRequest::chat(text) }
}

#[tokio::test]
async fn deltas_add_up_to_the_whole_answer() {
    let (_fake, client) = start().await;
    let whole = client.generate(chat("good morning")).await.unwrap();
    let stream = client.stream_generate(chat("good morning")).await.unwrap();
    assert_eq!(stream.request_id(), "fake");
    let (text, finished) = stream.collect_text().await.unwrap();
    assert_eq!(text, "You said: good morning");
    assert_eq!(text, whole.text);
    assert_eq!(finished.usage, whole.usage);
}

#[tokio::test]
async fn a_dropped_stream_cancels_its_call() {
    let (fake, client) = start().await;
    let mut stream = client.stream_generate(chat("hang")).await.unwrap();
    let first = stream.next_event().await.unwrap().unwrap();
    assert!(matches!(first, Event::Started(_)));
    assert_eq!(fake.state().cancelled, 0);
    drop(stream);
    fake.until("the fake notices", |state| state.cancelled == 1).await;
}

#[tokio::test]
async fn a_stream_without_its_last_event_is_an_error() {
    let (_fake, client) = start().await;
    let error = client.stream_generate(chat("cut")).await.unwrap().collect_text().await.unwrap_err();
    assert!(matches!(error, Error::Incomplete { missing: "finished event", .. }), "{error}");
}

#[tokio::test]
async fn errors_carry_reason_and_numbers_before_and_within_a_stream() {
    let (_fake, client) = start().await;
    let error = client.stream_generate(chat("overflow")).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::ContextOverflow);
    assert_eq!(error.call().unwrap().metadata["prompt_tokens"], "3000");
    assert!(!error.is_retryable());

    let mut stream = client.stream_generate(chat("die")).await.unwrap();
    let error = loop {
        match stream.next_event().await {
            Ok(event) => assert!(event.is_some()),
            Err(error) => break error,
        }
    };
    assert_eq!(error.reason(), ErrorReason::NonFiniteLogits);
    assert_eq!(error.call().unwrap().request_id, "fake");
    assert!(stream.next_event().await.unwrap().is_none());
}

#[tokio::test]
async fn every_call_carries_the_connections_metadata_and_an_id_of_its_own() {
    let fake = FakeDaemon::start();
    let options = ConnectOptions {
        address: Some(fake.socket().display().to_string().parse().unwrap()),
        token: Some(BearerToken::new("secret")),
        client_name: Some("tests".into()),
        timeout: Some(Duration::from_secs(1000)),
    };
    assert!(!format!("{options:?}").contains("secret"));
    let client = Client::connect_with(options).await.unwrap();
    let mut request = Request::new(CountTokensRequest::prompt("one two"));
    request.set_timeout(Duration::from_secs(9));
    request.metadata_mut().insert("x-request-id", "mine".parse().unwrap());
    assert_eq!(client.count_tokens(request).await.unwrap().token_count, 2);
    client.list_all_models(false).await.unwrap();

    let state = fake.state();
    let field =
        |call: usize, name: &str| state.calls[call].1.get(name).map(|v| v.to_str().unwrap().to_owned());
    assert_eq!(field(0, "authorization").unwrap(), "Bearer secret");
    assert_eq!(field(0, "x-mlxd-client").unwrap(), "tests");
    assert_eq!(field(0, "x-request-id").unwrap(), "mine");
    assert_eq!(field(0, "grpc-timeout").unwrap(), "9000000u", "the call's own outranks the connection's");
    assert!(field(1, "grpc-timeout").is_some());
    let drawn: Vec<_> = (1..state.calls.len()).map(|call| field(call, "x-request-id").unwrap()).collect();
    assert_eq!(drawn.len(), 2, "two pages");
    assert_ne!(drawn[0], drawn[1]);
}

#[tokio::test]
async fn lists_read_every_page() {
    let (_fake, client) = start().await;
    let names =
        |models: Vec<mlxd_client::v1::ModelInfo>| models.into_iter().map(|m| m.name).collect::<Vec<_>>();
    assert_eq!(names(client.list_all_models(false).await.unwrap()), ["owner/large", "tiny"]);
    assert_eq!(names(client.list_all_models(true).await.unwrap()), ["tiny"]);
    // All pages may be read on any thread.
    let read = tokio::spawn(async move {
        client.session_messages("none").await.unwrap_err();
        client.list_all_sessions().await.unwrap();
        client.list_all_models(true).await
    });
    assert_eq!(names(read.await.unwrap().unwrap()), ["tiny"]);
}

#[tokio::test]
async fn all_pages_of_a_list_have_one_time_limit() {
    let (fake, delay) = (FakeDaemon::start(), Duration::from_millis(20));
    // As long as a limit in microseconds can be.
    let timeout = Duration::from_secs(90);
    let address = Some(fake.socket().display().to_string().parse().unwrap());
    let options = ConnectOptions { address, timeout: Some(timeout), ..ConnectOptions::default() };
    let client = Client::connect_with(options).await.unwrap();
    for name in ["a", "b"] {
        let request = CreateSessionRequest { name: name.into(), model: "tiny".into(), ..Default::default() };
        client.create_session(request).await.unwrap();
    }
    fake.state().page_delay = delay;
    assert_eq!(client.list_all_models(false).await.unwrap().len(), 2);
    assert_eq!(client.list_all_sessions().await.unwrap().len(), 2);
    assert_eq!(client.session_messages("a").await.unwrap().len(), 2);
    for method in ["ListModels", "ListSessions", "GetSession"] {
        let state = fake.state();
        let calls = state.calls.iter().filter(|(called, _)| *called == method);
        let limit = |metadata: &tonic::metadata::MetadataMap| {
            let text = metadata.get("grpc-timeout").unwrap().to_str().unwrap();
            Duration::from_micros(text.strip_suffix('u').unwrap().parse().unwrap())
        };
        let limits: Vec<Duration> = calls.map(|(_, metadata)| limit(metadata)).collect();
        let [first, second] = limits[..] else { panic!("{method}: {limits:?}") };
        assert!(first <= timeout && second <= first - delay, "{method}: {limits:?}");
    }
}

#[tokio::test]
async fn sessions_are_created_forked_truncated_and_deleted() {
    let (_fake, client) = start().await;
    let request = CreateSessionRequest { name: "a".into(), model: "tiny".into(), ..Default::default() };
    client.create_session(request.clone()).await.unwrap();
    let exists = client.create_session(request).await.unwrap_err();
    assert_eq!(exists.reason(), ErrorReason::SessionExists);

    let turn = GenerateRequest { session: "a".into(), ..GenerateRequest::chat("hi") };
    let first = client.generate(turn.clone()).await.unwrap().session_token_count;
    client.generate(turn).await.unwrap();
    let fork = ForkSessionRequest { name: "a".into(), new_name: "b".into(), ..Default::default() };
    assert_eq!(client.fork_session(fork).await.unwrap().turns.len(), 2);
    let to = Some(truncate_session_request::To::TurnCount(1));
    let cut = TruncateSessionRequest { name: "b".into(), to, ..Default::default() };
    assert_eq!(Some(client.truncate_session(cut).await.unwrap().token_count), first);
    let extend = ExtendSessionRequest::prompt("b", "more");
    let extended = client.extend_session(extend).await.unwrap();
    assert_eq!(extended.usage.unwrap().cached_tokens, first.unwrap());
    let more = ExtendSessionRequest::messages("b", [Message::user("more")]);
    assert_eq!(client.extend_session(more).await.unwrap().session.unwrap().turns.len(), 3);
    let labels = [("kind".to_owned(), "test".to_owned())].into();
    let update = UpdateSessionRequest { name: "b".into(), labels, pinned: Some(true), ..Default::default() };
    let updated = client.update_session(update).await.unwrap();
    assert!(updated.pinned && updated.labels["kind"] == "test");
    client.delete_session(DeleteSessionRequest { name: "a".into() }).await.unwrap();
    let left = client.list_all_sessions().await.unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].name, "b");
}

#[tokio::test]
async fn a_session_is_exported_whole_and_imported_again() {
    let (_fake, client) = start().await;
    for name in ["trip", "cut"] {
        let request = CreateSessionRequest { name: name.into(), model: "tiny".into(), ..Default::default() };
        client.create_session(request).await.unwrap();
    }
    let export = |name: &str| ExportSessionRequest { name: name.into(), ..Default::default() };
    let file = client.export_session(export("trip")).await.unwrap().collect_file().await.unwrap();
    assert_eq!(file, b"file of trip");
    let cut = client.export_session(export("cut")).await.unwrap().collect_file().await.unwrap_err();
    assert!(matches!(cut, Error::Incomplete { missing: "finished event", .. }), "{cut}");

    // Empty chunks are not sent.
    let chunks = vec![Vec::new(), file[..5].to_vec(), file[5..].to_vec()];
    let start = |name: &str| ImportStart { name: name.into(), ..Default::default() };
    let copy = client.import_session_file(start("copy"), chunks.clone()).await.unwrap();
    assert_eq!((copy.name.as_str(), copy.token_count), ("copy", 3));
    let exists = client.import_session(start(""), tokio_stream::iter(chunks.clone())).await.unwrap_err();
    assert_eq!(exists.reason(), ErrorReason::SessionExists);
    let replacing = ImportStart { replace: true, ..start("") };
    assert_eq!(client.import_session_file(replacing, chunks).await.unwrap().name, "trip");
    let other = client.import_session_file(start(""), [b"something else".to_vec()]).await.unwrap_err();
    assert_eq!(other.reason(), ErrorReason::SessionFileInvalid);
}

#[tokio::test]
async fn a_watch_tells_changes_until_the_daemon_ends() {
    use watch_sessions_response::Event;
    let (_fake, client) = start().await;
    let request = CreateSessionRequest { name: "a".into(), model: "tiny".into(), ..Default::default() };
    client.create_session(request).await.unwrap();
    let mut stream = client.watch_sessions(WatchSessionsRequest::default()).await.unwrap();
    let first = stream.next_event().await.unwrap().unwrap();
    assert!(matches!(first, Event::Change(change) if change.kind() == SessionChangeKind::Listed));
    assert!(matches!(stream.next_event().await.unwrap().unwrap(), Event::Ready(_)));
    assert!(matches!(stream.next_event().await.unwrap().unwrap(), Event::Change(_)));
    let end = stream.next_event().await.unwrap_err();
    assert!(end.reason() == ErrorReason::Draining && end.is_retryable());
}

#[tokio::test]
async fn loads_stream_progress_and_dry_runs_their_answer() {
    let (_fake, client) = start().await;
    let load = LoadModelRequest { model: "owner/large".into(), ..Default::default() };
    let mut stream = client.load_model(load).await.unwrap();
    let mut events = Vec::new();
    while let Some(event) = stream.next_event().await.unwrap() {
        events.push(event);
    }
    let phases: Vec<_> = events
        .iter()
        .map_while(|event| match event {
            load_model_response::Event::Progress(step) => {
                Some((step.phase(), step.done_bytes < step.total_bytes))
            }
            _ => None,
        })
        .collect();
    let (downloading, loading) = (LoadPhase::Downloading, LoadPhase::Loading);
    let expected = [(downloading, true), (downloading, false), (loading, true), (loading, false)];
    assert_eq!(phases, [&expected[..], &[(LoadPhase::Warming, false)]].concat());
    assert!(matches!(events[5..], [load_model_response::Event::Loaded(_)]));

    let check = LoadModelRequest { model: "owner/huge".into(), validate_only: true, ..Default::default() };
    let mut stream = client.load_model(check).await.unwrap();
    let Some(load_model_response::Event::Validated(verdict)) = stream.next_event().await.unwrap() else {
        panic!("no verdict");
    };
    assert!(!verdict.fits);
}

#[tokio::test]
async fn answers_beyond_grpcs_usual_four_mebibytes_are_accepted() {
    let (_fake, client) = start().await;
    let input = Some(score_request::Input::Text("60000".into()));
    let scores = client.score(ScoreRequest { input, ..Default::default() }).await.unwrap();
    assert_eq!(scores.tokens.len(), 60_000);
    let input = Some(score_request::Input::TokenIds(TokenIds { ids: vec![5] }));
    let scores = client.score(ScoreRequest { input, ..Default::default() }).await.unwrap();
    assert_eq!(scores.tokens[0].token.as_ref().unwrap().token_id, 5);
}

#[tokio::test]
async fn a_response_without_its_resource_is_incomplete() {
    let (_fake, client) = start().await;
    let error = client.get_model(GetModelRequest { model: "nothing".into() }).await.unwrap_err();
    assert!(matches!(error, Error::Incomplete { missing: "model", .. }), "{error}");
}

#[tokio::test]
async fn without_a_daemon_connecting_fails_and_names_the_address() {
    let error = Client::connect("unix:///nonexistent/mlxd.sock").await.unwrap_err();
    assert!(error.is_retryable());
    assert_eq!(error.to_string(), "no daemon answers at unix:///nonexistent/mlxd.sock");
    let error = Client::connect("https://localhost:1").await.unwrap_err();
    assert!(matches!(error, Error::InvalidOption { option: "address", .. }));
    assert!(!error.is_retryable());
}

#[tokio::test]
async fn a_token_that_a_header_cannot_carry_is_refused_before_anything_is_sent() {
    let options = ConnectOptions { token: Some(BearerToken::new("a\nb")), ..ConnectOptions::default() };
    let options = ConnectOptions { address: Some("/x".parse().unwrap()), ..options };
    let error = Client::connect_with(options).await.unwrap_err();
    assert!(matches!(error, Error::InvalidOption { option: "token", .. }), "{error}");
}

#[tokio::test]
async fn a_tokens_last_line_end_is_not_sent() {
    let fake = FakeDaemon::start();
    let address = Some(fake.socket().display().to_string().parse().unwrap());
    let options =
        ConnectOptions { address, token: Some(BearerToken::new("secret\n")), ..ConnectOptions::default() };
    Client::connect_with(options).await.unwrap().list_all_sessions().await.unwrap();
    assert_eq!(fake.state().calls[0].1.get("authorization").unwrap(), "Bearer secret");
}

#[tokio::test]
async fn a_stream_that_outlasts_its_timeout_ends_with_deadline() {
    let (_fake, client) = start().await;
    let mut request = Request::new(chat("hang"));
    request.set_timeout(Duration::from_millis(100));
    let ended = async { client.stream_generate(request).await?.collect_text().await };
    assert_deadline(&ended.await.unwrap_err());
}

#[tokio::test]
async fn every_call_to_a_daemon_that_stands_still_ends_with_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let _silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let options = ConnectOptions {
        address: Some(socket.display().to_string().parse().unwrap()),
        timeout: Some(Duration::from_millis(100)),
        ..ConnectOptions::default()
    };
    let client = Client::connect_with(options).await.unwrap();
    assert_deadline(&client.generate(chat("x")).await.unwrap_err());
    assert_deadline(&client.stream_generate(chat("x")).await.unwrap_err());
    assert_deadline(&client.load_model(LoadModelRequest::default()).await.unwrap_err());
    assert_deadline(&client.list_all_models(false).await.unwrap_err());
    assert_deadline(&client.list_all_sessions().await.unwrap_err());
}

fn assert_deadline(error: &Error) {
    assert_eq!(error.reason(), ErrorReason::Deadline, "{error}");
    assert_eq!(error.call().expect("a status").code, mlxd_client::Code::DeadlineExceeded);
}

#[tokio::test]
async fn a_connection_that_breaks_is_lost_and_after_it_no_daemon_answers() {
    let fake = FakeDaemon::start();
    let wire = fake.wire();
    let client = Client::connect(&wire.socket().display().to_string()).await.unwrap();
    let mut stream = client.stream_generate(chat("hang")).await.unwrap();
    stream.next_event().await.unwrap();
    wire.cut().await;
    let error = stream.collect_text().await.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error}");
    assert!(error.is_retryable());
    let error = client.generate(chat("x")).await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    assert!(error.is_retryable());
}
