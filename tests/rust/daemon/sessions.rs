//! Sessions over the wire.

use std::time::Duration;

use mlxd_client::Error;
use mlxd_client::v1::inference_service_client::InferenceServiceClient;
use mlxd_client::v1::{
    ChatInput, CreateSessionRequest, DeleteSessionRequest, ErrorReason, ForkSessionRequest, GenerateRequest,
    GetSessionRequest, ListSessionsRequest, Message, ScoreRequest, Session, StoppingOptions,
    StreamGenerateResponse, TruncateSessionRequest, generate_request::Input, score_request,
    stream_generate_response::Event, truncate_session_request::To,
};
use tonic::Code;
use tonic_types::StatusExt;

use crate::daemon::folder::{END, answer_start, ids, message};
use crate::daemon::harness::{Daemon, MODEL, WORDS, prompt, turn};

async fn create(daemon: &Daemon, name: &str) -> Result<Session, Error> {
    let request = CreateSessionRequest { name: name.into(), model: MODEL.into(), ..Default::default() };
    daemon.client.create_session(request).await
}

async fn get(daemon: &Daemon, name: &str) -> mlxd_client::v1::GetSessionResponse {
    let name = name.into();
    let request =
        GetSessionRequest { name, include_messages: true, include_token_ids: true, ..Default::default() };
    daemon.client.get_session(request).await.unwrap()
}

fn reason<T>(outcome: Result<T, Error>) -> ErrorReason {
    outcome.err().expect("refused").reason()
}

#[tokio::test]
async fn a_turn_sends_only_its_new_input_and_builds_on_the_whole_session() {
    let daemon = Daemon::start().await;
    assert_eq!(create(&daemon, "s").await.unwrap().token_count, 0);
    let first = daemon.client.generate(turn("s", "one")).await.unwrap();
    let after_first = [message("user", "one"), answer_start(), ids("yes"), vec![END]].concat();
    assert_eq!(first.session_token_count, Some(u32::try_from(after_first.len()).unwrap()));
    assert_eq!(get(&daemon, "s").await.token_ids, after_first);

    daemon.client.generate(turn("s", "two")).await.unwrap();
    let context = [after_first, message("user", "two"), answer_start()].concat();
    assert_eq!(daemon.engine.last_context(), context);
    let session = get(&daemon, "s").await;
    let texts: Vec<_> = session.messages.iter().map(mlxd_client::v1::Message::text).collect();
    assert_eq!(texts, ["one", "yes", "two", "yes"]);
    let turns: Vec<_> = session.session.unwrap().turns.iter().map(|turn| turn.message_count).collect();
    assert_eq!(turns, [2, 4]);
}

#[tokio::test]
async fn raw_turns_append_and_no_chat_turn_follows_them() {
    let daemon = Daemon::start().await;
    create(&daemon, "s").await.unwrap();
    let raw = |text: &str| GenerateRequest { session: "s".into(), ..prompt(text) };
    daemon.client.generate(raw("a")).await.unwrap();
    daemon.client.generate(raw("b")).await.unwrap();
    assert_eq!(daemon.engine.last_context(), [ids("ayes"), vec![END], ids("b")].concat());
    assert_eq!(reason(daemon.client.generate(turn("s", "hi")).await), ErrorReason::SessionNotChat);
    let cut = TruncateSessionRequest { name: "s".into(), to: Some(To::TokenCount(1)), ..Default::default() };
    assert_eq!(daemon.client.truncate_session(cut).await.unwrap().token_count, 1);
    assert_eq!(get(&daemon, "s").await.token_ids, ids("a"));
}

#[tokio::test]
async fn raw_turns_and_their_answers_are_one_text() {
    let daemon = Daemon::start().await;
    let tokenizer = daemon.add_words();
    let request = CreateSessionRequest { name: "s".into(), model: WORDS.into(), ..Default::default() };
    daemon.client.create_session(request).await.unwrap();
    let stopping = Some(StoppingOptions { max_tokens: Some(1), ..Default::default() });
    let mut said = String::new();
    for text in ["The capital of France is", " capital of"] {
        let request = GenerateRequest {
            session: "s".into(),
            model: String::new(),
            stopping: stopping.clone(),
            ..prompt(text)
        };
        let answer = daemon.client.generate(request).await.unwrap();
        assert_eq!(answer.text, " Paris");
        said += &(text.to_owned() + &answer.text);
    }
    assert_eq!(tokenizer.decode(&get(&daemon, "s").await.token_ids).unwrap(), said);
}

