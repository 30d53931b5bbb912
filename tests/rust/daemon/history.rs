//! How a session's turns go on where the template writes the past differently.

use std::fs;

use mlxd_client::v1::{
    ChatInput, CreateSessionRequest, ErrorReason, ExtendSessionRequest, ForkSessionRequest, GenerateRequest,
    GetSessionRequest, History, HistoryOutcome, Message, ScoreRequest, Session, ToolDefinition,
    UnloadModelRequest, extend_session_request, generate_request::Input, score_request,
    stream_generate_response::Event,
};
use serde_json::json;

use crate::daemon::folder::{self, END, START, ids, message};
use crate::daemon::harness::{Daemon, prompt, turn};

/// A model whose answers begin with a mark of reasoning, which its template leaves out of the past.
const THINKING: &str = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}\
{% for m in messages %}<|start|>{{ m.role }}:\
{% if m.role == 'assistant' and preserve_thinking %}<think>{{ m.reasoning_content }}{% endif %}{{ m.content }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant:<think>{% endif %}";

async fn start() -> Daemon {
    let daemon = Daemon::start().await;
    for (name, template) in
        [("thinks", THINKING), ("drops", &THINKING.replace("and preserve_thinking", "and false"))]
    {
        let folder = daemon.folder.path().join("models").join(name);
        folder::write(&folder);
        let config = json!({ "chat_template": template, "eos_token": "<|end|>" });
        fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    }
    daemon
}

async fn create(daemon: &Daemon, name: &str, model: &str, history: History) -> Session {
    let mut request =
        CreateSessionRequest { name: name.into(), model: model.into(), ..CreateSessionRequest::default() };
    request.set_history(history);
    daemon.client.create_session(request).await.unwrap()
}

fn with(history: History, request: GenerateRequest) -> GenerateRequest {
    GenerateRequest { history: history.into(), ..request }
}

async fn outcome(daemon: &Daemon, request: GenerateRequest) -> HistoryOutcome {
    daemon.client.generate(request).await.unwrap().history()
}

fn answer(start: &str) -> Vec<u32> {
    [vec![START], ids(&format!("assistant:{start}yes")), vec![END]].concat()
}

fn question(text: &str) -> Vec<u32> {
    [message("user", text), vec![START], ids("assistant:<think>")].concat()
}

#[tokio::test]
async fn a_turn_keeps_or_rewrites_the_past_as_its_session_says() {
    let daemon = start().await;
    let kept = [message("user", "one"), answer("<think>"), question("two")].concat();
    let rewritten = [message("user", "one"), message("assistant", ""), question("two")].concat();
    for (model, history, expected, context) in [
        ("thinks", History::Unspecified, HistoryOutcome::Appended, &kept),
        ("thinks", History::Append, HistoryOutcome::Appended, &kept),
        ("thinks", History::Rerender, HistoryOutcome::Rerendered, &rewritten),
        ("drops", History::Auto, HistoryOutcome::Rerendered, &rewritten),
        ("drops", History::Append, HistoryOutcome::Appended, &kept),
    ] {
        let name = format!("{model}/{}", history.as_str_name());
        let session = create(&daemon, &name, model, history).await;
        let shown = if history == History::Unspecified { History::Auto } else { history };
        assert_eq!(session.history(), shown);
        assert_eq!(outcome(&daemon, turn(&name, "one")).await, HistoryOutcome::Unspecified);
        assert_eq!(outcome(&daemon, turn(&name, "two")).await, expected, "{name}");
        assert_eq!(&daemon.engine.last_context(), context, "{name}");
        let texts: Vec<_> =
            daemon.client.session_messages(&name).await.unwrap().iter().map(Message::text).collect();
        assert_eq!(texts, ["one", "", "two", ""]);
        let held = daemon.client.session_messages(&name).await.unwrap();
        assert!(held.iter().skip(1).step_by(2).all(|answer| answer.reasoning == "yes"), "the past stays");
    }
}

#[tokio::test]
async fn a_turn_overrides_its_session_and_a_stream_tells_what_was_done() {
    let daemon = start().await;
    create(&daemon, "s", "drops", History::Rerender).await;
    daemon.client.generate(turn("s", "one")).await.unwrap();
    let mut stream = daemon.client.stream_generate(with(History::Append, turn("s", "two"))).await.unwrap();
    let Some(Event::Started(started)) = stream.next_event().await.unwrap() else { panic!("no start") };
    assert_eq!(started.history(), HistoryOutcome::Appended);
    while stream.next_event().await.unwrap().is_some() {}
    assert_eq!(outcome(&daemon, turn("s", "three")).await, HistoryOutcome::Rerendered);
    let fork = ForkSessionRequest { name: "s".into(), new_name: "f".into(), ..Default::default() };
    assert_eq!(daemon.client.fork_session(fork).await.unwrap().history(), History::Rerender);
    let get = GetSessionRequest { name: "f".into(), ..Default::default() };
    let fork = daemon.client.get_session(get).await.unwrap();
    assert_eq!(fork.session.unwrap().history(), History::Rerender);
}

#[tokio::test]
async fn an_answer_that_was_cut_off_is_ended_before_the_next_message() {
    let daemon = start().await;
    create(&daemon, "s", "drops", History::Append).await;
    let mut cut = turn("s", "one");
    cut.stopping =
        Some(mlxd_client::v1::StoppingOptions { stop_strings: vec!["s".into()], ..Default::default() });
    daemon.client.generate(cut).await.unwrap();
    assert_eq!(outcome(&daemon, turn("s", "two")).await, HistoryOutcome::Appended);
    let context = daemon.engine.last_context();
    assert!(context.ends_with(&question("two")), "{context:?}");
}

#[tokio::test]
async fn a_turn_appends_to_what_a_session_was_extended_by() {
    let daemon = start().await;
    create(&daemon, "s", "drops", History::Append).await;
    assert_eq!(outcome(&daemon, turn("s", "one")).await, HistoryOutcome::Unspecified);
    for text in ["two", "three"] {
        let chat = ChatInput { messages: vec![Message::user(text)], ..Default::default() };
        let extend = ExtendSessionRequest {
            name: "s".into(),
            input: Some(extend_session_request::Input::Chat(chat)),
            ..Default::default()
        };
        daemon.client.extend_session(extend).await.unwrap();
    }
    let fork = ForkSessionRequest {
        name: "s".into(),
        new_name: "f".into(),
        turn_count: Some(2),
        ..Default::default()
    };
    daemon.client.fork_session(fork).await.unwrap();
    let added = [message("user", "one"), answer("<think>"), message("user", "two")].concat();
    for (name, context) in [("s", [&added[..], &message("user", "three")].concat()), ("f", added)] {
        assert_eq!(outcome(&daemon, turn(name, "four")).await, HistoryOutcome::Appended);
        assert_eq!(daemon.engine.last_context(), [context, question("four")].concat());
    }
}

#[tokio::test]
async fn what_append_would_lose_is_refused_and_the_session_stays() {
    let daemon = start().await;
    create(&daemon, "s", "drops", History::Append).await;
    daemon.client.generate(turn("s", "one")).await.unwrap();
    let tools = || {
        let tools = vec![ToolDefinition { name: "f".into(), ..Default::default() }];
        let chat = ChatInput { messages: vec![Message::user("two")], tools, ..Default::default() };
        GenerateRequest { input: Some(Input::Chat(chat)), ..turn("s", "") }
    };
    let error = daemon.client.generate(tools()).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::CannotAppend);
    assert!(error.to_string().contains("auto or rerender"), "{error}");
    assert_eq!(outcome(&daemon, with(History::Auto, tools())).await, HistoryOutcome::Rerendered);
}

