//! Conversations: messages and tools from proto, and a session's messages back. Only the shape is checked
//! here; the rules of what a message may contain are in `service`.

use super::json;
use super::pb::{self, content_part::Part as Content};
use crate::error::Error;
use crate::service::{
    Chat, Input, Message, Part, ReasoningOptions, Role, Tool, ToolCall, ToolChoice, ToolResult,
};

pub(super) fn chat(chat: pb::ChatInput) -> Result<Chat, Error> {
    let pb::ChatInput {
        messages,
        tools,
        template_arguments,
        add_generation_prompt,
        tool_choice,
        parallel_tool_calls,
        tool_format,
        continue_final_message,
        allow_control_tokens,
    } = chat;
    let messages = messages.into_iter().enumerate();
    let messages = messages.map(|(index, sent)| message(&format!("chat.messages[{index}]"), sent));
    let tools = tools.into_iter().enumerate();
    let tools = tools.map(|(index, sent)| tool(&format!("chat.tools[{index}]"), sent));
    Ok(Chat {
        messages: messages.collect::<Result<_, _>>()?,
        tools: tools.collect::<Result<_, _>>()?,
        arguments: json::from_struct("chat.template_arguments", template_arguments.unwrap_or_default())?,
        add_generation_prompt,
        tool_choice: tool_choice.map(choice).transpose()?,
        parallel_tool_calls,
        prompts_tools: match pb::ToolFormat::try_from(tool_format) {
            Ok(pb::ToolFormat::Unspecified) => false,
            Ok(pb::ToolFormat::Prompted) => true,
            Err(_) => return Err(Error::field("chat.tool_format", "unknown format")),
        },
        reasoning: ReasoningOptions::default(),
        continue_final_message,
        allow_control_tokens,
    })
}

/// Returns a chat whose request says this about reasoning, which is for chats only.
pub(super) fn reasoning(input: &mut Input, sent: Option<pb::ReasoningOptions>) -> Result<(), Error> {
    let Some(pb::ReasoningOptions { enabled, budget_tokens, effort }) = sent else { return Ok(()) };
    let Input::Chat(chat) = input else { return Err(Error::field("reasoning", "is for chat input")) };
    chat.reasoning = ReasoningOptions { enabled, budget_tokens, effort };
    Ok(())
}

fn choice(sent: pb::ToolChoice) -> Result<ToolChoice, Error> {
    use pb::tool_choice::Choice as Wire;
    let refuse = |why| Err(Error::field("chat.tool_choice", why));
    match sent.choice {
        None => refuse("must say a choice"),
        Some(Wire::Function(name)) if name.is_empty() => refuse("must name a tool"),
        Some(Wire::Function(name)) => Ok(ToolChoice::Function(name)),
        Some(Wire::Mode(mode)) => match pb::ToolChoiceMode::try_from(mode) {
            Ok(pb::ToolChoiceMode::Unspecified | pb::ToolChoiceMode::Auto) => Ok(ToolChoice::Auto),
            Ok(pb::ToolChoiceMode::None) => Ok(ToolChoice::None),
            Ok(pb::ToolChoiceMode::Required) => Ok(ToolChoice::Required),
            Err(_) => refuse("unknown mode"),
        },
    }
}

fn message(path: &str, sent: pb::Message) -> Result<Message, Error> {
    let pb::Message { role, content, name, tool_calls, tool_call_id, reasoning } = sent;
    let role = match pb::Role::try_from(role) {
        Ok(pb::Role::System) => Role::System,
        Ok(pb::Role::User) => Role::User,
        Ok(pb::Role::Assistant) => Role::Assistant,
        Ok(pb::Role::Tool) => Role::Tool,
        Ok(pb::Role::Developer) => Role::Developer,
        Ok(pb::Role::Unspecified) => return Err(Error::field(format!("{path}.role"), "must be given")),
        Err(_) => return Err(Error::field(format!("{path}.role"), "unknown role")),
    };
    let mut texts = Vec::with_capacity(content.len());
    for (index, part) in content.into_iter().enumerate() {
        match part.part {
            Some(Content::Text(text)) => texts.push(text),
            None => return Err(Error::field(format!("{path}.content[{index}]"), "must be text")),
        }
    }
    let mut parts: Vec<Part> = if tool_call_id.is_empty() {
        texts.into_iter().map(Part::Text).collect()
    } else {
        vec![Part::ToolResult(ToolResult { call_id: tool_call_id, text: texts.concat() })]
    };
    if !reasoning.is_empty() {
        parts.insert(0, Part::Reasoning(reasoning));
    }
    for (index, call) in tool_calls.into_iter().enumerate() {
        parts.push(Part::ToolCall(tool_call(&format!("{path}.tool_calls[{index}]"), call)?));
    }
    Ok(Message { role, name, parts })
}

fn tool_call(path: &str, sent: pb::ToolCall) -> Result<ToolCall, Error> {
    let pb::ToolCall { id, name, arguments_json } = sent;
    let arguments = json::object(&format!("{path}.arguments_json"), &arguments_json)?;
    Ok(ToolCall { id, name, arguments })
}

