//! What to run on: text, token ids, or a conversation.

use serde_json::{Map, Value, json};

use super::json;
use crate::error::Error;
use crate::rpc::pb::{self, content_part::Part};
use crate::session::{InputKind, Message, Role, ToolCall};

/// An input, checked as far as it can be without the model.
#[derive(Debug)]
pub(in crate::rpc) enum Input {
    /// And the field it came in.
    Text(&'static str, String),
    Ids(Vec<u32>),
    Chat(Chat),
}

/// A conversation, or its new part.
#[derive(Debug)]
pub(in crate::rpc) struct Chat {
    pub(in crate::rpc) messages: Vec<Message>,
    pub(in crate::rpc) tools: Vec<Value>,
    pub(in crate::rpc) arguments: Map<String, Value>,
}

impl Input {
    pub(in crate::rpc) fn kind(&self) -> InputKind {
        match self {
            Self::Text(..) | Self::Ids(_) => InputKind::Raw,
            Self::Chat(_) => InputKind::Chat,
        }
    }

    /// The path of the field it came in.
    pub(in crate::rpc) fn path(&self) -> &'static str {
        match self {
            Self::Text(path, _) => path,
            Self::Ids(_) => "token_ids.ids",
            Self::Chat(_) => "chat",
        }
    }
}

pub(in crate::rpc) fn generate_input(input: Option<pb::generate_request::Input>) -> Result<Input, Error> {
    use pb::generate_request::Input as Wire;
    match input.ok_or_else(missing)? {
        Wire::Prompt(text) => raw_text("prompt", text),
        Wire::TokenIds(list) => raw_ids(list),
        Wire::Chat(chat) => Ok(Input::Chat(conversation(chat)?)),
    }
}

pub(in crate::rpc) fn count_input(input: Option<pb::count_tokens_request::Input>) -> Result<Input, Error> {
    use pb::count_tokens_request::Input as Wire;
    match input.ok_or_else(missing)? {
        // Nothing to count is a count too.
        Wire::Prompt(text) => Ok(Input::Text("prompt", text)),
        Wire::Chat(chat) => Ok(Input::Chat(conversation(chat)?)),
    }
}

pub(in crate::rpc) fn score_input(input: Option<pb::score_request::Input>) -> Result<Input, Error> {
    use pb::score_request::Input as Wire;
    match input.ok_or_else(missing)? {
        Wire::Text(text) => raw_text("text", text),
        Wire::TokenIds(list) => raw_ids(list),
    }
}

fn missing() -> Error {
    Error::field("input", "must be given")
}

fn raw_text(path: &'static str, text: String) -> Result<Input, Error> {
    if text.is_empty() { Err(Error::EmptyPrompt) } else { Ok(Input::Text(path, text)) }
}

fn raw_ids(list: pb::TokenIds) -> Result<Input, Error> {
    if list.ids.is_empty() { Err(Error::EmptyPrompt) } else { Ok(Input::Ids(list.ids)) }
}

fn conversation(chat: pb::ChatInput) -> Result<Chat, Error> {
    let pb::ChatInput { messages, tools, template_arguments } = chat;
    if messages.is_empty() {
        return Err(Error::field("chat.messages", "must have at least one message"));
    }
    let messages = messages.into_iter().enumerate();
    let messages = messages.map(|(index, sent)| message(&format!("chat.messages[{index}]"), sent));
    let tools = tools.into_iter().enumerate();
    let tools = tools.map(|(index, sent)| tool(&format!("chat.tools[{index}]"), sent));
    Ok(Chat {
        messages: messages.collect::<Result<_, _>>()?,
        tools: tools.collect::<Result<_, _>>()?,
        arguments: json::from_struct("chat.template_arguments", template_arguments.unwrap_or_default())?,
    })
}

