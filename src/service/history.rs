//! The text of a chat turn: which tokens of its session stay, and what is tokenized after them. Templates may
//! write the past differently from turn to turn; [`History`] says what then. Nothing that the caller sends is
//! lost: where a template would write it before tokens that stay, it must be there already.

use std::time::SystemTime;

use serde_json::{Map, Value};

use super::chat::{CONTINUES, Ending};
use super::prompted::{Conversation, is_instruction};
use crate::error::Error;
use crate::hub::ModelAssets;
use crate::session::{AnswerEnd, History, HistoryOutcome, TurnStart, chat_rest};
use crate::text::{self, ChatTemplate, Rendered, TextError, Tokenizer, absent_word};

/// The messages that a session holds, those that a turn adds, and what comes with them.
pub(super) struct Dialogue {
    /// As templates read them, oldest first.
    pub(super) conversation: Conversation,
    /// Number of the given messages that are the session's.
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
        let messages = &self.conversation.messages;
        let rendered = self.render(template, messages, (&self.tools, &self.arguments))?;
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
            text::Conversation { messages, tools, arguments, add_generation_prompt, now, control_tokens };
        let rendered = match ending {
            Ending::Continued => template.render_continued(&conversation, bytes_max),
            Ending::Whole | Ending::AnswerBegun => template.render(&conversation, bytes_max),
        };
        rendered.map_err(|error| self.refusal(error))
    }

    /// Returns the error of a conversation that a template does not take.
    fn refusal(&self, error: TextError) -> Error {
        let why = error.to_string();
        match error {
            TextError::TooLong { .. } => Error::field("chat", format!("text_bytes_max: {why}")),
            TextError::Role { index, .. } => {
                // Several messages of the turn may stand in one place.
                let new = &self.conversation.places[self.held..];
                let number = new.iter().position(|place| *place == index).unwrap_or(0);
                Error::field(format!("chat.messages[{number}].role"), why)
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

    /// Keeps the tokens if the template writes their text again once it is told to keep past reasoning. A
    /// caller who sets that switch has decided.
    fn with_reasoning(&self, template: &ChatTemplate, start: &TurnStart) -> Option<Written> {
        let (switch, on) = template.reasoning_switch()?;
        if self.arguments.contains_key(switch) {
            return None;
        }
        let mut arguments = self.arguments.clone();
        arguments.insert(switch.to_owned(), on.into());
        let messages = &self.conversation.messages;
        let rendered = self.render(template, messages, (&self.tools, &arguments)).ok()?;
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
        let given = (&*self.tools, &self.arguments);
        let Some((masked, parted)) = self.masked(template, answer, given, word)? else {
            return refuse("the chat template does not write the last answer as it is");
        };
        let Parted { before, rest, mark } = parted;
        let rest = match masked[self.place(answer)].get("tool_calls") {
            None => &*rest,
            // What is written of the calls ends with the answer.
            Some(_) => match from_end(&rest, assets) {
                Some(rest) => rest,
                None => return refuse("the chat template does not end the last answer, which calls tools"),
            },
        };
        if !self.is_held(template, start, (&masked, word), &before) {
            return refuse(
                "tools, template arguments or a system message would come before the session's last answer",
            );
        }
        let (kept, rest, dropped) = after_end(&start.tokens[..answer.tokens], rest, assets);
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

    /// Returns where the turn's first message stands among the messages.
    fn begin(&self) -> usize {
        self.conversation.places[self.held]
    }

    /// Returns where an answer stands among the messages.
    fn place(&self, answer: AnswerEnd) -> usize {
        let Conversation { messages, places, .. } = &self.conversation;
        places.get(answer.message).copied().unwrap_or(messages.len())
    }

    /// Returns the messages with `word` instead of what an answer says, and what the template writes of them;
    /// None if it writes the word in none of the places. Calls stay, without arguments: what follows may
    /// refer to them.
    fn masked(
        &self,
        template: &ChatTemplate,
        answer: AnswerEnd,
        given: (&[Value], &Map<String, Value>),
        word: &str,
    ) -> Result<Option<(Vec<Value>, Parted)>, Error> {
        let mut failed = None;
        let all = &self.conversation.messages;
        let place = self.place(answer);
        for said in all.get(place).into_iter().flat_map(|said| maskings(said, word)) {
            let mut messages = all.clone();
            messages[place] = said;
            match self.part(template, &messages, given, word) {
                Ok(Some(parted)) => return Ok(Some((messages, parted))),
                Ok(None) => {}
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(None), Err)
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
        let mut messages = masked.to_vec();
        let mut instructions = 0;
        for message in messages[self.begin()..].iter_mut().filter(|message| is_instruction(message)) {
            message["content"] = "".into();
            instructions += 1;
        }
        if let Some((place, without)) = &self.conversation.taught {
            if *place < self.begin() || !is_instruction(&messages[*place]) {
                messages[*place]["content"] = without.clone();
            }
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
    let answer = start.answer.and_then(|answer| start.messages.get(answer.message));
    let calls = || answer.is_some_and(|answer| answer.tool_calls().next().is_some());
    match start.history {
        History::Rerender => 1,
        History::Auto => 1 + usize::from(switches()),
        History::Append => 3 + usize::from(calls()),
    }
}

/// Returns an answer with `word` in it, in the ways to try: instead of its text, and of the name of the last
/// function that it calls, since some templates write no text beside calls.
fn maskings(said: &Value, word: &str) -> Vec<Value> {
    if said["role"] != "assistant" {
        return Vec::new();
    }
    let mut said = said.clone();
    if let Some(fields) = said.as_object_mut() {
        fields.remove("reasoning");
    }
    let calls = said.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten();
    calls.for_each(|call| call["function"]["arguments"] = Map::new().into());
    let mut text = said.clone();
    text["content"] = word.into();
    let mut named = said;
    let call = named.get_mut("tool_calls").and_then(Value::as_array_mut).and_then(|calls| calls.last_mut());
    match call {
        None => vec![text],
        Some(call) => {
            call["function"]["name"] = word.into();
            vec![text, named]
        }
    }
}

/// Returns a text from the first token in it that ends outputs.
fn from_end<'a>(text: &'a str, assets: &ModelAssets) -> Option<&'a str> {
    let ends = assets.eos_token_ids.iter().map(|id| text_of(&assets.tokenizer, *id));
    let at = ends.filter(|end| !end.is_empty()).filter_map(|end| text.find(&end)).min()?;
    Some(&text[at..])
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

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