#[tokio::test]
async fn tokens_of_another_tokenizer_are_not_built_upon() {
    let daemon = start().await;
    for name in ["s", "raw"] {
        create(&daemon, name, "drops", History::Append).await;
    }
    let raw = || GenerateRequest { session: "raw".into(), model: String::new(), ..prompt("a") };
    daemon.client.generate(turn("s", "one")).await.unwrap();
    daemon.client.generate(raw()).await.unwrap();
    daemon.client.unload_model(UnloadModelRequest { model: "drops".into() }).await.unwrap();
    let file = daemon.folder.path().join("models/drops/tokenizer.json");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text + "\n").unwrap();

    assert_eq!(outcome(&daemon, turn("s", "two")).await, HistoryOutcome::Rerendered);
    let rewritten = [message("user", "one"), message("assistant", ""), question("two")].concat();
    assert_eq!(daemon.engine.last_context(), rewritten);
    assert_eq!(outcome(&daemon, turn("s", "three")).await, HistoryOutcome::Appended);
    let error = daemon.client.generate(raw()).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::SessionTokenizerChanged);
    assert_eq!(error.call().unwrap().metadata["model"], "drops");
    let input = Some(score_request::Input::Text("a".into()));
    let score = ScoreRequest { session: "raw".into(), input, ..ScoreRequest::default() };
    let error = daemon.client.score(score).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::SessionTokenizerChanged);
}

#[tokio::test]
async fn history_is_for_chat_turns_of_sessions() {
    let daemon = start().await;
    create(&daemon, "s", "drops", History::Append).await;
    let raw = GenerateRequest { session: "s".into(), model: String::new(), ..prompt("a") };
    for request in [with(History::Append, raw), with(History::Auto, prompt("a"))] {
        let error = daemon.client.generate(request).await.unwrap_err();
        assert_eq!(error.reason(), ErrorReason::InvalidField);
        assert_eq!(error.call().unwrap().metadata["field"], "history");
    }
}