fn message(path: &str, sent: pb::Message) -> Result<Message, Error> {
    let pb::Message { role, content, name, tool_calls, tool_call_id } = sent;
    let role = match pb::Role::try_from(role) {
        Ok(pb::Role::System) => Role::System,
        Ok(pb::Role::User) => Role::User,
        Ok(pb::Role::Assistant) => Role::Assistant,
        Ok(pb::Role::Tool) => Role::Tool,
        Ok(pb::Role::Developer) => Role::Developer,
        Ok(pb::Role::Unspecified) => return Err(Error::field(format!("{path}.role"), "must be given")),
        Err(_) => return Err(Error::field(format!("{path}.role"), "is not a role this daemon knows")),
    };
    if role != Role::Assistant && !tool_calls.is_empty() {
        return Err(Error::field(format!("{path}.tool_calls"), "only the assistant makes tool calls"));
    }
    if role != Role::Tool && !tool_call_id.is_empty() {
        return Err(Error::field(
            format!("{path}.tool_call_id"),
            "only a message of role tool answers a call",
        ));
    }
    let mut text = String::new();
    for (index, part) in content.into_iter().enumerate() {
        match part.part {
            Some(Part::Text(part)) => text.push_str(&part),
            None => return Err(Error::field(format!("{path}.content[{index}]"), "must be text")),
        }
    }
    let calls = tool_calls.into_iter().enumerate();
    let calls = calls.map(|(index, call)| tool_call(&format!("{path}.tool_calls[{index}]"), call));
    Ok(Message { role, text, name, tool_calls: calls.collect::<Result<_, _>>()?, tool_call_id })
}

fn tool_call(path: &str, sent: pb::ToolCall) -> Result<ToolCall, Error> {
    let pb::ToolCall { id, name, arguments_json } = sent;
    if name.is_empty() {
        return Err(Error::field(format!("{path}.name"), "must be given"));
    }
    let arguments = json::object(&format!("{path}.arguments_json"), &arguments_json)?;
    Ok(ToolCall { id, name, arguments })
}

/// In the shape that chat templates expect.
fn tool(path: &str, sent: pb::ToolDefinition) -> Result<Value, Error> {
    let pb::ToolDefinition { name, description, parameters_json } = sent;
    if name.is_empty() {
        return Err(Error::field(format!("{path}.name"), "must be given"));
    }
    let parameters = json::object(&format!("{path}.parameters_json"), &parameters_json)?;
    let function = json!({ "name": name, "description": description, "parameters": parameters });
    Ok(json!({ "type": "function", "function": function }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(role: pb::Role, text: &str) -> pb::Message {
        let content = vec![pb::ContentPart { part: Some(Part::Text(text.into())) }];
        pb::Message { role: role.into(), content, ..Default::default() }
    }

    fn field_of(chat: pb::ChatInput) -> String {
        match conversation(chat) {
            Err(Error::InvalidField { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn errors_name_the_message_and_the_field() {
        let good = said(pb::Role::User, "hi");
        let chat =
            |bad: pb::Message| pb::ChatInput { messages: vec![good.clone(), bad], ..Default::default() };
        assert_eq!(field_of(chat(said(pb::Role::Unspecified, ""))), "chat.messages[1].role");
        assert_eq!(field_of(chat(pb::Message { role: 99, ..Default::default() })), "chat.messages[1].role");
        let mut bare = good.clone();
        bare.content.push(pb::ContentPart { part: None });
        assert_eq!(field_of(chat(bare)), "chat.messages[1].content[1]");
        let mut answer = good.clone();
        answer.tool_call_id = "1".into();
        assert_eq!(field_of(chat(answer)), "chat.messages[1].tool_call_id");
        let mut call = said(pb::Role::Assistant, "");
        call.tool_calls.push(pb::ToolCall {
            name: "f".into(),
            arguments_json: "[1]".into(),
            ..Default::default()
        });
        assert_eq!(field_of(chat(call)), "chat.messages[1].tool_calls[0].arguments_json");
        assert_eq!(field_of(pb::ChatInput::default()), "chat.messages");
    }

    #[test]
    fn parts_are_joined_in_order() {
        let mut sent = said(pb::Role::User, "a");
        sent.content.push(pb::ContentPart { part: Some(Part::Text("b".into())) });
        assert_eq!(message("m", sent).unwrap().text, "ab");
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

    #[test]
    fn an_empty_input_is_refused() {
        use pb::generate_request::Input as Wire;
        assert!(matches!(generate_input(Some(Wire::Prompt(String::new()))), Err(Error::EmptyPrompt)));
        assert!(matches!(generate_input(Some(Wire::TokenIds(Default::default()))), Err(Error::EmptyPrompt)));
        assert!(matches!(generate_input(None), Err(Error::InvalidField { .. })));
    }
}
