//! A message as a session holds it: parts in the order they were given; and the view of it that chat
//! templates read, where texts are joined.

use serde_json::{Map, Value, json};

/// The speaker of a message.
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
    /// Returns the name chat templates know.
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

/// A piece of a message.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// Plain text.
    Text(String),
    /// What the assistant reasoned before its text.
    Reasoning(String),
    /// A function call made by the assistant.
    ToolCall(ToolCall),
    /// The result of such a call.
    ToolResult(ToolResult),
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

/// The result of a tool call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolResult {
    /// The call that it answers.
    pub call_id: String,
    /// The result as the model reads it.
    pub text: String,
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// The speaker.
    pub role: Role,
    /// The speaker's name; empty for none.
    pub name: String,
    /// The content, in order.
    pub parts: Vec<Part>,
}

impl Message {
    /// Returns a message that is only text.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        Self { role, name: String::new(), parts: vec![Part::Text(text.into())] }
    }

    /// Returns the texts of all parts, joined in order.
    #[must_use]
    pub fn joined_text(&self) -> String {
        let texts = self.parts.iter().filter_map(|part| match part {
            Part::Text(text) | Part::ToolResult(ToolResult { text, .. }) => Some(text.as_str()),
            Part::ToolCall(_) | Part::Reasoning(_) => None,
        });
        texts.collect()
    }

    /// Returns the reasoning in it, joined in order; empty for none.
    #[must_use]
    pub fn reasoning(&self) -> String {
        let texts = self.parts.iter().filter_map(|part| match part {
            Part::Reasoning(text) => Some(text.as_str()),
            Part::Text(_) | Part::ToolCall(_) | Part::ToolResult(_) => None,
        });
        texts.collect()
    }

    /// Returns the number of its parts, itself included.
    #[must_use]
    pub fn part_count(&self) -> usize {
        1 + self.parts.len()
    }

    /// Returns the bytes of all that it holds, also of what a template leaves out.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let parts = self.parts.iter().map(|part| match part {
            Part::Text(text) | Part::Reasoning(text) => text.len(),
            Part::ToolCall(ToolCall { id, name, arguments }) => {
                id.len() + name.len() + object_bytes(arguments)
            }
            Part::ToolResult(ToolResult { call_id, text }) => call_id.len() + text.len(),
        });
        self.name.len() + parts.sum::<usize>()
    }

    /// Returns the tool calls in it.
    pub fn tool_calls(&self) -> impl Iterator<Item = &ToolCall> {
        self.parts.iter().filter_map(|part| match part {
            Part::ToolCall(call) => Some(call),
            Part::Text(_) | Part::Reasoning(_) | Part::ToolResult(_) => None,
        })
    }

    /// Returns the id of the tool call that it answers; empty for none.
    #[must_use]
    pub fn answered_call(&self) -> &str {
        let mut answered = self.parts.iter().filter_map(|part| match part {
            Part::ToolResult(result) => Some(result.call_id.as_str()),
            Part::Text(_) | Part::Reasoning(_) | Part::ToolCall(_) => None,
        });
        answered.next().unwrap_or_default()
    }

    /// Returns the message as a chat template's variable: empty fields are left out, except the content.
    #[must_use]
    pub fn to_template_value(&self) -> Value {
        let mut fields = Map::new();
        fields.insert("role".into(), self.role.as_str().into());
        fields.insert("content".into(), self.joined_text().into());
        let reasoning = self.reasoning();
        if !reasoning.is_empty() {
            fields.insert("reasoning".into(), reasoning.into());
        }
        if !self.name.is_empty() {
            fields.insert("name".into(), self.name.as_str().into());
        }
        let calls: Vec<Value> = self.tool_calls().map(ToolCall::to_template_value).collect();
        if !calls.is_empty() {
            fields.insert("tool_calls".into(), calls.into());
        }
        if !self.answered_call().is_empty() {
            fields.insert("tool_call_id".into(), self.answered_call().into());
        }
        Value::Object(fields)
    }
}

/// Bytes of a JSON value without content, and of what stands between two.
pub(super) const VALUE_BYTES: usize = 8;

/// Returns the bytes of an object, about as JSON writes it.
#[must_use]
pub fn object_bytes(object: &Map<String, Value>) -> usize {
    object.iter().map(|(key, value)| key.len() + value_bytes(value)).sum()
}

fn value_bytes(value: &Value) -> usize {
    let content = match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(value_bytes).sum(),
        Value::Object(object) => object_bytes(object),
    };
    VALUE_BYTES + content
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
        let silent = Message { role: Role::Assistant, name: String::new(), parts: Vec::new() };
        assert_eq!(silent.to_template_value(), json!({ "role": "assistant", "content": "" }));
    }

    #[test]
    fn texts_are_joined_in_order_for_templates() {
        let mut message = Message::text(Role::User, "a");
        message.parts.push(Part::Text("b".into()));
        assert_eq!(message.to_template_value()["content"], "ab");
    }

    #[test]
    fn reasoning_is_apart_from_the_text() {
        let mut message = Message::text(Role::Assistant, "4");
        message.parts.insert(0, Part::Reasoning("2 and 2".into()));
        let expected = json!({ "role": "assistant", "content": "4", "reasoning": "2 and 2" });
        assert_eq!((message.to_template_value(), message.joined_text()), (expected, "4".to_owned()));
        assert_eq!(message.bytes(), "2 and 24".len());
    }

    #[test]
    fn tool_calls_and_results_have_the_shape_templates_expect() {
        let mut message = Message::text(Role::Assistant, "");
        let arguments = json!({ "city": "Paris" }).as_object().cloned().unwrap();
        message.parts.push(Part::ToolCall(ToolCall { id: "1".into(), name: "weather".into(), arguments }));
        let value = message.to_template_value();
        assert_eq!(value["tool_calls"][0]["function"]["arguments"]["city"], "Paris");
        assert_eq!(value["tool_calls"][0]["type"], "function");
        let result = Part::ToolResult(ToolResult { call_id: "1".into(), text: "sunny".into() });
        let message = Message { role: Role::Tool, name: String::new(), parts: vec![result] };
        let expected = json!({ "role": "tool", "content": "sunny", "tool_call_id": "1" });
        assert_eq!(message.to_template_value(), expected);
    }
}