#[tokio::test]
async fn a_failed_or_cancelled_turn_leaves_no_trace() {
    let daemon = Daemon::start().await;
    create(&daemon, "s").await.unwrap();
    daemon.client.generate(turn("s", "one")).await.unwrap();
    let before = get(&daemon, "s").await.token_ids;
    assert_eq!(reason(daemon.client.generate(turn("s", "refuse")).await), ErrorReason::TemplateFailed);

    let mut stream = daemon.client.stream_generate(turn("s", "hang")).await.unwrap();
    assert!(matches!(stream.next_event().await.unwrap(), Some(Event::Started(_))));
    assert!(get(&daemon, "s").await.session.unwrap().busy);
    assert_eq!(reason(daemon.client.generate(turn("s", "two")).await), ErrorReason::SessionBusy);
    drop(stream);
    daemon.engine.wait_running(0).await;
    assert_eq!(get(&daemon, "s").await.token_ids, before);
    daemon.client.generate(turn("s", "two")).await.unwrap();
}

#[tokio::test]
async fn an_expected_token_count_makes_a_retry_safe() {
    let daemon = Daemon::start().await;
    create(&daemon, "s").await.unwrap();
    let request = GenerateRequest { expected_token_count: Some(0), ..turn("s", "one") };
    daemon.client.generate(request.clone()).await.unwrap();
    let error = daemon.client.generate(request).await.unwrap_err();
    let call = error.call().unwrap();
    assert_eq!((call.code, call.reason), (Code::Aborted, ErrorReason::SessionMoved));
    assert_eq!(call.metadata["expected"], "0");
}

#[tokio::test]
async fn forks_and_truncated_sessions_are_independent() {
    let daemon = Daemon::start().await;
    create(&daemon, "s").await.unwrap();
    for text in ["one", "two"] {
        daemon.client.generate(turn("s", text)).await.unwrap();
    }
    let whole = get(&daemon, "s").await;
    let fork = ForkSessionRequest { name: "s".into(), new_name: "f".into(), ..Default::default() };
    daemon.client.fork_session(fork.clone()).await.unwrap();
    assert_eq!(reason(daemon.client.fork_session(fork).await), ErrorReason::SessionExists);
    let cut = TruncateSessionRequest { name: "f".into(), to: Some(To::TurnCount(1)), ..Default::default() };
    daemon.client.truncate_session(cut).await.unwrap();
    daemon.client.generate(turn("f", "three")).await.unwrap();
    let fork = get(&daemon, "f").await;
    let texts: Vec<_> = fork.messages.iter().map(mlxd_client::v1::Message::text).collect();
    assert_eq!(texts, ["one", "yes", "three", "yes"]);
    assert_eq!(get(&daemon, "s").await.token_ids, whole.token_ids);
}

#[tokio::test]
async fn deleting_a_session_cancels_its_turn() {
    let daemon = Daemon::start().await;
    create(&daemon, "s").await.unwrap();
    let client = daemon.client.clone();
    let running = tokio::spawn(async move { client.generate(turn("s", "hang")).await });
    daemon.engine.wait_running(1).await;
    daemon.client.delete_session(DeleteSessionRequest { name: "s".into() }).await.unwrap();
    let error = running.await.unwrap().unwrap_err();
    let call = error.call().unwrap();
    assert_eq!((call.code, call.reason), (Code::Cancelled, ErrorReason::Cancelled));
    daemon.engine.wait_running(0).await;
    assert_eq!(reason(daemon.client.generate(turn("s", "two")).await), ErrorReason::SessionNotFound);
    assert!(daemon.engine.forgotten()[0].ends_with("/s"));
}

/// Opens a turn's stream and reads only its first event.
async fn unread(daemon: &Daemon) -> tonic::Streaming<StreamGenerateResponse> {
    let mut client = InferenceServiceClient::new(daemon.narrow().await);
    let mut stream = client.stream_generate(turn("s", "flood")).await.unwrap().into_inner();
    assert!(matches!(stream.message().await.unwrap().unwrap().event, Some(Event::Started(_))));
    stream
}

#[tokio::test]
async fn deleting_a_session_stops_a_turn_whose_stream_is_unread() {
    let daemon = Daemon::start().await;
    create(&daemon, "s").await.unwrap();
    let mut client = InferenceServiceClient::new(daemon.narrow().await);
    let stream = client.stream_generate(turn("s", "hang flood")).await.unwrap();
    daemon.engine.wait_running(1).await;
    daemon.client.delete_session(DeleteSessionRequest { name: "s".into() }).await.unwrap();
    daemon.engine.wait_running(0).await;
    assert_eq!((daemon.engine.orphaned(), daemon.engine.cancelled()), (1, 0));
    drop(stream);
}

