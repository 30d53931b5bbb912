//! A conversation as a caller sends it: messages, the tools a model may call, and what it does before it
//! answers.

use serde_json::{Map, Value, json};

use super::fields::{at_least_one, at_most, at_most_bytes};
use crate::error::Error;
use crate::limits::Limits;
use crate::session::{Message, Part, Role, object_bytes};

/// Path of what a chat says about the beginning of an answer.
pub(super) const GENERATION_PROMPT: &str = "chat.add_generation_prompt";

/// Path of what a chat says about its last message.
pub(super) const CONTINUES: &str = "chat.continue_final_message";

/// Path of what a chat says about calls.
pub(super) const TOOL_CHOICE: &str = "chat.tool_choice";

/// Messages for a chat template.
#[derive(Debug, Default)]
pub struct Chat {
    /// The messages, oldest first.
    pub messages: Vec<Message>,
    /// Tools the model may call.
    pub tools: Vec<Tool>,
    /// Further variables of the template.
    pub arguments: Map<String, Value>,
    /// Whether the text ends with what begins an answer; unset is what the call usually does.
    pub add_generation_prompt: Option<bool>,
    /// Whether the text ends within the last message, the assistant's, for the model to go on with it.
    pub continue_final_message: bool,
    /// Whether what looks like a control token in the texts of people and tools is one.
    pub allow_control_tokens: bool,
    /// Which of the tools the model may call; unset leaves it to the model.
    pub tool_choice: Option<ToolChoice>,
    /// Whether one answer may have several calls; unset is yes.
    pub parallel_tool_calls: Option<bool>,
    /// Whether tools, calls and results are written as text, in a form of our own.
    pub prompts_tools: bool,
    /// What the model does before it answers.
    pub reasoning: ReasoningOptions,
}

/// Which of the given tools a model may call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// Those that it wants to.
    Auto,
    /// None; it does not see them.
    None,
    /// At least one of them.
    Required,
    /// The one of this name, at least once.
    Function(String),
}

/// What a model does before it answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReasoningOptions {
    /// Whether it reasons; unset leaves that to the template.
    pub enabled: Option<bool>,
    /// Most tokens of it; None is without limit.
    pub budget_tokens: Option<u32>,
    /// How much, in the template's words; empty leaves that to it.
    pub effort: String,
}

/// How a conversation's text ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// After its last message.
    Whole,
    /// With what begins an answer.
    AnswerBegun,
    /// Within its last message, after its content. Not in a session.
    Continued,
}

/// A function the model may call.
#[derive(Debug)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// Its purpose, for the model to read.
    pub description: String,
    /// JSON schema of its parameters.
    pub parameters: Map<String, Value>,
}

impl Chat {
    /// Refuses messages and tools that contradict themselves or are beyond a limit.
    pub(super) fn check(&self, limits: &Limits) -> Result<(), Error> {
        at_least_one("chat.messages", self.messages.len(), "message")?;
        at_most("chat.messages", self.part_count(), "chat_parts_max", limits.chat_parts_max)?;
        at_most("chat.tools", self.tools.len(), "tools_max", limits.tools_max)?;
        at_most_bytes("chat", self.bytes(), limits)?;
        for (index, message) in self.messages.iter().enumerate() {
            check_message(&format!("chat.messages[{index}]"), message)?;
        }
        self.check_continued()?;
        let nameless = self.tools.iter().position(|tool| tool.name.is_empty());
        match nameless {
            Some(index) => Err(Error::field(format!("chat.tools[{index}].name"), "must be given")),
            None if self.tools.is_empty() && self.tool_choice.is_some() => {
                Err(Error::field(TOOL_CHOICE, "needs tools"))
            }
            None if self.tools.is_empty() && self.parallel_tool_calls.is_some() => {
                Err(Error::field("chat.parallel_tool_calls", "needs tools"))
            }
            None => self.check_demanded(),
        }
    }

    /// Refuses calls that are demanded and cannot be made.
    fn check_demanded(&self) -> Result<(), Error> {
        let is_there = |name: &str| self.tools.iter().any(|tool| tool.name == name);
        match &self.tool_choice {
            Some(ToolChoice::Function(name)) if !is_there(name) => {
                Err(Error::field(TOOL_CHOICE, format!("no tool has the name {name:?}")))
            }
            _ if self.demands_calls() && self.continue_final_message => {
                Err(Error::field(TOOL_CHOICE, "a message that is continued makes no calls"))
            }
            _ => Ok(()),
        }
    }

    /// Returns whether the answer has to call.
    pub(super) fn demands_calls(&self) -> bool {
        match self.tool_choice {
            Some(ToolChoice::Required | ToolChoice::Function(_)) => true,
            Some(ToolChoice::Auto | ToolChoice::None) | None => false,
        }
    }

    /// Returns the tools that the model sees.
    pub(super) fn offered_tools(&self) -> &[Tool] {
        match self.tool_choice {
            Some(ToolChoice::None) => &[],
            Some(ToolChoice::Auto | ToolChoice::Required | ToolChoice::Function(_)) | None => &self.tools,
        }
    }

