//! What callers ask of a model, as plain data that an edge fills in from its wire. Nothing is checked by
//! having one: [`super::Service`] checks names, limits and ranges first, and an error names the field by the
//! path it has in the contract.

use std::sync::Arc;

use super::cache::CacheOptions;
use super::chat::{CONTINUES, Chat, GENERATION_PROMPT};
use super::event::{TokenScore, Usage};
use super::fields::{at_most_bytes, optional_model, session_name};
use super::format::{OutputOptions, ResponseFormat};
use super::sampling::{SamplingOptions, StoppingOptions};
use crate::engine::{KeepAlive, Priority};
use crate::error::Error;
use crate::ids::{ModelName, SessionName};
use crate::limits::Limits;
use crate::session::{History, InputKind, Message, messages_bytes, tokens_bytes};

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
    /// How long the model stays after it; None leaves that as it is.
    pub keep_alive: Option<KeepAlive>,
    /// How a chat turn goes on from its session; None takes the session's.
    pub history: Option<History>,
    /// The reuse of cached KV.
    pub cache: CacheOptions,
    /// The form of the answer; None is any text.
    pub response_format: Option<ResponseFormat>,
    /// Number of choices to return; unset is 1.
    pub n: Option<u32>,
    /// Number of choices of which the best are returned; unset is `n`.
    pub best_of: Option<u32>,
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

/// A count of an input's tokens.
#[derive(Debug)]
pub struct CountRequest {
    /// Model name.
    pub model: String,
    /// Input to count.
    pub input: Input,
    /// Tokens that the answer has room for; None if it only tells their number.
    pub answer_tokens_max: Option<usize>,
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
    /// The tokens to score; not a chat in a session.
    pub input: Input,
    /// Alternatives to return for each position.
    pub top_logprobs: u32,
    /// Session that the input continues; empty for none.
    pub session: String,
    /// Order among waiting requests.
    pub priority: Priority,
    /// The reuse of cached KV.
    pub cache: CacheOptions,
    /// Tokens whose scores the answer has room for.
    pub answer_tokens_max: usize,
    /// How long the model stays after it; None leaves that as it is.
    pub keep_alive: Option<KeepAlive>,
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
        if self.history.is_some() {
            match (&target, self.input.kind()) {
                (Target::Model(_), _) => return Err(Error::field("history", "needs a session")),
                (Target::Session { .. }, InputKind::Raw) => {
                    return Err(Error::field("history", "is for chat turns"));
                }
                (Target::Session { .. }, InputKind::Chat) => {}
            }
        }
        self.input.check("prompt", limits)?;
        if matches!(target, Target::Session { .. }) {
            if self.input.generation_prompt() == Some(false) {
                let why = "must be true in a session; ExtendSession adds messages without an answer";
                return Err(Error::field(GENERATION_PROMPT, why));
            }
            self.input.check_in_session()?;
        }
        self.sampling.check(limits)?;
        self.stopping.check(limits)?;
        self.output.check(limits)?;
        self.cache.check()?;
        self.check_held()?;
        Ok(target)
    }
}

impl GenerateRequest {
    /// Refuses what contradicts that the answer has a form, or has to call.
    fn check_held(&self) -> Result<(), Error> {
        let (may_call, has_to) = match &self.input {
            Input::Chat(chat) => (!chat.offered_tools().is_empty(), chat.demands_calls()),
            Input::Text(_) | Input::Ids(_) => (false, false),
        };
        if may_call && self.response_format.is_some() {
            let why = "not beside tools that the model may call: leave them out, or set tool_choice NONE";
            return Err(Error::field("response_format", why));
        }
        if self.stopping.ignore_eos && (has_to || self.response_format.is_some()) {
            let why = "an answer with a response_format, or that has to call, ends where its grammar does";
            return Err(Error::field("stopping.ignore_eos", why));
        }
        Ok(())
    }
}

impl Input {
    /// Refuses an input without content or beyond a limit, and messages and tools that contradict themselves;
    /// `text_field` is the path of a raw text.
    pub(super) fn check(&self, text_field: &str, limits: &Limits) -> Result<(), Error> {
        match self {
            Self::Text(text) if text.is_empty() => Err(Error::EmptyPrompt),
            Self::Ids(ids) if ids.is_empty() => Err(Error::EmptyPrompt),
            Self::Text(text) => at_most_bytes(text_field, text.len(), limits),
            Self::Ids(_) => Ok(()),
            Self::Chat(chat) => chat.check(limits),
        }
    }

