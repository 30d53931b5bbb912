//! The text of a chat turn: which tokens of its session stay, and what is tokenized after them. Templates may
//! write the past differently from turn to turn; [`History`] says what then. Nothing that the caller sends is
//! lost: where a template would write it before tokens that stay, it must be there already.

use std::time::SystemTime;

use serde_json::{Map, Value};

use super::request::{CONTINUES, Ending};
use crate::error::Error;
use crate::hub::ModelAssets;
use crate::session::{AnswerEnd, History, HistoryOutcome, TurnStart, chat_rest};
use crate::text::{ChatTemplate, Conversation, Rendered, TextError, Tokenizer, absent_word};

/// The messages that a session holds, those that a turn adds, and what comes with them.
pub(super) struct Dialogue {
    /// As templates read them, oldest first.
    pub(super) messages: Vec<Value>,
    /// Number of messages that are the session's.
    pub(super) held: usize,
    pub(super) tools: Vec<Value>,
    pub(super) arguments: Map<String, Value>,
    pub(super) ending: Ending,
    /// Whether control tokens in the texts are such.
    pub(super) control_tokens: bool,
    pub(super) now: SystemTime,
    /// Limit of what the template writes, in bytes.
    pub(super) bytes_max: usize,
}

/// A turn's text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Written {
    /// Number of the session's tokens that stay.
    pub(super) kept: usize,
    /// The text to tokenize after them.
    pub(super) rest: Rendered,
    /// The text of all; None where that of the tokens that stay is not known.
    pub(super) text: Option<String>,
    /// None if the session had no tokens.
    pub(super) outcome: Option<HistoryOutcome>,
}

impl Written {
    fn anew(rendered: Rendered, outcome: Option<HistoryOutcome>) -> Self {
        let text = Some(rendered.text.clone());
        Self { kept: 0, rest: rendered, text, outcome }
    }

    /// Returns the turn that keeps all tokens, if `rendered` begins with their text; else `rendered`.
    fn after(start: &TurnStart, rendered: Rendered, outcome: HistoryOutcome) -> Result<Self, Rendered> {
        let Some(rest) = chat_rest(start, &rendered.text).map(str::to_owned) else { return Err(rendered) };
        let Rendered { text, mark } = rendered;
        let rest = Rendered { text: rest, mark };
        Ok(Self { kept: start.tokens.len(), rest, text: Some(text), outcome: Some(outcome) })
    }
}

impl Dialogue {
    /// Writes the conversation as its session goes on with it.
    ///
    /// # Errors
    /// The model has no template, the template does not take the conversation, or the session's tokens are to
    /// stay and cannot.
    pub(super) fn write(&self, assets: &ModelAssets, start: Option<&TurnStart>) -> Result<Written, Error> {
        let no_template = |error: &TextError| {
            let (model, why) = (assets.files.name.clone(), error.to_string());
            Error::NoChatTemplate { model, why }
        };
        let template = assets.chat_template.as_ref().map_err(no_template)?;
        let rendered = self.render(template, &self.messages, (&self.tools, &self.arguments))?;
        let Some(start) = start.filter(|start| !start.tokens.is_empty()) else {
            return Ok(Written::anew(rendered, None));
        };
        let rendered = match Written::after(start, rendered, HistoryOutcome::Continued) {
            Ok(written) => return Ok(written),
            Err(rendered) => rendered,
        };
        match start.history {
            History::Rerender => Ok(Written::anew(rendered, Some(HistoryOutcome::Rerendered))),
            History::Auto => {
                let kept = self.with_reasoning(template, start);
                Ok(kept.unwrap_or_else(|| Written::anew(rendered, Some(HistoryOutcome::Rerendered))))
            }
            History::Append => match start.answer {
                // Nothing in it is as it was generated.
                None if start.is_whole => Ok(Written::anew(rendered, Some(HistoryOutcome::Rerendered))),
                answer => self.append(template, assets, (start, answer), &absent_word(&rendered.text)),
            },
        }
    }

