//! Callers that do what they should not, beside one that does nothing wrong.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use mlxd_client::v1::{
    ChatInput, CountTokensRequest, ErrorReason, GenerateRequest, Message, TokenIds, ToolDefinition,
    generate_request::Input, inference_service_client::InferenceServiceClient,
};
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use tower::{Service, ServiceExt};

use crate::daemon::harness::{Daemon, MODEL, prompt};

/// A body that sends these bytes and then nothing more.
struct Half(Option<Bytes>);

impl http_body::Body for Half {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.0.take().map_or(Poll::Pending, |bytes| Poll::Ready(Some(Ok(Frame::data(bytes)))))
    }
}

/// Sends the start of a message that is said to have `length` bytes; returns the status once there is one.
async fn half_sent(daemon: &Daemon, length: u32, sent: usize) -> Status {
    half_sent_on(daemon.channel().await, length, sent).await
}

async fn half_sent_on(mut channel: Channel, length: u32, sent: usize) -> Status {
    let message = [&[0][..], &length.to_be_bytes(), &vec![0; sent]].concat();
    let request = http::Request::post("http://localhost/mlxd.v1.InferenceService/CountTokens")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::new(Half(Some(message.into()))))
        .unwrap();
    let response = channel.ready().await.unwrap().call(request).await.unwrap();
    Status::from_header_map(response.headers()).unwrap()
}

#[tokio::test]
async fn a_request_that_does_not_arrive_ends() {
    let daemon = Daemon::with(|config| config.limits.receive = Duration::from_millis(100)).await;
    for (length, sent) in [(1000, 10), (1_000_000, 900_000), (1_000_000, 0)] {
        let status = half_sent(&daemon, length, sent).await;
        let info = status.get_error_details().error_info().unwrap().clone();
        assert_eq!((status.code(), info.reason.as_str()), (Code::DeadlineExceeded, "DEADLINE"), "{length}");
        assert_eq!(info.metadata["limit"], "receive_s");
    }
}

#[tokio::test]
async fn half_sent_messages_keep_no_short_one_out() {
    let daemon = Daemon::with(|config| config.limits.receive_bytes_max = 1_000_000).await;
    let half = async {
        let halves = (0..8).map(|_| half_sent(&daemon, 900_000, 800_000));
        for half in halves.collect::<Vec<_>>() {
            half.await;
        }
    };
    let honest = async {
        for _ in 0..20 {
            daemon.client.generate(prompt("a")).await.unwrap();
        }
    };
    tokio::select! {
        () = half => panic!("nothing ends before its time"),
        () = honest => {}
    }
}

#[tokio::test]
async fn large_announcements_keep_no_chat_out() {
    let daemon = Daemon::with(|config| {
        config.limits.receive_bytes_max = 8 << 20;
        config.limits.receive_bytes_per_connection_max = 4 << 20;
    })
    .await;
    // The first of two connections have all bytes for large messages.
    let mut announced = JoinSet::new();
    for _ in 0..4 {
        let channel = daemon.channel().await;
        announced.spawn(half_sent_on(channel.clone(), 15_000_000, 1_000_000));
        announced.spawn(half_sent_on(channel, 15_000_000, 1_000_000));
    }
    let honest = async {
        for words in [16_000, 16_000, 16_000, 16_000, 100_000] {
            let request = CountTokensRequest {
                model: MODEL.into(),
                ..CountTokensRequest::prompt("word ".repeat(words))
            };
            assert_eq!(daemon.client.count_tokens(request).await.unwrap().token_count as usize, 5 * words);
        }
    };
    tokio::select! {
        _ = announced.join_next() => panic!("nothing ends before its time"),
        () = honest => {}
    }
}

#[tokio::test]
async fn a_message_that_waits_for_its_bytes_holds_up_no_other_call_of_its_connection() {
    let daemon = Daemon::with(|config| config.limits.receive_bytes_per_connection_max = 4 << 20).await;
    let channel = daemon.channel().await;
    let mut waiting: JoinSet<Status> =
        (0..3).map(|_| half_sent_on(channel.clone(), 15_000_000, 1_500_000)).collect();
    let honest = async {
        let mut client = InferenceServiceClient::new(channel.clone());
        for words in [10, 16_000, 16_000, 16_000] {
            let request = CountTokensRequest {
                model: MODEL.into(),
                ..CountTokensRequest::prompt("word ".repeat(words))
            };
            assert_eq!(
                client.count_tokens(request).await.unwrap().into_inner().token_count as usize,
                5 * words
            );
        }
    };
    tokio::select! {
        _ = waiting.join_next() => panic!("nothing ends before its time"),
        () = honest => {}
    }
}

