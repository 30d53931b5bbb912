//! Tools for models whose chat template has no place for them: a system text describes them, and calls and
//! results are written as text, in a form of our own that any model can follow.

use std::io;

use serde_json::Value;
use serde_json::ser::Formatter;

/// A conversation without tools, calls and results, for templates that know none of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Conversation {
    /// The messages.
    pub(super) messages: Vec<Value>,
    /// Where each message that was given is among them; then their number.
    pub(super) places: Vec<usize>,
    /// The message that describes the tools, and what it says without that.
    pub(super) taught: Option<(usize, Value)>,
}

impl Conversation {
    /// Takes messages as they are.
    pub(super) fn plain(messages: Vec<Value>) -> Self {
        let places = (0..=messages.len()).collect();
        Self { messages, places, taught: None }
    }

    /// Writes calls and results as text, and `instructions`, unless they are empty, into the system message,
    /// or the first message of the user where the template `has_system` not.
    pub(super) fn prompted(given: Vec<Value>, instructions: &str, has_system: bool) -> Self {
        let (mut messages, mut places) =
            (Vec::with_capacity(given.len() + 1), Vec::with_capacity(given.len() + 1));
        let mut follows_result = false;
        for mut message in given {
            let is_result = message["role"] == "tool";
            if is_result {
                let result = format!("<tool_response>\n{}\n</tool_response>", text(&message));
                // Many templates want users and assistants to alternate.
                if let Some(before) = messages.last_mut().filter(|_| follows_result) {
                    add(before, &result);
                    places.push(messages.len() - 1);
                    continue;
                }
                message = serde_json::json!({ "role": "user", "content": result });
            } else {
                write_calls(&mut message);
            }
            follows_result = is_result;
            places.push(messages.len());
            messages.push(message);
        }
        places.push(messages.len());
        let mut conversation = Self { messages, places, taught: None };
        if !instructions.is_empty() {
            conversation.teach(instructions, has_system);
        }
        conversation
    }

    fn teach(&mut self, instructions: &str, has_system: bool) {
        let place = if has_system {
            self.messages.first().is_some_and(is_instruction).then_some(0)
        } else {
            self.messages.iter().position(|message| message["role"] == "user")
        };
        let place = place.unwrap_or_else(|| {
            let role = if has_system { "system" } else { "user" };
            self.messages.insert(0, serde_json::json!({ "role": role, "content": "" }));
            self.places.iter_mut().for_each(|place| *place += 1);
            0
        });
        let message = &mut self.messages[place];
        self.taught = Some((place, message["content"].clone()));
        add(message, instructions);
    }
}

/// Returns whether a message says how to answer.
pub(super) fn is_instruction(message: &Value) -> bool {
    ["system", "developer"].iter().any(|role| message["role"] == *role)
}

fn text(message: &Value) -> &str {
    message["content"].as_str().unwrap_or_default()
}

/// Adds a paragraph to a message.
fn add(message: &mut Value, paragraph: &str) {
    let before = text(message);
    let between = if before.is_empty() { "" } else { "\n\n" };
    message["content"] = [before, between, paragraph].concat().into();
}

/// Returns JSON with the spaces that models write.
fn spaced(value: &Value) -> String {
    let mut out = Vec::new();
    let mut writer = serde_json::Serializer::with_formatter(&mut out, Spaced);
    // Writing to memory does not fail.
    _ = serde::Serialize::serialize(value, &mut writer);
    String::from_utf8(out).unwrap_or_default()
}

/// The layout of Python's `json.dumps`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, to: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, to: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        to.write_all(b": ")
    }
}

/// Writes a message's calls into its text.
fn write_calls(message: &mut Value) {
    let Some(Value::Array(calls)) = message.as_object_mut().and_then(|fields| fields.remove("tool_calls"))
    else {
        return;
    };
    for call in calls {
        let (name, arguments) = (&call["function"]["name"], spaced(&call["function"]["arguments"]));
        let call = format!("<tool_call>\n{{\"name\": {name}, \"arguments\": {arguments}}}\n</tool_call>");
        let before = text(message);
        let between = if before.is_empty() { "" } else { "\n" };
        message["content"] = [before, between, &call].concat().into();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(role: &str, content: &str) -> Value {
        json!({ "role": role, "content": content })
    }

    fn called(content: &str) -> Value {
        let call =
            json!({ "id": "1", "type": "function", "function": { "name": "f", "arguments": { "a": 1 } } });
        json!({ "role": "assistant", "content": content, "tool_calls": [call] })
    }

    #[test]
    fn calls_and_results_become_text() {
        let given =
            vec![said("user", "q"), called("so"), said("tool", "x"), said("tool", "y"), said("user", "z")];
        let written = Conversation::prompted(given, "", true);
        let call = "so\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";
        let results = "<tool_response>\nx\n</tool_response>\n\n<tool_response>\ny\n</tool_response>";
        let expected = [said("user", "q"), said("assistant", call), said("user", results), said("user", "z")];
        assert_eq!((&written.messages[..], &written.taught), (&expected[..], &None));
        assert_eq!(written.places, [0, 1, 2, 2, 3, 4]);
    }

    #[test]
    fn the_tools_are_described_where_the_template_writes_it() {
        let teach = |given: &[Value], has_system| Conversation::prompted(given.to_vec(), "T", has_system);
        let own = teach(&[said("system", "S"), said("user", "q")], true);
        assert_eq!(own.messages[0], said("system", "S\n\nT"));
        assert_eq!((own.taught, own.places), (Some((0, "S".into())), vec![0, 1, 2]));
        let new = teach(&[said("user", "q")], true);
        assert_eq!(new.messages, [said("system", "T"), said("user", "q")]);
        assert_eq!((new.taught, new.places), (Some((0, "".into())), vec![1, 2]));
        let none = teach(&[said("assistant", "a"), said("user", "q")], false);
        assert_eq!(none.messages, [said("assistant", "a"), said("user", "q\n\nT")]);
        assert_eq!(none.taught, Some((1, "q".into())));
    }
}
