//! What callers ask of a model, as plain data that an edge fills in from its wire. Nothing is checked by
//! having one: [`super::Service`] checks names, limits and ranges first, and an error names the field by the
//! path it has in the contract.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::event::{TokenScore, Usage};
use super::fields::{at_least_one, optional_model, session_name, within};
use super::sampling::{SamplingOptions, StoppingOptions};
use crate::engine::Priority;
use crate::error::Error;
use crate::ids::{ModelName, SessionName};
use crate::limits::Limits;
use crate::session::{InputKind, Message, Part, Role};

/// A generation.
#[derive(Debug)]
pub struct GenerateRequest {
    /// Model name; empty where `session` names it.
    pub model: String,
    /// Input to continue; in a session only that of this turn.
    pub input: Input,
    /// Session name; empty for a request that stands alone.
    pub session: String,
    /// The session's token count as the caller last saw it.
    pub expected_token_count: Option<u32>,
    /// Sampling values.
    pub sampling: SamplingOptions,
    /// Stopping values.
    pub stopping: StoppingOptions,
    /// Extras to return besides the text.
    pub output: OutputOptions,
    /// Order among waiting requests.
    pub priority: Priority,
}

/// The input of a request.
#[derive(Debug)]
pub enum Input {
    /// Raw text.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
    /// A conversation, or the new part of one.
    Chat(Chat),
}

/// Messages for a chat template.
#[derive(Debug)]
pub struct Chat {
    /// The messages, oldest first.
    pub messages: Vec<Message>,
    /// Tools the model may call.
    pub tools: Vec<Tool>,
    /// Further variables of the template.
    pub arguments: Map<String, Value>,
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

/// Extras to return besides the text.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutputOptions {
    /// Log-probabilities with this many alternatives.
    pub top_logprobs: Option<u32>,
    /// The output's token ids.
    pub token_ids: bool,
}

/// A count of an input's tokens.
#[derive(Debug)]
pub struct CountRequest {
    /// Model name.
    pub model: String,
    /// Input to count.
    pub input: Input,
}

/// An input's tokens.
#[derive(Debug)]
pub struct Counted {
    /// The token ids.
    pub tokens: Arc<[u32]>,
    /// Tokens the model can hold.
    pub context_length: u32,
}

/// A score: the log-probability of every token of an input.
#[derive(Debug)]
pub struct ScoreRequest {
    /// Model name; empty where `session` names it.
    pub model: String,
    /// The tokens to score: text or ids.
    pub input: Input,
    /// Alternatives to return for each position.
    pub top_logprobs: u32,
    /// Session that the input continues; empty for none.
    pub session: String,
    /// Order among waiting requests.
    pub priority: Priority,
}

/// The scores of an input.
#[derive(Debug)]
pub struct Scores {
    /// One entry per token of the input.
    pub tokens: Vec<TokenScore>,
    /// Token counts.
    pub usage: Usage,
}

/// The target of a request: a model by name, or a session, which names its model. Names are checked.
#[derive(Debug)]
pub(super) enum Target {
    Model(ModelName),
    Session {
        name: SessionName,
        /// The model that the caller expects the session to be bound to.
        model: Option<ModelName>,
    },
}

impl Target {
    /// Checks both names; at least one has to be given.
    pub(super) fn new(model: &str, session: &str) -> Result<Self, Error> {
        let model = optional_model("model", model)?;
        match model {
            _ if !session.is_empty() => Ok(Self::Session { name: session_name("session", session)?, model }),
            Some(model) => Ok(Self::Model(model)),
            None => Err(Error::field("model", "must be given where no session names it")),
        }
    }
}

impl GenerateRequest {
    /// Checks everything that can be checked without the model and the session.
    pub(super) fn check(&self, limits: &Limits) -> Result<Target, Error> {
        let target = Target::new(&self.model, &self.session)?;
        if matches!(target, Target::Model(_)) && self.expected_token_count.is_some() {
            return Err(Error::field("expected_token_count", "needs a session"));
        }
        self.input.check()?;
        self.sampling.check(limits)?;
        self.stopping.check(limits)?;
        self.output.check(limits)?;
        Ok(target)
    }
}

impl OutputOptions {
    /// Refuses values outside the contract's ranges.
    pub(super) fn check(&self, limits: &Limits) -> Result<(), Error> {
        match self.top_logprobs {
            Some(top) => within("output.logprobs", top, 0, limits.top_logprobs_max).map(drop),
            None => Ok(()),
        }
    }
}

impl Input {
    /// Refuses an input without content, and messages and tools that contradict themselves.
    pub(super) fn check(&self) -> Result<(), Error> {
        match self {
            Self::Text(text) if text.is_empty() => Err(Error::EmptyPrompt),
            Self::Ids(ids) if ids.is_empty() => Err(Error::EmptyPrompt),
            Self::Text(_) | Self::Ids(_) => Ok(()),
            Self::Chat(chat) => chat.check(),
        }
    }

    /// Returns the kind of turn it makes in a session.
    pub(super) fn kind(&self) -> InputKind {
        match self {
            Self::Text(_) | Self::Ids(_) => InputKind::Raw,
            Self::Chat(_) => InputKind::Chat,
        }
    }
}

impl Chat {
    fn check(&self) -> Result<(), Error> {
        at_least_one("chat.messages", self.messages.len(), "message")?;
        for (index, message) in self.messages.iter().enumerate() {
            check_message(&format!("chat.messages[{index}]"), message)?;
        }
        let nameless = self.tools.iter().position(|tool| tool.name.is_empty());
        match nameless {
            Some(index) => Err(Error::field(format!("chat.tools[{index}].name"), "must be given")),
            None => Ok(()),
        }
    }
}

fn check_message(path: &str, message: &Message) -> Result<(), Error> {
    let Message { role, name: _, parts } = message;
    let mut calls = 0;
    for part in parts {
        match part {
            Part::Text(_) => {}
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

    fn field_of(messages: Vec<Message>) -> String {
        let chat = Chat { messages, tools: Vec::new(), arguments: Map::new() };
        match Input::Chat(chat).check() {
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
    fn an_input_without_content_is_refused() {
        assert_eq!(Input::Text(String::new()).check(), Err(Error::EmptyPrompt));
        assert_eq!(Input::Ids(Vec::new()).check(), Err(Error::EmptyPrompt));
    }

    #[test]
    fn a_request_names_a_model_or_a_session() {
        assert!(matches!(Target::new("", ""), Err(Error::InvalidField { field, .. }) if field == "model"));
        assert!(Target::new("", "s").is_ok() && Target::new("m", "").is_ok());
        assert!(
            matches!(Target::new("m", "a b"), Err(Error::InvalidField { field, .. }) if field == "session")
        );
    }
}