#[tokio::test]
async fn long_messages_wait_for_each_other_and_all_are_answered() {
    let daemon = Daemon::with(|config| {
        config.limits.receive_bytes_max = 400_000;
        config.limits.receive_bytes_per_connection_max = 300_000;
    })
    .await;
    let request =
        || CountTokensRequest { model: MODEL.into(), ..CountTokensRequest::prompt("word ".repeat(40_000)) };
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let client = daemon.client.clone();
        calls.spawn(async move { client.count_tokens(request()).await.unwrap().token_count });
    }
    assert_eq!(calls.join_all().await, [200_000; 6]);
}

#[tokio::test]
async fn what_cannot_fit_the_context_is_refused_before_it_is_tokenized() {
    let daemon = Daemon::start().await;
    let error = daemon.client.generate(prompt(&"x".repeat(1 << 20))).await.unwrap_err();
    let call = error.call().unwrap();
    assert_eq!((call.code, call.reason), (Code::InvalidArgument, ErrorReason::ContextOverflow));
    // The longest token has nine bytes.
    let least = (1_usize << 20).div_ceil(9);
    assert_eq!(call.metadata["prompt_tokens"], least.to_string());
    let ids = GenerateRequest {
        model: MODEL.into(),
        input: Some(Input::TokenIds(TokenIds { ids: vec![5; 100_000] })),
        ..Default::default()
    };
    let error = daemon.client.generate(ids).await.unwrap_err();
    assert_eq!(error.call().unwrap().metadata["prompt_tokens"], "100000");
}

#[tokio::test]
async fn a_chat_of_too_many_parts_is_refused_by_their_number() {
    let daemon = Daemon::with(|config| {
        config.limits.chat_parts_max = 100;
        config.limits.tools_max = 3;
    })
    .await;
    let chat =
        |chat| GenerateRequest { model: MODEL.into(), input: Some(Input::Chat(chat)), ..Default::default() };
    let empty = ChatInput { messages: vec![Message::user(""); 51], ..Default::default() };
    let tool = ToolDefinition { name: "f".into(), ..Default::default() };
    let tools = ChatInput { messages: vec![Message::user("hi")], tools: vec![tool; 4], ..Default::default() };
    for (input, field, limit) in
        [(empty, "chat.messages", "chat_parts_max"), (tools, "chat.tools", "tools_max")]
    {
        let error = daemon.client.generate(chat(input)).await.unwrap_err();
        let call = error.call().unwrap();
        assert_eq!((call.reason, call.metadata["field"].as_str()), (ErrorReason::InvalidField, field));
        assert!(call.message.contains(limit), "{}", call.message);
    }
}

#[tokio::test]
async fn a_deadline_ends_the_tokenizing_of_a_long_text() {
    let daemon = Daemon::with(|config| config.limits.preparations_max = Some(1)).await;
    let text = "word ".repeat(400_000);
    let message = CountTokensRequest { model: MODEL.into(), ..CountTokensRequest::prompt(text) };
    let mut milliseconds = 300;
    // Where the text is done in time, a shorter deadline comes first.
    let error = loop {
        let mut request = tonic::Request::new(message.clone());
        request.metadata_mut().insert("grpc-timeout", format!("{milliseconds}m").parse().unwrap());
        match daemon.client.count_tokens(request).await {
            Ok(_) => milliseconds /= 2,
            Err(error) => break error,
        }
    };
    // Whether the daemon's timer expires first or one of the client's.
    let call = error.call().unwrap();
    assert_eq!((call.code, call.reason), (Code::DeadlineExceeded, ErrorReason::Deadline));
    // The only place is free again after the piece that was being done.
    daemon.client.generate(prompt("a")).await.unwrap();
}

#[tokio::test]
async fn a_message_of_too_many_parts_is_refused_before_it_is_decoded() {
    let daemon = Daemon::start().await;
    // In `chat`, the field 4, a million empty messages of two bytes each.
    let messages = [0x0a, 0].repeat(1_000_000);
    let chat = GenerateRequest { input: Some(Input::Chat(ChatInput::default())), ..Default::default() };
    let field = prost::Message::encode_to_vec(&chat)[0];
    let mut body = vec![field];
    prost::encoding::encode_varint(messages.len() as u64, &mut body);
    body.extend(messages);
    let outcome = daemon.call("/mlxd.v1.InferenceService/Generate", body).await;
    assert_eq!(outcome, (Code::InvalidArgument, "INVALID_FIELD".into()));
    daemon.client.generate(prompt("a")).await.unwrap();
}