    /// Returns what a chat says about the beginning of an answer.
    pub(super) fn generation_prompt(&self) -> Option<bool> {
        match self {
            Self::Chat(chat) => chat.add_generation_prompt,
            Self::Text(_) | Self::Ids(_) => None,
        }
    }

    /// Refuses what a session cannot hold: a message that is to be continued, and control tokens in texts,
    /// which would be such in some turns and text in others.
    pub(super) fn check_in_session(&self) -> Result<(), Error> {
        match self {
            Self::Chat(chat) if chat.continue_final_message => {
                let why = "not in a session, which holds whole messages; send the conversation without one";
                Err(Error::field(CONTINUES, why))
            }
            Self::Chat(chat) if chat.allow_control_tokens => {
                let why = "not in a session, whose other turns would read the same texts otherwise";
                Err(Error::field("chat.allow_control_tokens", why))
            }
            Self::Chat(_) | Self::Text(_) | Self::Ids(_) => Ok(()),
        }
    }

    /// Refuses messages that a session could not show again in one answer.
    pub(super) fn check_kept(&self, limits: &Limits) -> Result<(), Error> {
        let Self::Chat(chat) = self else { return Ok(()) };
        let max = limits.answer_bytes_max / 2;
        match chat.messages.iter().map(Message::bytes).enumerate().find(|(_, bytes)| *bytes > max) {
            Some((at, bytes)) => Err(Error::field(
                format!("chat.messages[{at}]"),
                format!("answer_bytes_max: in a session at most half of it, {max} bytes, not {bytes}"),
            )),
            None => Ok(()),
        }
    }

    /// Returns the bytes that a session keeps of it at least.
    pub(super) fn kept_bytes(&self) -> usize {
        match self {
            Self::Text(_) => 0,
            Self::Ids(ids) => tokens_bytes(ids.len()),
            Self::Chat(chat) => messages_bytes(&chat.messages),
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

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::super::chat::Tool;
    use super::*;
    use crate::session::Role;

    fn limits() -> Limits {
        Limits { text_bytes_max: 1000, chat_parts_max: 4, tools_max: 1, ..Limits::default() }
    }

    #[test]
    fn an_input_without_content_is_refused() {
        let check = |input: Input| input.check("prompt", &limits());
        assert_eq!(check(Input::Text(String::new())), Err(Error::EmptyPrompt));
        assert_eq!(check(Input::Ids(Vec::new())), Err(Error::EmptyPrompt));
    }

    #[test]
    fn an_input_beyond_a_limit_is_refused_by_its_size_alone() {
        let refused = |input: Input| match input.check("text", &limits()) {
            Err(Error::InvalidField { field, why }) => format!("{field}: {why}"),
            other => panic!("{other:?}"),
        };
        let long = "text_bytes_max: at most 1000 bytes, not 1001";
        assert_eq!(refused(Input::Text("x".repeat(1001))), format!("text: {long}"));
        let tool =
            |name: &str| Tool { name: name.into(), description: String::new(), parameters: Map::new() };
        let chat =
            |messages, tools, arguments| Input::Chat(Chat { messages, tools, arguments, ..Chat::default() });
        let hi = || Message::text(Role::User, "hi");
        let three = chat(vec![hi(), hi(), hi()], Vec::new(), Map::new());
        assert_eq!(refused(three), "chat.messages: chat_parts_max: at most 4 entries, not 6");
        let two_tools = chat(vec![hi()], vec![tool("a"), tool("b")], Map::new());
        assert_eq!(refused(two_tools), "chat.tools: tools_max: at most 1 entries, not 2");
        // What no template may ever write counts too.
        let named = Message { name: "x".repeat(1001), ..hi() };
        let arguments = Map::from_iter([("a".to_owned(), json!(["x".repeat(1001)]))]);
        for input in [chat(vec![named], Vec::new(), Map::new()), chat(vec![hi()], Vec::new(), arguments)] {
            assert!(refused(input).starts_with("chat: text_bytes_max: at most 1000 bytes"));
        }
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