    fn render(
        &self,
        template: &ChatTemplate,
        messages: &[Value],
        (tools, arguments): (&[Value], &Map<String, Value>),
    ) -> Result<Rendered, Error> {
        let &Self { now, ending, control_tokens, bytes_max, .. } = self;
        let add_generation_prompt = ending == Ending::AnswerBegun;
        let conversation =
            Conversation { messages, tools, arguments, add_generation_prompt, now, control_tokens };
        let rendered = match ending {
            Ending::Continued => template.render_continued(&conversation, bytes_max),
            Ending::Whole | Ending::AnswerBegun => template.render(&conversation, bytes_max),
        };
        rendered.map_err(|error| refusal(error, self.held))
    }

    /// Keeps the tokens if the template writes their text again once it is told to keep past reasoning. A
    /// caller who sets that switch has decided.
    fn with_reasoning(&self, template: &ChatTemplate, start: &TurnStart) -> Option<Written> {
        let (switch, on) = template.reasoning_switch()?;
        if self.arguments.contains_key(switch) {
            return None;
        }
        let mut arguments = self.arguments.clone();
        arguments.insert(switch.to_owned(), on.into());
        let rendered = self.render(template, &self.messages, (&self.tools, &arguments)).ok()?;
        Written::after(start, rendered, HistoryOutcome::Appended).ok()
    }

    /// Keeps the tokens, and writes what follows the last answer: its place is found by rendering `word`
    /// instead of it. What was added after it without an answer stays too, if the template writes it again.
    fn append(
        &self,
        template: &ChatTemplate,
        assets: &ModelAssets,
        (start, answer): (&TurnStart, Option<AnswerEnd>),
        word: &str,
    ) -> Result<Written, Error> {
        let refuse = |why| Err(Error::CannotAppend(why));
        let Some(answer) = answer.filter(|_| start.is_whole) else {
            return refuse("the session does not hold its last answer whole");
        };
        let Some(masked) = self.masked(answer, word) else {
            return refuse("the session's last answer is not one of text");
        };
        let given = (&*self.tools, &self.arguments);
        let Some(Parted { before, rest, mark }) = self.part(template, &masked, given, word)? else {
            return refuse("the chat template does not write the last answer as it is");
        };
        if !self.is_held(template, start, (&masked, word), &before) {
            return refuse(
                "tools, template arguments or a system message would come before the session's last answer",
            );
        }
        let (kept, rest, dropped) = after_end(&start.tokens[..answer.tokens], &rest, assets);
        let (text, since) = match (start.text.as_deref(), answer.text_bytes) {
            (Some(text), Some(end)) => text.split_at_checked(end).unzip(),
            (Some(_) | None, _) => (None, None),
        };
        let written = |kept, text: Option<&str>, rest: &str| {
            let text = text.map(|text| [text, rest].concat());
            let rest = Rendered { text: rest.to_owned(), mark };
            Ok(Written { kept, rest, text, outcome: Some(HistoryOutcome::Appended) })
        };
        if let (None, Some(new)) = (&dropped, since.and_then(|since| rest.strip_prefix(since))) {
            return written(start.tokens.len(), start.text.as_deref(), new);
        }
        let text = text.map(|text| dropped.as_deref().and_then(|end| text.strip_suffix(end)).unwrap_or(text));
        written(kept, text, rest)
    }

    /// Returns the messages with `word` instead of an answer; None if it says more than text.
    fn masked(&self, answer: AnswerEnd, word: &str) -> Option<Vec<Value>> {
        let is_text =
            |message: &&Value| message["role"] == "assistant" && message.get("tool_calls").is_none();
        self.messages.get(answer.message).filter(is_text)?;
        let mut messages = self.messages.clone();
        messages[answer.message]["content"] = word.into();
        Some(messages)
    }

    /// Writes messages, and parts the text at `word`; None if the template does not write it exactly once.
    fn part(
        &self,
        template: &ChatTemplate,
        messages: &[Value],
        given: (&[Value], &Map<String, Value>),
        word: &str,
    ) -> Result<Option<Parted>, Error> {
        let Rendered { text, mark } = self.render(template, messages, given)?;
        let parted = text.split_once(word).filter(|(_, rest)| !rest.contains(word));
        Ok(parted.map(|(before, rest)| Parted { before: before.to_owned(), rest: rest.to_owned(), mark }))
    }

