//! Turns without an answer over the wire, and what sessions say about their KV.

use mlxd_client::Error;
use mlxd_client::v1::{
    ChatInput, CountTokensRequest, CreateSessionRequest, DeleteSessionRequest, ErrorReason,
    ExtendSessionRequest, ExtendSessionResponse, GenerateRequest, GetSessionRequest, GetStatsRequest,
    ListSessionsRequest, Message, Session, SessionState, UpdateSessionRequest, count_tokens_request,
    extend_session_request, generate_request,
};

use crate::daemon::folder::{END, answer_start, ids, message};
use crate::daemon::harness::{Daemon, MODEL, chat, turn};

async fn start() -> Daemon {
    let daemon = Daemon::start().await;
    let request = CreateSessionRequest { name: "s".into(), model: MODEL.into(), ..Default::default() };
    daemon.client.create_session(request).await.unwrap();
    daemon
}

async fn held(daemon: &Daemon) -> (Vec<String>, Vec<u32>) {
    let name = "s".into();
    let request =
        GetSessionRequest { name, include_messages: true, include_token_ids: true, ..Default::default() };
    let got = daemon.client.get_session(request).await.unwrap();
    (got.messages.iter().map(Message::text).collect(), got.token_ids)
}

async fn extend(daemon: &Daemon, request: ExtendSessionRequest) -> Result<ExtendSessionResponse, Error> {
    daemon.client.extend_session(request).await
}

fn said(text: &str) -> ExtendSessionRequest {
    ExtendSessionRequest::messages("s", [Message::user(text)])
}

fn open(flag: Option<bool>) -> ChatInput {
    let messages = vec![Message::user("one")];
    ChatInput { messages, add_generation_prompt: flag, ..Default::default() }
}

fn field<T: std::fmt::Debug>(outcome: Result<T, Error>) -> String {
    outcome.unwrap_err().call().unwrap().metadata["field"].clone()
}

#[tokio::test]
async fn messages_are_added_without_an_answer_and_the_next_turn_goes_on_from_them() {
    let daemon = start().await;
    let extended = extend(&daemon, said("one")).await.unwrap();
    let tokens = message("user", "one");
    let usage = extended.usage.unwrap();
    assert_eq!((usage.prompt_tokens as usize, usage.completion_tokens), (tokens.len(), 0));
    let turns: Vec<_> = extended.session.unwrap().turns.iter().map(|turn| turn.message_count).collect();
    assert_eq!(turns, [1]);
    assert_eq!(held(&daemon).await, (vec!["one".into()], tokens.clone()));
    extend(&daemon, said("two")).await.unwrap();
    daemon.client.generate(turn("s", "three")).await.unwrap();
    let context = [tokens, message("user", "two"), message("user", "three"), answer_start()].concat();
    assert_eq!(daemon.engine.last_context(), context);
    let (texts, tokens) = held(&daemon).await;
    assert_eq!(texts, ["one", "two", "three", "yes"]);
    assert_eq!(tokens, [context, ids("yes"), vec![END]].concat());
}

#[tokio::test]
async fn text_and_tokens_are_added_as_raw_turns() {
    let daemon = start().await;
    extend(&daemon, ExtendSessionRequest::prompt("s", "ab")).await.unwrap();
    let input = mlxd_client::v1::TokenIds { ids: ids("cd") };
    let input = Some(extend_session_request::Input::TokenIds(input));
    extend(&daemon, ExtendSessionRequest { name: "s".into(), input, ..Default::default() }).await.unwrap();
    assert_eq!(held(&daemon).await.1, ids("abcd"));
    assert_eq!(extend(&daemon, said("x")).await.unwrap_err().reason(), ErrorReason::SessionNotChat);
}