fn tool(path: &str, sent: pb::ToolDefinition) -> Result<Tool, Error> {
    let pb::ToolDefinition { name, description, parameters_json } = sent;
    let parameters = json::object(&format!("{path}.parameters_json"), &parameters_json)?;
    Ok(Tool { name, description, parameters })
}

/// Returns a session's message as it is sent: the contract joins texts, so they are one part.
pub(super) fn wire(message: &Message) -> pb::Message {
    let role = match message.role {
        Role::System => pb::Role::System,
        Role::User => pb::Role::User,
        Role::Assistant => pb::Role::Assistant,
        Role::Tool => pb::Role::Tool,
        Role::Developer => pb::Role::Developer,
    };
    pb::Message {
        role: role.into(),
        content: vec![pb::ContentPart { part: Some(Content::Text(message.joined_text())) }],
        name: message.name.clone(),
        tool_calls: message.tool_calls().map(wire_call).collect(),
        tool_call_id: message.answered_call().to_owned(),
        reasoning: message.reasoning(),
    }
}

fn wire_call(call: &ToolCall) -> pb::ToolCall {
    let ToolCall { id, name, arguments } = call;
    let arguments_json = serde_json::Value::Object(arguments.clone()).to_string();
    pb::ToolCall { id: id.clone(), name: name.clone(), arguments_json }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(role: pb::Role, text: &str) -> pb::Message {
        let content = vec![pb::ContentPart { part: Some(Content::Text(text.into())) }];
        pb::Message { role: role.into(), content, ..Default::default() }
    }

    fn field_of(messages: Vec<pb::Message>) -> String {
        match chat(pb::ChatInput { messages, ..Default::default() }) {
            Err(Error::InvalidField { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn errors_name_the_message_and_the_field() {
        let good = said(pb::Role::User, "hi");
        let after_good = |bad: pb::Message| field_of(vec![good.clone(), bad]);
        assert_eq!(after_good(said(pb::Role::Unspecified, "")), "chat.messages[1].role");
        assert_eq!(after_good(pb::Message { role: 99, ..Default::default() }), "chat.messages[1].role");
        let mut bare = good.clone();
        bare.content.push(pb::ContentPart { part: None });
        assert_eq!(after_good(bare), "chat.messages[1].content[1]");
        let mut caller = said(pb::Role::Assistant, "");
        let arguments_json = "[1]".into();
        caller.tool_calls.push(pb::ToolCall { name: "f".into(), arguments_json, ..Default::default() });
        assert_eq!(after_good(caller), "chat.messages[1].tool_calls[0].arguments_json");
    }

    #[test]
    fn parts_are_held_apart_and_sent_back_joined() {
        let mut sent = said(pb::Role::User, "a");
        sent.content.push(pb::ContentPart { part: Some(Content::Text("b".into())) });
        let held = message("m", sent).unwrap();
        assert_eq!(held.parts, [Part::Text("a".into()), Part::Text("b".into())]);
        assert_eq!(wire(&held), said(pb::Role::User, "ab"));
    }

    #[test]
    fn tool_calls_and_results_come_back_as_they_were_sent() {
        let call = pb::ToolCall { id: "1".into(), name: "f".into(), arguments_json: "{}".into() };
        let calls = pb::Message { tool_calls: vec![call], ..said(pb::Role::Assistant, "") };
        let result = pb::Message { tool_call_id: "1".into(), ..said(pb::Role::Tool, "sunny") };
        let thought = pb::Message { reasoning: "why".into(), ..said(pb::Role::Assistant, "so") };
        for sent in [calls, result, thought] {
            assert_eq!(wire(&message("m", sent.clone()).unwrap()), sent);
        }
    }

    #[test]
    fn empty_and_null_arguments_stand_for_none() {
        for arguments_json in ["", " ", "null", "{}"] {
            let arguments_json = arguments_json.to_owned();
            let call = pb::ToolCall { name: "f".into(), arguments_json, ..Default::default() };
            assert!(tool_call("c", call).unwrap().arguments.is_empty());
        }
    }

    #[test]
    fn template_arguments_are_in_the_order_of_their_names_however_they_were_sent() {
        use prost::Message as _;
        use prost_types::{Struct, Value as Wire};
        let one = |name: &str| Struct { fields: [(name.to_owned(), Wire { kind: None })].into() };
        for order in [["b", "a", "c"], ["c", "b", "a"]] {
            let sent = order.map(|name| one(name).encode_to_vec()).concat();
            let arguments = json::from_struct("a", Struct::decode(&*sent).unwrap()).unwrap();
            assert_eq!(arguments.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        }
    }

    #[test]
    fn template_arguments_keep_whole_numbers_whole_and_refuse_nan() {
        use prost_types::{Struct, Value as Wire, value::Kind};
        let arguments = |number| Struct {
            fields: [("n".to_owned(), Wire { kind: Some(Kind::NumberValue(number)) })].into(),
        };
        assert_eq!(json::from_struct("a", arguments(3.0)).unwrap()["n"], json!(3));
        assert_eq!(json::from_struct("a", arguments(0.5)).unwrap()["n"], json!(0.5));
        assert!(json::from_struct("a", arguments(f64::NAN)).is_err());
    }
}
