//! A message as a session keeps it, and as chat templates read it.

use serde_json::{Map, Value, json};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Instructions to the model.
    System,
    /// The person or program that asks.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
    /// Instructions that some models rank between system and user.
    Developer,
}

impl Role {
    /// The name chat templates know.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
            Self::Developer => "developer",
        }
    }
}

/// A function call made by the assistant.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// Identifies the call within the conversation.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// The arguments, a JSON object.
    pub arguments: Map<String, Value>,
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said, its parts joined.
    pub text: String,
    /// The speaker's name; empty for none.
    pub name: String,
    /// The tool calls of an assistant message.
    pub tool_calls: Vec<ToolCall>,
    /// For role tool: the call it answers; empty for none.
    pub tool_call_id: String,
}

impl Message {
    /// A message that is only text.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        let (name, tool_call_id) = (String::new(), String::new());
        Self { role, text: text.into(), name, tool_calls: Vec::new(), tool_call_id }
    }

    /// The message as a chat template's variable: what is empty is left out, but for the content.
    #[must_use]
    pub fn to_template_value(&self) -> Value {
        let Self { role, text, name, tool_calls, tool_call_id } = self;
        let mut fields = Map::new();
        fields.insert("role".into(), role.as_str().into());
        fields.insert("content".into(), text.as_str().into());
        if !name.is_empty() {
            fields.insert("name".into(), name.as_str().into());
        }
        if !tool_calls.is_empty() {
            fields.insert("tool_calls".into(), tool_calls.iter().map(ToolCall::to_template_value).collect());
        }
        if !tool_call_id.is_empty() {
            fields.insert("tool_call_id".into(), tool_call_id.as_str().into());
        }
        Value::Object(fields)
    }
}

impl ToolCall {
    fn to_template_value(&self) -> Value {
        let Self { id, name, arguments } = self;
        json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_fields_are_left_out_of_the_template_value() {
        let value = Message::text(Role::User, "hi").to_template_value();
        assert_eq!(value, json!({ "role": "user", "content": "hi" }));
    }

    #[test]
    fn tool_calls_have_the_shape_templates_expect() {
        let mut message = Message::text(Role::Assistant, "");
        let arguments = json!({ "city": "Paris" }).as_object().cloned().unwrap();
        message.tool_calls.push(ToolCall { id: "1".into(), name: "weather".into(), arguments });
        let value = message.to_template_value();
        assert_eq!(value["tool_calls"][0]["function"]["arguments"]["city"], "Paris");
        assert_eq!(value["tool_calls"][0]["type"], "function");
    }
}