#[tokio::test]
async fn an_extension_is_refused_and_cancelled_as_a_generation_is() {
    let daemon = start().await;
    let missing = ExtendSessionRequest { name: "s".into(), ..Default::default() };
    assert_eq!(field(extend(&daemon, missing).await), "input");
    assert_eq!(
        field(extend(&daemon, ExtendSessionRequest { name: String::new(), ..said("x") }).await),
        "name"
    );
    let reason = async |request| extend(&daemon, request).await.unwrap_err().reason();
    assert_eq!(reason(ExtendSessionRequest::prompt("s", "")).await, ErrorReason::EmptyPrompt);
    assert_eq!(reason(ExtendSessionRequest::prompt("none", "x")).await, ErrorReason::SessionNotFound);
    assert_eq!(
        reason(ExtendSessionRequest::prompt("s", "x".repeat(401))).await,
        ErrorReason::ContextOverflow
    );
    let stale = ExtendSessionRequest { expected_token_count: Some(7), ..said("x") };
    assert_eq!(reason(stale).await, ErrorReason::SessionMoved);
    let client = daemon.client.clone();
    let running = tokio::spawn(async move { client.extend_session(said("hang")).await });
    daemon.engine.wait_running(1).await;
    assert_eq!(reason(said("x")).await, ErrorReason::SessionBusy);
    running.abort();
    daemon.engine.wait_running(0).await;
    assert_eq!(daemon.engine.cancelled(), 1);
    assert!(held(&daemon).await.1.is_empty());
    let client = daemon.client.clone();
    let running = tokio::spawn(async move { client.extend_session(said("hang")).await });
    daemon.engine.wait_running(1).await;
    daemon.client.delete_session(DeleteSessionRequest { name: "s".into() }).await.unwrap();
    assert_eq!(running.await.unwrap().unwrap_err().reason(), ErrorReason::Cancelled);
}

#[tokio::test]
async fn the_beginning_of_an_answer_is_left_out_where_it_is_asked_for() {
    let daemon = start().await;
    let path = "chat.add_generation_prompt";
    let input = Some(extend_session_request::Input::Chat(open(Some(true))));
    let request = ExtendSessionRequest { name: "s".into(), input, ..Default::default() };
    assert_eq!(field(extend(&daemon, request).await), path);
    let generate = |session: &str, flag| {
        let input = Some(generate_request::Input::Chat(open(flag)));
        GenerateRequest { session: session.into(), input, ..chat("") }
    };
    assert_eq!(field(daemon.client.generate(generate("s", Some(false))).await), path);
    daemon.client.generate(generate("s", Some(true))).await.unwrap();
    daemon.client.generate(generate("", Some(false))).await.unwrap();
    assert_eq!(daemon.engine.last_context(), message("user", "one"));
    let count = async |flag| {
        let input = Some(count_tokens_request::Input::Chat(open(flag)));
        let request = CountTokensRequest { model: MODEL.into(), input, ..Default::default() };
        daemon.client.count_tokens(request).await.unwrap().token_count as usize
    };
    let whole = message("user", "one").len();
    assert_eq!((count(Some(false)).await, count(None).await), (whole, whole + answer_start().len()));
}

async fn described(daemon: &Daemon) -> Session {
    let request = GetSessionRequest { name: "s".into(), ..Default::default() };
    daemon.client.get_session(request).await.unwrap().session.unwrap()
}

#[tokio::test]
async fn a_session_says_what_it_holds_and_where_its_kv_is() {
    let daemon = start().await;
    let empty = described(&daemon).await;
    assert_eq!((empty.state(), empty.kv_bytes, empty.cached_token_count), (SessionState::Cold, 0, 0));
    daemon.client.generate(turn("s", "one")).await.unwrap();
    let hot = described(&daemon).await;
    assert_eq!((hot.state(), hot.cached_token_count), (SessionState::Hot, hot.token_count - 1));
    assert_eq!(hot.kv_bytes, u64::from(hot.cached_token_count) * 8);
    assert!(hot.content_bytes > empty.content_bytes + 4 * u64::from(hot.token_count));
    let listed = daemon.client.list_sessions(ListSessionsRequest::default()).await.unwrap();
    assert_eq!(listed.sessions, std::slice::from_ref(&hot));
    let pin = UpdateSessionRequest { name: "s".into(), pinned: Some(true), ..Default::default() };
    daemon.client.update_session(pin).await.unwrap();
    let _stream = daemon.client.stream_generate(turn("s", "hang")).await.unwrap();
    assert_eq!(described(&daemon).await.state(), SessionState::Running);
    let stats = daemon.client.get_stats(GetStatsRequest {}).await.unwrap();
    assert_eq!((stats.sessions, stats.pinned_sessions, stats.busy_sessions), (1, 1, 1));
    assert!(stats.session_bytes > hot.content_bytes);
}