    /// Returns whether the session holds what this turn's tools, arguments and system messages make the
    /// template write `before` the last answer.
    fn is_held(
        &self,
        template: &ChatTemplate,
        start: &TurnStart,
        (masked, word): (&[Value], &str),
        before: &str,
    ) -> bool {
        let is_instruction =
            |message: &&mut Value| ["system", "developer"].iter().any(|role| message["role"] == *role);
        let mut messages = masked.to_vec();
        let mut instructions = 0;
        for message in messages[self.held..].iter_mut().filter(is_instruction) {
            message["content"] = "".into();
            instructions += 1;
        }
        if instructions == 0 && self.tools.is_empty() && self.arguments.is_empty() {
            return true;
        }
        let without = self.part(template, &messages, (&[], &Map::new()), word).ok().flatten();
        let end = without.map_or(before.len(), |without| difference_end(before, &without.before));
        start.known.as_bytes().starts_with(&before.as_bytes()[..end])
    }
}

/// Returns the most times that a turn renders its conversation.
pub(super) fn renders_max(assets: &ModelAssets, start: Option<&TurnStart>) -> usize {
    let Some(start) = start.filter(|start| !start.tokens.is_empty()) else { return 1 };
    let switches =
        || assets.chat_template.as_ref().is_ok_and(|template| template.reasoning_switch().is_some());
    match start.history {
        History::Rerender => 1,
        History::Auto => 1 + usize::from(switches()),
        History::Append => 3,
    }
}

/// A rendering in two parts.
struct Parted {
    before: String,
    rest: String,
    mark: Option<char>,
}

/// Returns where the last difference to `other` ends in `text`, in bytes; 0 if they are equal.
fn difference_end(text: &str, other: &str) -> usize {
    if text == other {
        return 0;
    }
    let (text, other) = (text.as_bytes(), other.as_bytes());
    let start = text.iter().zip(other).take_while(|(a, b)| a == b).count();
    let rests = text[start..].iter().rev().zip(other[start..].iter().rev());
    text.len() - rests.take_while(|(a, b)| a == b).count()
}

/// Returns the number of tokens that stay before `rest`, what is left of it, and the text of the token that
/// was dropped, if one was. The token that ended an answer is part of `rest` as well, where it stays out; or
/// the template ends answers otherwise, then by what the template writes.
fn after_end<'a>(tokens: &[u32], rest: &'a str, assets: &ModelAssets) -> (usize, &'a str, Option<String>) {
    let ModelAssets { tokenizer, eos_token_ids, .. } = assets;
    let Some((&last, before)) = tokens.split_last() else { return (0, rest, None) };
    if !tokenizer.is_control(last) && !eos_token_ids.contains(&last) {
        return (tokens.len(), rest, None);
    }
    let end = text_of(tokenizer, last);
    match rest.trim_start().strip_prefix(end.trim_start()) {
        Some(rest) => (tokens.len(), rest, None),
        None if eos_token_ids.contains(&last) => (before.len(), rest, Some(end)),
        // Others may be a part of what the model said.
        None => (tokens.len(), rest, None),
    }
}

/// Returns a token's text.
pub(super) fn text_of(tokenizer: &Tokenizer, token: u32) -> String {
    String::from_utf8_lossy(&tokenizer.token_bytes(token)).into_owned()
}

/// Returns the error of a conversation that a template does not take; `old` of its messages were a session's.
fn refusal(error: TextError, old: usize) -> Error {
    let why = error.to_string();
    match error {
        TextError::TooLong { .. } => Error::field("chat", format!("text_bytes_max: {why}")),
        TextError::Role { index, .. } => {
            Error::field(format!("chat.messages[{}].role", index.saturating_sub(old)), why)
        }
        TextError::NotContinued => Error::field(CONTINUES, why),
        TextError::Tools { .. } => Error::field("chat.tools", why),
        TextError::Argument { name, .. } | TextError::FixedArgument(name) => {
            Error::field(format!("chat.template_arguments.{name}"), why)
        }
        TextError::Invalid { .. }
        | TextError::Unsupported { .. }
        | TextError::Encode(_)
        | TextError::NoTemplate
        | TextError::Render(_) => Error::TemplateFailed(why),
    }
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
