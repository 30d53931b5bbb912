//! One session: its turns, and the rules of what may follow what. A turn begins (`begin`), and either
//! commits or is given up (`roll_back`); between the two only `busy` is set.

use std::time::Duration;

use super::message::Message;
use crate::clock::Moment;
use crate::error::Error;
use crate::ids::{ModelName, SessionKey};

/// One running turn; unique in the daemon's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TurnId(pub u64);

/// What kind of input a turn brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputKind {
    /// Messages.
    Chat,
    /// Text or token ids.
    Raw,
}

/// What a caller asks for when a turn begins.
#[derive(Clone, Debug)]
pub struct TurnRequest {
    /// The model asked for; none takes the session's.
    pub model: Option<ModelName>,
    /// What comes in.
    pub input: InputKind,
    /// The token count the caller saw last.
    pub expected_token_count: Option<u32>,
}

/// What a turn builds on: a copy, so that nothing of the session is held while the turn runs.
#[derive(Clone, Debug, PartialEq)]
pub struct TurnStart {
    /// The model the session is bound to.
    pub model: ModelName,
    /// The messages so far.
    pub messages: Vec<Message>,
    /// The text that `tokens` stand for, where that is known.
    pub text: Option<String>,
    /// The tokens so far.
    pub tokens: Vec<u32>,
}

/// What a finished turn adds.
#[derive(Clone, Debug)]
pub enum TurnContent {
    /// Tokens only.
    Raw,
    /// Messages.
    Chat {
        /// The new ones, the answer last.
        messages: Vec<Message>,
        /// The conversation as rendered, the answer at its end.
        text: String,
        /// Whether `text` is all that the tokens stand for. An answer cut at a stop string is not: its
        /// tokens hold that string, the text does not.
        text_is_whole: bool,
    },
}

/// Where a finished turn ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TurnEnd {
    /// Messages at its end; the raw turns of a session add none.
    pub message_count: usize,
    /// Tokens at its end.
    pub token_count: usize,
    /// Bytes of text at its end; none where the tokens' text is not known.
    text_bytes: Option<usize>,
    /// Whether it brought text or ids instead of messages.
    pub raw: bool,
}

/// What others may see of a session.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionView {
    /// Who owns it and its name.
    pub key: SessionKey,
    /// The model it is bound to.
    pub model: ModelName,
    /// Tokens in it.
    pub token_count: usize,
    /// Its finished turns.
    pub turns: Vec<TurnEnd>,
    /// Whether a turn runs.
    pub busy: bool,
    /// How long it lives after its last use.
    pub ttl: Duration,
    /// When it was made.
    pub created: Moment,
    /// When it was last used.
    pub used: Moment,
}

/// A conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    key: SessionKey,
    model: ModelName,
    messages: Vec<Message>,
    /// Rendered messages, output included, as far as known; the last turn says how far it is valid.
    text: String,
    tokens: Vec<u32>,
    turns: Vec<TurnEnd>,
    busy: Option<TurnId>,
    ttl: Duration,
    created: Moment,
    used: Moment,
}

impl Session {
    /// An empty session.
    #[must_use]
    pub fn new(key: SessionKey, model: ModelName, ttl: Duration, now: Moment) -> Self {
        let (messages, text, tokens, turns) = Default::default();
        Self { key, model, messages, text, tokens, turns, busy: None, ttl, created: now, used: now }
    }

    /// A copy under a new name, without the turn that may run.
    #[must_use]
    pub fn fork(&self, key: SessionKey, ttl: Option<Duration>, now: Moment) -> Self {
        let ttl = ttl.unwrap_or(self.ttl);
        Self { key, busy: None, ttl, created: now, used: now, ..self.clone() }
    }

    /// What others may see.
    #[must_use]
    pub fn view(&self) -> SessionView {
        SessionView {
            key: self.key.clone(),
            model: self.model.clone(),
            token_count: self.tokens.len(),
            turns: self.turns.clone(),
            busy: self.busy.is_some(),
            ttl: self.ttl,
            created: self.created,
            used: self.used,
        }
    }

    /// The model it is bound to.
    #[must_use]
    pub fn model(&self) -> &ModelName {
        &self.model
    }

    /// Its tokens.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Its messages; none once a turn was raw.
    #[must_use]
    pub fn messages(&self) -> &[Message] {
        if self.is_raw() { &[] } else { &self.messages }
    }

    /// Whether its time is up. A running turn keeps it alive.
    #[must_use]
    pub fn is_expired(&self, now: Moment) -> bool {
        self.busy.is_none() && self.used.after(self.ttl) <= now
    }

