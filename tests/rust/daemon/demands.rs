//! Calls that a request demands, and forms of answers: what of them is refused, and by which name.

use mlxd_client::v1::{
    ChatInput, GenerateRequest, Message, ResponseFormat, StoppingOptions, ToolChoice, ToolChoiceMode,
    ToolDefinition, ToolFormat,
};

use crate::daemon::harness::refused;
use crate::daemon::tools::{self, ask, say, start, weather, with_tools};

fn required() -> Option<ToolChoice> {
    Some(ToolChoice::mode(ToolChoiceMode::Required))
}

/// A chat that demands a call.
fn demanding() -> ChatInput {
    ChatInput { tool_choice: required(), ..with_tools(vec![say("a")]) }
}

#[tokio::test]
async fn calls_that_cannot_be_made_are_not_demanded() {
    let daemon = start().await;
    let refused = async |chat| refused(&daemon, ask(chat)).await;
    let unknown = ChatInput { tool_choice: Some(ToolChoice::function("rain")), ..demanding() };
    assert_eq!(refused(unknown).await, "chat.tool_choice");
    let nameless = ChatInput { tool_choice: Some(ToolChoice::function("")), ..demanding() };
    assert_eq!(refused(nameless).await, "chat.tool_choice");
    assert_eq!(refused(ChatInput { tools: vec![], ..demanding() }).await, "chat.tool_choice");
    let messages = vec![say("a"), Message::assistant("So")];
    let continued = ChatInput { messages, continue_final_message: true, ..demanding() };
    assert_eq!(refused(continued).await, "chat.tool_choice");
    let odd = ToolDefinition { name: "\"".into(), ..weather() };
    assert_eq!(refused(ChatInput { tools: vec![odd], ..demanding() }).await, "chat.tools");
}

#[tokio::test]
async fn a_model_whose_form_of_calls_is_unknown_is_told_one() {
    let daemon = start().await;
    tools::add(&daemon, "plain", "{% for m in messages %}{{ m.content }}{% endfor %}");
    let plain = |chat| GenerateRequest { model: "plain".into(), ..ask(chat) };
    assert_eq!(refused(&daemon, plain(demanding())).await, "chat.tool_choice");
    let prompted = ChatInput { tool_format: ToolFormat::Prompted.into(), ..demanding() };
    daemon.client.generate(plain(prompted)).await.unwrap();
}

#[tokio::test]
async fn what_an_answer_is_held_to_contradicts_nothing_else() {
    let daemon = start().await;
    let format = || Some(ResponseFormat::json_object());
    let both = GenerateRequest { response_format: format(), ..ask(with_tools(vec![say("a")])) };
    assert_eq!(refused(&daemon, both).await, "response_format");
    let endless = || Some(StoppingOptions { ignore_eos: true, max_tokens: Some(3), ..Default::default() });
    let demanded = GenerateRequest { stopping: endless(), ..ask(demanding()) };
    assert_eq!(refused(&daemon, demanded).await, "stopping.ignore_eos");
    let chat = || ChatInput { tool_choice: Some(ToolChoice::mode(ToolChoiceMode::None)), ..demanding() };
    let formed = GenerateRequest { stopping: endless(), response_format: format(), ..ask(chat()) };
    assert_eq!(refused(&daemon, formed).await, "stopping.ignore_eos");
    daemon.client.generate(GenerateRequest { response_format: format(), ..ask(chat()) }).await.unwrap();
}