    /// Refuses a last message that cannot be continued.
    fn check_continued(&self) -> Result<(), Error> {
        if !self.continue_final_message {
            return Ok(());
        }
        let last = self.messages.last();
        let why = if self.add_generation_prompt == Some(true) {
            "contradicts add_generation_prompt, which begins another message"
        } else if last.is_none_or(|message| message.role != Role::Assistant) {
            "the last message must be the assistant's"
        } else if last.is_some_and(|message| message.tool_calls().next().is_some()) {
            "the last message must be one of text, without tool calls"
        } else {
            return Ok(());
        };
        Err(Error::field(CONTINUES, why))
    }

    /// Returns how its text ends.
    pub(super) fn ending(&self) -> Ending {
        match self.add_generation_prompt {
            _ if self.continue_final_message => Ending::Continued,
            Some(false) => Ending::Whole,
            Some(true) | None => Ending::AnswerBegun,
        }
    }

    /// Returns the number of messages, their texts and tool calls.
    pub(super) fn part_count(&self) -> usize {
        self.messages.iter().map(Message::part_count).sum()
    }

    /// Returns the bytes of all that was sent, also of what a template may leave out.
    pub(super) fn bytes(&self) -> usize {
        let messages: usize = self.messages.iter().map(Message::bytes).sum();
        let tools = self
            .tools
            .iter()
            .map(|tool| tool.name.len() + tool.description.len() + object_bytes(&tool.parameters));
        messages + tools.sum::<usize>() + object_bytes(&self.arguments)
    }
}

fn check_message(path: &str, message: &Message) -> Result<(), Error> {
    let Message { role, name: _, parts } = message;
    let mut calls = 0;
    for part in parts {
        match part {
            Part::Text(_) => {}
            Part::Reasoning(_) if *role != Role::Assistant => {
                return Err(Error::field(format!("{path}.reasoning"), "only the assistant reasons"));
            }
            Part::Reasoning(_) => {}
            Part::ToolCall(_) if *role != Role::Assistant => {
                return Err(Error::field(
                    format!("{path}.tool_calls"),
                    "only the assistant makes tool calls",
                ));
            }
            Part::ToolCall(call) if call.name.is_empty() => {
                return Err(Error::field(format!("{path}.tool_calls[{calls}].name"), "must be given"));
            }
            Part::ToolCall(_) => calls += 1,
            Part::ToolResult(_) if *role != Role::Tool => {
                let why = "only a message of role tool answers a call";
                return Err(Error::field(format!("{path}.tool_call_id"), why));
            }
            Part::ToolResult(_) => {}
        }
    }
    Ok(())
}

impl Tool {
    /// Returns the definition in the shape that chat templates expect.
    pub(super) fn to_template_value(&self) -> Value {
        let Self { name, description, parameters } = self;
        let function = json!({ "name": name, "description": description, "parameters": parameters });
        json!({ "type": "function", "function": function })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::{ToolCall, ToolResult};

    fn limits() -> Limits {
        Limits { text_bytes_max: 1000, chat_parts_max: 4, tools_max: 1, ..Limits::default() }
    }

    fn field_of(messages: Vec<Message>) -> String {
        let chat = Chat { messages, ..Chat::default() };
        match chat.check(&limits()) {
            Err(Error::InvalidField { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    fn call(name: &str) -> Part {
        Part::ToolCall(ToolCall { id: String::new(), name: name.into(), arguments: Map::new() })
    }

    #[test]
    fn errors_name_the_message_and_the_field() {
        let said = |role, parts| Message { role, name: String::new(), parts };
        let good = || Message::text(Role::User, "hi");
        assert_eq!(field_of(Vec::new()), "chat.messages");
        let result = Part::ToolResult(ToolResult { call_id: "1".into(), text: String::new() });
        let answer = said(Role::User, vec![result]);
        assert_eq!(field_of(vec![good(), answer]), "chat.messages[1].tool_call_id");
        assert_eq!(field_of(vec![said(Role::User, vec![call("f")])]), "chat.messages[0].tool_calls");
        let nameless = said(Role::Assistant, vec![call("f"), call("")]);
        assert_eq!(field_of(vec![nameless]), "chat.messages[0].tool_calls[1].name");
    }

    #[test]
    fn only_a_text_of_the_assistant_is_continued() {
        let check = |last: Message, add_generation_prompt| {
            let messages = vec![Message::text(Role::User, "hi"), last];
            let chat =
                Chat { messages, add_generation_prompt, continue_final_message: true, ..Chat::default() };
            match chat.check(&limits()) {
                Err(Error::InvalidField { field, why }) => {
                    assert_eq!(field, CONTINUES);
                    Some(why)
                }
                other => other.err().map(|error| error.to_string()),
            }
        };
        let said = || Message::text(Role::Assistant, "and");
        assert_eq!([check(said(), None), check(said(), Some(false))], [None, None]);
        assert!(check(said(), Some(true)).unwrap().contains("add_generation_prompt"));
        assert!(check(Message::text(Role::User, "hi"), None).unwrap().contains("assistant"));
        let calls = Message { parts: vec![call("f")], ..said() };
        assert!(check(calls, None).unwrap().contains("tool calls"));
    }
}
