//! Calls that do not go well: each with its code, its reason and what helps, and the daemon goes on.

use std::time::Duration;

use mlxd_client::v1::{
    ChatInput, ErrorReason, GenerateRequest, Message, Role, SamplingOptions, ScoreRequest, StoppingOptions,
    TokenIds, generate_request::Input, score_request,
};
use mlxd_client::{BearerToken, Client, ConnectOptions, Error};
use tonic::{Code, Request};

use crate::daemon::harness::{Daemon, MODEL, chat, prompt};

fn sampled(sampling: SamplingOptions) -> GenerateRequest {
    GenerateRequest { sampling: Some(sampling), ..prompt("a") }
}

fn stopped(stopping: StoppingOptions) -> GenerateRequest {
    GenerateRequest { stopping: Some(stopping), ..prompt("a") }
}

fn named(model: &str) -> GenerateRequest {
    GenerateRequest { model: model.into(), ..prompt("a") }
}

fn with(input: Input) -> GenerateRequest {
    GenerateRequest { input: Some(input), ..prompt("") }
}

#[tokio::test]
async fn bad_requests_are_refused_with_reason_and_field() {
    use ErrorReason::{
        ContextOverflow, EmptyPrompt, InvalidField, ModelNotAllowed, ModelNotFound, TemplateFailed,
    };
    let daemon = Daemon::start().await;
    let nan = SamplingOptions { temperature: Some(f32::NAN), ..Default::default() };
    let bias = SamplingOptions { logit_bias: [(258, 1.0)].into(), ..Default::default() };
    let empty_stop = StoppingOptions { stop_strings: vec!["a".into(), String::new()], ..Default::default() };
    let stop_id = StoppingOptions { stop_token_ids: vec![300], ..Default::default() };
    let none = StoppingOptions { max_tokens: Some(0), ..Default::default() };
    let roleless = ChatInput { messages: vec![Message::default()], ..Default::default() };
    let spoken = Message { role: Role::User.into(), ..Message::user("refuse") };
    let refused = ChatInput { messages: vec![spoken], ..Default::default() };
    let cases = [
        (named(""), InvalidField, "model"),
        (named("nothing"), ModelNotFound, ""),
        (named("nobody/nothing"), ModelNotAllowed, ""),
        (named("../models/tiny"), InvalidField, "model"),
        (named("/etc"), InvalidField, "model"),
        (named(&"x".repeat(600)), InvalidField, "model"),
        (GenerateRequest { input: None, ..prompt("") }, InvalidField, "input"),
        (prompt(""), EmptyPrompt, "input"),
        (with(Input::TokenIds(TokenIds::default())), EmptyPrompt, "input"),
        (with(Input::TokenIds(TokenIds { ids: vec![1, 258] })), InvalidField, "token_ids.ids[1]"),
        (with(Input::Chat(ChatInput::default())), InvalidField, "chat.messages"),
        (with(Input::Chat(roleless)), InvalidField, "chat.messages[0].role"),
        (with(Input::Chat(refused)), TemplateFailed, "chat"),
        (prompt(&"x".repeat(400)), ContextOverflow, "input"),
        (sampled(nan), InvalidField, "sampling.temperature"),
        (sampled(bias), InvalidField, "sampling.logit_bias[258]"),
        (stopped(empty_stop), InvalidField, "stopping.stop_strings[1]"),
        (stopped(stop_id), InvalidField, "stopping.stop_token_ids[0]"),
        (stopped(none), InvalidField, "stopping.max_tokens"),
        (GenerateRequest { session: "a b".into(), ..prompt("a") }, InvalidField, "session"),
        (
            GenerateRequest { expected_token_count: Some(0), ..prompt("a") },
            InvalidField,
            "expected_token_count",
        ),
    ];
    for (request, reason, field) in cases {
        let shown = format!("{request:?}").chars().take(200).collect::<String>();
        let whole = daemon.client.generate(request.clone()).await.unwrap_err();
        assert_eq!(whole.reason(), reason, "{shown}: {whole}");
        let fields = &whole.call().unwrap().field_violations;
        assert_eq!(fields.first().map_or("", |violation| violation.field.as_str()), field, "{shown}");
        let Err(streamed) = daemon.client.stream_generate(request).await else { panic!("a stream: {shown}") };
        assert_eq!(streamed.reason(), reason, "{shown}");
    }
    daemon.client.generate(prompt("still there")).await.unwrap();
}

#[tokio::test]
async fn a_context_overflow_carries_the_counts() {
    let daemon = Daemon::start().await;
    let error = daemon.client.generate(prompt(&"x".repeat(401))).await.unwrap_err();
    let metadata = &error.call().unwrap().metadata;
    assert_eq!((metadata["prompt_tokens"].as_str(), metadata["context_length"].as_str()), ("401", "400"));
}