#[tokio::test]
async fn a_turn_whose_end_nobody_reads_is_rolled_back() {
    let daemon = Daemon::with(|config| config.engine.slow_reader = Duration::from_millis(50)).await;
    create(&daemon, "s").await.unwrap();
    let mut stream = unread(&daemon).await;
    daemon.engine.wait_running(0).await;
    let free = async {
        while get(&daemon, "s").await.session.unwrap().busy {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), free).await.unwrap();
    assert!(get(&daemon, "s").await.token_ids.is_empty());
    let end = loop {
        match stream.message().await {
            Ok(event) => assert!(event.is_some(), "the stream ended well"),
            Err(status) => break status,
        }
    };
    assert_eq!(end.get_error_details().error_info().unwrap().reason, "SLOW_READER");
    daemon.client.generate(turn("s", "two")).await.unwrap();
}

#[tokio::test]
async fn an_answer_that_cannot_be_sent_leaves_the_session_as_it_was() {
    let daemon = Daemon::with(|config| config.limits.answer_bytes_max = 65_536).await;
    create(&daemon, "s").await.unwrap();
    let error = daemon.client.generate(turn("s", "flood")).await.unwrap_err();
    let call = error.call().unwrap();
    assert_eq!((call.code, call.reason), (Code::ResourceExhausted, ErrorReason::AnswerTooLarge));
    assert_eq!(call.metadata["limit_bytes"], "65536");
    let session = get(&daemon, "s").await;
    assert!(session.token_ids.is_empty() && !session.session.unwrap().busy);
    daemon.engine.wait_running(0).await;
    // A stream may be as long as it likes, but not its messages.
    let mut stream = daemon.client.stream_generate(turn("s", "flood")).await.unwrap();
    let error = loop {
        match stream.next_event().await {
            Ok(event) => assert!(event.is_some(), "the stream ended well"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.reason(), ErrorReason::AnswerTooLarge);
    assert!(get(&daemon, "s").await.token_ids.is_empty());
    daemon.client.generate(turn("s", "two")).await.unwrap();
}

#[tokio::test]
async fn a_score_continues_a_session_and_does_not_change_it() {
    let daemon = Daemon::start().await;
    create(&daemon, "s").await.unwrap();
    daemon.client.generate(turn("s", "one")).await.unwrap();
    let before = get(&daemon, "s").await.token_ids;
    let input = Some(score_request::Input::Text("ab".into()));
    let request = ScoreRequest { session: "s".into(), input, ..Default::default() };
    let score = daemon.client.score(request).await.unwrap();
    assert!(score.tokens.len() == 2 && score.tokens.iter().all(|token| token.has_logprob));
    assert_eq!(daemon.engine.last_context(), [before.clone(), ids("ab")].concat());
    assert_eq!(get(&daemon, "s").await.token_ids, before);
}

#[tokio::test]
async fn sessions_are_listed_in_pages_and_limited() {
    let daemon = Daemon::with(|config| config.limits.sessions_max = 3).await;
    for name in ["c", "a", ""] {
        create(&daemon, name).await.unwrap();
    }
    let error = create(&daemon, "d").await.unwrap_err();
    let call = error.call().unwrap();
    assert_eq!((call.code, call.metadata["value"].as_str()), (Code::ResourceExhausted, "3"));
    let page = ListSessionsRequest { page_size: 2, ..Default::default() };
    let first = daemon.client.list_sessions(page.clone()).await.unwrap();
    assert_eq!((first.sessions[0].name.as_str(), first.next_page_token.as_str()), ("a", "c"));
    let rest = ListSessionsRequest { page_token: first.next_page_token, ..page };
    let last = daemon.client.list_sessions(rest).await.unwrap();
    assert!(last.sessions[0].name.starts_with("s-") && last.next_page_token.is_empty());
    let huge = ListSessionsRequest { page_size: 1001, ..Default::default() };
    assert_eq!(reason(daemon.client.list_sessions(huge).await), ErrorReason::InvalidField);
}

#[tokio::test]
async fn a_session_needs_a_model_that_exists_and_a_lifetime_in_range() {
    let daemon = Daemon::start().await;
    let request = |model: &str, seconds| CreateSessionRequest {
        model: model.into(),
        ttl: Some(prost_types::Duration { seconds, nanos: 0 }),
        ..Default::default()
    };
    let call = async |request| reason(daemon.client.create_session(request).await);
    assert_eq!(call(request("nobody", 1)).await, ErrorReason::ModelNotFound);
    assert_eq!(call(request("", 1)).await, ErrorReason::InvalidField);
    for seconds in [-1, 0, i64::MAX] {
        assert_eq!(call(request(MODEL, seconds)).await, ErrorReason::InvalidField);
    }
}

#[tokio::test]
async fn fields_that_the_template_ignores_count_towards_the_session() {
    let daemon = Daemon::with(|config| config.limits.session_bytes_max = 65_536).await;
    create(&daemon, "s").await.unwrap();
    let named = |bytes: usize| {
        let message = Message { name: "x".repeat(bytes), ..Message::user("hi") };
        let chat = ChatInput { messages: vec![message], ..Default::default() };
        GenerateRequest { input: Some(Input::Chat(chat)), ..turn("s", "") }
    };
    daemon.client.generate(named(40_000)).await.unwrap();
    let before = get(&daemon, "s").await.token_ids;
    let error = daemon.client.generate(named(40_000)).await.unwrap_err();
    let call = error.call().unwrap();
    assert_eq!((call.code, call.reason), (Code::ResourceExhausted, ErrorReason::SessionLimit));
    assert_eq!(
        (call.metadata["limit"].as_str(), call.metadata["value"].as_str()),
        ("session_bytes_max", "65536")
    );
    let session = get(&daemon, "s").await;
    assert!(session.token_ids == before && !session.session.unwrap().busy);
    daemon.client.generate(named(10)).await.unwrap();
}

#[tokio::test]
async fn sessions_come_in_pages_that_fit_an_answer() {
    let daemon = Daemon::with(|config| config.limits.answer_bytes_max = 65_536).await;
    let names: Vec<String> = (0..400).map(|at| format!("{at:03}{}", "x".repeat(125))).collect();
    for name in &names {
        create(&daemon, name).await.unwrap();
    }
    let request = ListSessionsRequest { page_size: 1000, ..Default::default() };
    let first = daemon.client.list_sessions(request).await.unwrap();
    assert!((200..400).contains(&first.sessions.len()), "{}", first.sessions.len());
    assert_eq!(first.next_page_token, names[first.sessions.len() - 1]);
    let all = daemon.client.list_all_sessions().await.unwrap();
    assert!(all.iter().map(|session| &session.name).eq(&names));
}

#[tokio::test]
async fn messages_come_in_pages_that_fit_an_answer() {
    let daemon = Daemon::with(|config| config.limits.answer_bytes_max = 65_536).await;
    create(&daemon, "s").await.unwrap();
    for at in 0..4 {
        let message = Message { name: format!("{at}{}", "x".repeat(25_000)), ..Message::user("hi") };
        let chat = ChatInput { messages: vec![message], ..Default::default() };
        let request = GenerateRequest { input: Some(Input::Chat(chat)), ..turn("s", "") };
        daemon.client.generate(request).await.unwrap();
    }
    let request = GetSessionRequest { name: "s".into(), include_messages: true, ..Default::default() };
    let first = daemon.client.get_session(request.clone()).await.unwrap();
    assert_eq!((first.messages.len(), first.next_message_page_token.as_str()), (4, "4"));
    let small = GetSessionRequest { message_page_size: 1, message_page_token: "1".into(), ..request.clone() };
    let second = daemon.client.get_session(small).await.unwrap();
    assert_eq!((second.messages[0].text(), second.next_message_page_token.as_str()), ("yes".into(), "2"));
    let all = daemon.client.session_messages("s").await.unwrap();
    let firsts: Vec<_> = all.iter().map(|message| message.name.chars().next()).collect();
    assert_eq!(firsts, [Some('0'), None, Some('1'), None, Some('2'), None, Some('3'), None]);
    let bad = GetSessionRequest { message_page_token: "x".into(), ..request };
    assert_eq!(reason(daemon.client.get_session(bad).await), ErrorReason::InvalidField);
    // A message that no page could hold is refused before its turn.
    let message = Message { name: "x".repeat(40_000), ..Message::user("hi") };
    let chat = ChatInput { messages: vec![message], ..Default::default() };
    let large = GenerateRequest { input: Some(Input::Chat(chat)), ..turn("s", "") };
    assert_eq!(reason(daemon.client.generate(large).await), ErrorReason::InvalidField);
}