    /// Refuses when the token count is not the expected one.
    pub fn expect_tokens(&self, expected: Option<u32>) -> Result<(), Error> {
        let actual = u32::try_from(self.tokens.len()).unwrap_or(u32::MAX);
        match expected {
            Some(expected) if expected != actual => {
                Err(Error::SessionMoved { session: self.key.name.clone(), expected, actual })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Returns what a turn would build on, if the session is bound to `expected`; none expects any model.
    pub fn start(&self, expected: Option<&ModelName>) -> Result<TurnStart, Error> {
        if expected.is_some_and(|model| *model != self.model) {
            let (session, model) = (self.key.name.clone(), self.model.clone());
            return Err(Error::SessionWrongModel { session, model });
        }
        let text_bytes = self.turns.last().and_then(|last| last.text_bytes);
        let text = text_bytes.and_then(|end| self.text.get(..end)).map(str::to_owned);
        let (model, messages, tokens) = (self.model.clone(), self.messages.clone(), self.tokens.clone());
        Ok(TurnStart { model, messages, text, tokens })
    }

    /// Begins a turn, if it may.
    pub fn begin(&mut self, turn: TurnId, request: &TurnRequest, now: Moment) -> Result<TurnStart, Error> {
        let session = || self.key.name.clone();
        let start = self.start(request.model.as_ref())?;
        if self.busy.is_some() {
            return Err(Error::SessionBusy(session()));
        }
        self.expect_tokens(request.expected_token_count)?;
        if request.input == InputKind::Chat && self.is_raw() {
            return Err(Error::SessionNotChat(session()));
        }
        self.busy = Some(turn);
        self.used = now;
        Ok(start)
    }

    /// Keeps a turn. `tokens` are all of the session's now: the turn's context and what was generated.
    /// False if the turn does not run here (its session was deleted, and another took the name).
    pub fn commit(&mut self, turn: TurnId, tokens: Vec<u32>, content: TurnContent, now: Moment) -> bool {
        if self.busy != Some(turn) {
            return false;
        }
        let raw = matches!(content, TurnContent::Raw);
        let mut text_bytes = None;
        if let TurnContent::Chat { messages, text, text_is_whole } = content {
            self.forget_rewritten(&tokens, &text);
            self.messages.extend(messages);
            text_bytes = text_is_whole.then_some(text.len());
            self.text = text;
        }
        let (message_count, token_count) = (self.messages.len(), tokens.len());
        self.turns.push(TurnEnd { message_count, token_count, text_bytes, raw });
        self.tokens = tokens;
        self.busy = None;
        self.used = now;
        true
    }

    /// Gives a turn up; the session is as it was.
    pub fn roll_back(&mut self, turn: TurnId, now: Moment) {
        if self.busy == Some(turn) {
            self.busy = None;
            self.used = now;
        }
    }

    /// Keeps the first `turn_count` turns.
    pub fn truncate_turns(&mut self, turn_count: usize, now: Moment) -> Result<(), Error> {
        self.refuse_if_busy()?;
        if turn_count > self.turns.len() {
            return Err(Error::field("turn_count", format!("the session has {} turns", self.turns.len())));
        }
        self.cut(turn_count, now);
        Ok(())
    }

    /// Keeps the first `token_count` tokens: the end of a turn, or a point inside a raw one.
    pub fn truncate_tokens(&mut self, token_count: usize, now: Moment) -> Result<(), Error> {
        self.refuse_if_busy()?;
        if token_count > self.tokens.len() {
            return Err(Error::field("token_count", format!("the session has {} tokens", self.tokens.len())));
        }
        let whole = self.turns.partition_point(|turn| turn.token_count <= token_count);
        let end = whole.checked_sub(1).map_or(0, |last| self.turns[last].token_count);
        let shortened = self.turns.get(whole).filter(|_| end < token_count).cloned();
        if shortened.as_ref().is_some_and(|turn| !turn.raw) {
            return Err(Error::field("token_count", "must be the end of a turn: the session has chat turns"));
        }
        let tokens = self.tokens.get(..token_count).map(<[u32]>::to_vec);
        self.cut(whole, now);
        if let (Some(turn), Some(tokens)) = (shortened, tokens) {
            self.tokens = tokens;
            self.turns.push(TurnEnd { token_count, ..turn });
        }
        Ok(())
    }

    fn is_raw(&self) -> bool {
        self.turns.last().is_some_and(|turn| turn.raw)
    }

    fn refuse_if_busy(&self) -> Result<(), Error> {
        if self.busy.is_some() { Err(Error::SessionBusy(self.key.name.clone())) } else { Ok(()) }
    }

    fn cut(&mut self, turn_count: usize, now: Moment) {
        self.turns.truncate(turn_count);
        let (messages, tokens) =
            self.turns.last().map_or((0, 0), |last| (last.message_count, last.token_count));
        self.messages.truncate(messages);
        self.tokens.truncate(tokens);
        self.text.truncate(self.turns.iter().filter_map(|turn| turn.text_bytes).max().unwrap_or(0));
        self.used = now;
    }

    /// A turn may have rewritten what came before (a template that drops old reasoning does). The ends of
    /// earlier turns move back to where that begins, and their text is not known any more.
    fn forget_rewritten(&mut self, tokens: &[u32], text: &str) {
        let same_tokens = self.tokens.iter().zip(tokens).take_while(|(old, new)| old == new).count();
        let same_bytes = self.text.bytes().zip(text.bytes()).take_while(|(old, new)| old == new).count();
        for turn in &mut self.turns {
            let text_holds = turn.text_bytes.is_some_and(|bytes| bytes <= same_bytes);
            if turn.token_count > same_tokens || !text_holds {
                turn.text_bytes = None;
                turn.token_count = turn.token_count.min(same_tokens);
            }
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
