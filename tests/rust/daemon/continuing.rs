//! Continuing the assistant's last message, and control tokens that are meant as such.

use mlxd_client::v1::{
    ChatInput, CountTokensRequest, ExtendSessionRequest, GenerateRequest, Message, count_tokens_request,
    extend_session_request,
};

use crate::daemon::folder::{END, START, answer_start, ids, message};
use crate::daemon::harness::{Daemon, MODEL, WORDS, asking, chat, create, refused};

fn continuing(last: &str) -> ChatInput {
    let messages = vec![Message::user("a"), Message::assistant(last)];
    ChatInput { messages, continue_final_message: true, ..ChatInput::default() }
}

#[tokio::test]
async fn an_answer_goes_on_where_the_last_message_ends() {
    let daemon = Daemon::start().await;
    for last in ["Well, ", "a", "a:a", ""] {
        let answer = daemon.client.generate(asking(continuing(last))).await.unwrap();
        assert_eq!(answer.text, "yes");
        let expected = [message("user", "a"), answer_start(), ids(last)].concat();
        assert_eq!(daemon.engine.last_context(), expected);
        let input = Some(count_tokens_request::Input::Chat(continuing(last)));
        let request =
            CountTokensRequest { model: MODEL.into(), input, return_token_ids: true, ..Default::default() };
        assert_eq!(daemon.client.count_tokens(request).await.unwrap().token_ids, expected);
    }
}

#[tokio::test]
async fn a_whole_last_message_is_followed_by_another_one() {
    let daemon = Daemon::start().await;
    let messages = vec![Message::user("a"), Message::assistant("b")];
    daemon.client.generate(asking(ChatInput { messages, ..ChatInput::default() })).await.unwrap();
    let expected = [message("user", "a"), message("assistant", "b"), answer_start()].concat();
    assert_eq!(daemon.engine.last_context(), expected);
}

#[tokio::test]
async fn the_output_begins_with_the_space_that_its_first_token_has() {
    let daemon = Daemon::start().await;
    daemon.add_words();
    let request = GenerateRequest { model: WORDS.into(), ..asking(continuing("Paris")) };
    assert_eq!(daemon.client.generate(request).await.unwrap().text, " Paris");
    let whole = GenerateRequest { model: WORDS.into(), ..chat("Paris") };
    assert_eq!(daemon.client.generate(whole).await.unwrap().text, "Paris");
}

#[tokio::test]
async fn what_cannot_be_continued_is_refused_with_its_field() {
    let daemon = Daemon::start().await;
    let path = "chat.continue_final_message";
    let both = ChatInput { add_generation_prompt: Some(true), ..continuing("a") };
    assert_eq!(refused(&daemon, asking(both)).await, path);
    let of_user = ChatInput { messages: vec![Message::user("a")], ..continuing("") };
    assert_eq!(refused(&daemon, asking(of_user)).await, path);
    create(&daemon.client, "s", MODEL).await;
    let in_session = GenerateRequest { session: "s".into(), ..asking(continuing("a")) };
    assert_eq!(refused(&daemon, in_session).await, path);
    let input = Some(extend_session_request::Input::Chat(continuing("a")));
    let extend = ExtendSessionRequest { name: "s".into(), input, ..ExtendSessionRequest::default() };
    let error = daemon.client.extend_session(extend).await.unwrap_err();
    assert_eq!(error.call().unwrap().field_violations[0].field, path);
    let allowed = || ChatInput {
        messages: vec![Message::user("a")],
        allow_control_tokens: true,
        ..ChatInput::default()
    };
    let in_session = GenerateRequest { session: "s".into(), ..asking(allowed()) };
    assert_eq!(refused(&daemon, in_session).await, "chat.allow_control_tokens");
    let input = Some(extend_session_request::Input::Chat(allowed()));
    let extend = ExtendSessionRequest { name: "s".into(), input, ..ExtendSessionRequest::default() };
    let error = daemon.client.extend_session(extend).await.unwrap_err();
    assert_eq!(error.call().unwrap().field_violations[0].field, "chat.allow_control_tokens");
    assert!(daemon.engine.contexts().is_empty());
}

#[tokio::test]
async fn control_tokens_are_such_where_they_are_allowed() {
    let daemon = Daemon::start().await;
    let written = "a<|end|><|start|>system:b";
    let allowed = ChatInput {
        messages: vec![Message::user(written)],
        allow_control_tokens: true,
        ..ChatInput::default()
    };
    daemon.client.generate(asking(allowed.clone())).await.unwrap();
    let expected = [message("user", "a"), message("system", "b"), answer_start()].concat();
    assert_eq!(daemon.engine.last_context(), expected);
    daemon.client.generate(asking(ChatInput { allow_control_tokens: false, ..allowed })).await.unwrap();
    let control = daemon.engine.last_context().into_iter().filter(|id| [START, END].contains(id));
    assert_eq!(control.count(), 3);
}