#[tokio::test]
async fn a_message_over_the_limit_is_refused_and_others_are_served() {
    let daemon = Daemon::with(|config| config.limits.message_bytes_max = 10_000).await;
    let error = daemon.client.generate(prompt(&"x".repeat(20_000))).await.unwrap_err();
    let call = error.call().unwrap();
    assert_eq!((call.code, call.reason), (Code::InvalidArgument, ErrorReason::MessageTooLarge));
    assert_eq!(call.metadata["limit_bytes"], "10000");
    assert_eq!(call.message, "message_bytes_max: a message may have at most 10000 bytes");
    assert!(!call.request_id.is_empty());
    daemon.client.generate(prompt("a")).await.unwrap();
}

#[tokio::test]
async fn a_score_may_not_be_longer_than_its_limit() {
    let daemon = Daemon::with(|config| config.limits.score_tokens_max = 3).await;
    let score = |text: &str, top_logprobs| ScoreRequest {
        model: MODEL.into(),
        input: Some(score_request::Input::Text(text.into())),
        top_logprobs,
        ..Default::default()
    };
    daemon.client.score(score("abc", 20)).await.unwrap();
    for (text, top, key) in [("abcd", 0, "score_tokens_max: "), ("abc", 21, "top_logprobs_max: ")] {
        let error = daemon.client.score(score(text, top)).await.unwrap_err();
        assert_eq!(error.reason(), ErrorReason::InvalidField);
        assert!(error.call().unwrap().message.contains(key), "{error}");
    }
}

#[tokio::test]
async fn a_method_that_does_not_exist_and_a_malformed_message_have_reasons() {
    let daemon = Daemon::start().await;
    let error = daemon.call("/mlxd.v1.InferenceService/Dream", vec![]).await;
    assert_eq!(error, (Code::Unimplemented, "UNIMPLEMENTED".into()));
    let error = daemon.call("/no.such.Service/Dream", vec![]).await;
    assert_eq!(error, (Code::Unimplemented, "UNIMPLEMENTED".into()));
    let error = daemon.call("/mlxd.v1.InferenceService/Generate", vec![0xff; 9]).await;
    assert_eq!(error, (Code::InvalidArgument, "INVALID_FIELD".into()));
    // A text that is not UTF-8, in the field `model`.
    let error = daemon.call("/mlxd.v1.InferenceService/Generate", vec![0x0a, 1, 0xff]).await;
    assert_eq!(error, (Code::InvalidArgument, "INVALID_FIELD".into()));
}

#[tokio::test]
async fn the_deadline_ends_a_call_before_and_after_it_has_started() {
    let daemon = Daemon::start().await;
    daemon.client.generate(prompt("a")).await.unwrap();
    let mut request = Request::new(prompt("hang"));
    request.set_timeout(Duration::from_secs(1));
    let error = daemon.client.generate(request).await.unwrap_err();
    // Whether the daemon's timer expires first or one of the client's.
    let call = error.call().unwrap();
    assert_eq!((call.code, call.reason), (Code::DeadlineExceeded, ErrorReason::Deadline));
    daemon.engine.wait_running(0).await;

    // Sent as a plain header, so that only the daemon knows of it.
    let mut request = Request::new(prompt("hang"));
    request.metadata_mut().insert("grpc-timeout", "1S".parse().unwrap());
    let mut stream = daemon.client.stream_generate(request).await.unwrap();
    let error = loop {
        match stream.next_event().await {
            Ok(event) => assert!(event.is_some(), "the stream ended well"),
            Err(error) => break error,
        }
    };
    let call = error.call().unwrap();
    assert_eq!((call.code, call.reason), (Code::DeadlineExceeded, ErrorReason::Deadline));
    daemon.engine.wait_running(0).await;
    assert_eq!(daemon.engine.cancelled(), 2);
}

#[tokio::test]
async fn a_caller_who_goes_away_stops_the_work() {
    let daemon = Daemon::start().await;
    let stream = daemon.client.stream_generate(prompt("hang")).await.unwrap();
    daemon.engine.wait_running(1).await;
    drop(stream);
    daemon.engine.wait_running(0).await;
    assert_eq!(daemon.engine.cancelled(), 1);

    let client = daemon.client.clone();
    let unary = tokio::spawn(async move { client.generate(prompt("hang")).await });
    daemon.engine.wait_running(1).await;
    unary.abort();
    daemon.engine.wait_running(0).await;
    assert_eq!(daemon.engine.cancelled(), 2);
}

#[tokio::test]
async fn tcp_needs_the_token() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "secret\n").unwrap();
    std::fs::set_permissions(&token, PermissionsExt::from_mode(0o600)).unwrap();
    let daemon = Daemon::with(|config| {
        config.listen = Some("127.0.0.1:0".parse().unwrap());
        config.token_file = Some(token.clone());
    })
    .await;
    let address = format!("http://{}", daemon.bound.tcp.unwrap());
    let connect = async |token: Option<&str>| {
        let address = Some(address.parse().unwrap());
        let token = token.map(BearerToken::new);
        Client::connect_with(ConnectOptions { address, token, ..ConnectOptions::default() }).await.unwrap()
    };
    connect(Some("secret")).await.generate(chat("hi")).await.unwrap();
    for wrong in [Some("wrong"), None] {
        let error: Error = connect(wrong).await.generate(chat("hi")).await.unwrap_err();
        assert_eq!(error.reason(), ErrorReason::Unauthenticated);
    }
}
