//! One session: its turns, and the rules of what may follow what. A turn begins (`begin`), and either commits
//! or is rolled back; between the two only `busy` is set. Messages, text and tokens are shared with the turns
//! and forks that build on them, never copied. How it is cut back is in `cut`.

mod stored;

use std::sync::Arc;
use std::time::SystemTime;

use super::bytes::{Charge, Held, SESSION_BYTES, TURN_BYTES, messages_bytes, tokens_bytes};
use super::history::History;
use super::message::Message;
use super::snapshot::{AnswerStart, TurnEnd};
use super::terms::Terms;
use crate::count::{common_start, count};
use crate::error::Error;
use crate::ids::{ModelName, SessionId, SessionKey, TokenizerHash};
use stored::Absence;

/// One running turn; unique in the daemon's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TurnId(pub u64);

/// The kind of input a turn brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputKind {
    /// Messages.
    Chat,
    /// Text or token ids.
    Raw,
}

/// A caller's request to begin a turn.
#[derive(Clone, Debug)]
pub struct TurnRequest {
    /// The model that the caller expects; none takes the session's.
    pub model: Option<ModelName>,
    /// The kind of its input.
    pub input: InputKind,
    /// The token count the caller saw last.
    pub expected_token_count: Option<u32>,
    /// Bytes of its input that the session would keep.
    pub input_bytes: usize,
    /// How a chat turn goes on; None takes the session's.
    pub history: Option<History>,
}

/// The end of the last answer of a session; what follows there was not generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnswerEnd {
    /// Its place among the messages.
    pub message: usize,
    /// Tokens up to its end, with the one that ended it.
    pub tokens: usize,
    /// Bytes of text up to there; none where that is not known.
    pub text_bytes: Option<usize>,
}

/// The content that a turn builds on. Shares the session's content, so that no lock is held while the turn
/// runs.
#[derive(Clone, Debug, PartialEq)]
pub struct TurnStart {
    /// The model the session is bound to.
    pub model: ModelName,
    /// The messages so far.
    pub messages: Vec<Arc<Message>>,
    /// The text that `tokens` stand for, where that is known.
    pub text: Option<Arc<str>>,
    /// The tokens so far.
    pub tokens: Arc<[u32]>,
    /// Whether `tokens` hold all that `messages` say. Those of a session that was cut back to a turn which a
    /// later one rewrote do not.
    pub is_whole: bool,
    /// How a chat turn goes on.
    pub history: History,
    /// Salt of the session's cached KV; empty for none.
    pub cache_salt: Arc<str>,
    /// Whether the session is pinned.
    pub pinned: bool,
    /// Whose tokens they are; none where there are none, or where that was not stored.
    pub tokenizer: Option<TokenizerHash>,
    /// The text of the first of them, as far as it is known.
    pub known: Arc<str>,
    /// Where the last answer ends; none if no turn has one that is as it was generated.
    pub answer: Option<AnswerEnd>,
}

impl TurnStart {
    /// Returns whether its tokens are those of a tokenizer, as far as is known.
    #[must_use]
    pub fn is_of(&self, tokenizer: TokenizerHash) -> bool {
        self.tokens.is_empty() || self.tokenizer.is_none_or(|own| own == tokenizer)
    }
}

/// The additions of a finished turn.
#[derive(Clone, Debug)]
pub enum TurnContent {
    /// Tokens only.
    Raw,
    /// Messages.
    Chat {
        /// The new ones, the answer last.
        messages: Vec<Message>,
        /// The text of the tokens, the answer at its end; None if that of the tokens before is not known.
        text: Option<Arc<str>>,
        /// Whether `text` covers all tokens. That of an answer cut at a stop string does not: the tokens hold
        /// that string, the text does not.
        text_is_whole: bool,
        /// Where the answer begins; none if the turn has no answer.
        answer: Option<AnswerStart>,
    },
}

/// The public facts of a session.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionView {
    /// Its number.
    pub id: SessionId,
    /// Its owner and name.
    pub key: SessionKey,
    /// The model it is bound to.
    pub model: ModelName,
    /// Number of its tokens.
    pub token_count: usize,
    /// Its tokens; none while its content is not in memory.
    pub tokens: Arc<[u32]>,
    /// Bytes of all that it holds; what forks share counts in each.
    pub bytes: u64,
    /// Its finished turns.
    pub turns: Vec<TurnEnd>,
    /// Whether a turn runs.
    pub busy: bool,
    /// How long it stays, and its labels.
    pub terms: Terms,
    /// Time of its creation.
    pub created: SystemTime,
    /// Time of its last use.
    pub used: SystemTime,
    /// Salt of its cached KV; empty for none.
    pub cache_salt: Arc<str>,
    /// How its chat turns go on.
    pub history: History,
}

/// A conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    id: SessionId,
    pub(super) key: SessionKey,
    pub(super) model: ModelName,
    pub(super) messages: Vec<Arc<Message>>,
    /// Rendered messages, output included, as far as known; the last turn says how far it is valid.
    pub(super) text: Arc<str>,
    pub(super) tokens: Arc<[u32]>,
    pub(super) turns: Vec<TurnEnd>,
    /// The bytes of each turn.
    pub(super) turn_bytes: Vec<Arc<Charge>>,
    /// The bytes of text and tokens.
    content_bytes: Arc<Charge>,
    /// The bytes of its labels.
    terms_bytes: Arc<Charge>,
    /// The bytes that no fork shares.
    own_bytes: Arc<Charge>,
    pub(super) held: Held,
    /// None while messages, text and tokens are those of the session.
    absence: Option<Absence>,
    busy: Option<TurnId>,
    terms: Terms,
    created: SystemTime,
    pub(super) used: SystemTime,
    history: History,
    cache_salt: Arc<str>,
    /// Whose tokens it holds, where that is known.
    pub(super) tokenizer: Option<TokenizerHash>,
}

impl Session {
    /// Returns an empty session.
    #[must_use]
    pub fn new(key: SessionKey, model: ModelName, terms: Terms, now: SystemTime) -> Self {
        Self::held(Held::default(), key, model, terms, now)
    }

    /// Returns an empty session whose bytes are counted in `held`.
    pub(super) fn held(held: Held, key: SessionKey, model: ModelName, terms: Terms, now: SystemTime) -> Self {
        Self {
            id: SessionId::default(),
            key,
            model,
            messages: Vec::new(),
            text: "".into(),
            tokens: [].into(),
            turns: Vec::new(),
            turn_bytes: Vec::new(),
            content_bytes: Arc::new(held.charge(0)),
            terms_bytes: Arc::new(held.charge(terms.bytes())),
            own_bytes: Arc::new(held.charge(SESSION_BYTES)),
            held,
            absence: None,
            busy: None,
            terms,
            created: now,
            used: now,
            history: History::default(),
            cache_salt: "".into(),
            tokenizer: None,
        }
    }

    /// Changes how its chat turns go on.
    #[must_use]
    pub fn with_history(self, history: History) -> Self {
        Self { history, ..self }
    }

    /// Changes the salt of its cached KV.
    #[must_use]
    pub fn with_cache_salt(self, cache_salt: Arc<str>) -> Self {
        Self { cache_salt, ..self }
    }

    /// Changes whose tokens it holds.
    #[cfg(test)]
    #[must_use]
    pub fn with_tokenizer(self, tokenizer: TokenizerHash) -> Self {
        Self { tokenizer: Some(tokenizer), ..self }
    }

    /// Returns a copy under a new name, without the turn that may run. Content and labels are shared.
    #[must_use]
    pub fn fork(&self, key: SessionKey, now: SystemTime) -> Self {
        let lists = size_of_val(self.messages.as_slice()) + size_of_val(self.turns.as_slice());
        let own_bytes = Arc::new(self.held.charge(SESSION_BYTES + lists));
        let terms_bytes = Arc::new(self.held.charge(self.terms.bytes()));
        Self { key, own_bytes, terms_bytes, busy: None, created: now, used: now, ..self.clone() }
    }

    /// Returns the bytes that a further turn does not replace: everything but text and tokens.
    #[must_use]
    pub fn lasting_bytes(&self) -> u64 {
        self.own_bytes.bytes()
            + self.terms_bytes.bytes()
            + self.turn_bytes.iter().map(|turn| turn.bytes()).sum::<u64>()
    }

    /// Returns its public facts.
    #[must_use]
    pub fn view(&self) -> SessionView {
        SessionView {
            id: self.id,
            key: self.key.clone(),
            model: self.model.clone(),
            token_count: self.sizes().tokens,
            tokens: Arc::clone(&self.tokens),
            bytes: self.bytes(),
            turns: self.turns.clone(),
            busy: self.busy.is_some(),
            terms: self.terms.clone(),
            created: self.created,
            used: self.used,
            cache_salt: Arc::clone(&self.cache_salt),
            history: self.history,
        }
    }

    /// Returns whether a turn runs.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.busy.is_some()
    }

    /// Returns the model it is bound to.
    #[must_use]
    pub fn model(&self) -> &ModelName {
        &self.model
    }

    /// Returns its terms.
    #[must_use]
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Changes its terms, which is a use of it.
    pub fn set_terms(&mut self, terms: Terms, now: SystemTime) {
        self.terms_bytes = Arc::new(self.held.charge(terms.bytes()));
        self.terms = terms;
        self.used = now;
    }

    /// Returns its tokens.
    #[must_use]
    pub fn tokens(&self) -> &Arc<[u32]> {
        &self.tokens
    }

    /// Returns its messages; none once a turn was raw.
    #[must_use]
    pub fn messages(&self) -> &[Arc<Message>] {
        if self.is_raw() { &[] } else { &self.messages }
    }

    /// Returns whether it expired. A running turn keeps it alive.
    #[must_use]
    pub fn is_expired(&self, now: SystemTime) -> bool {
        self.busy.is_none() && self.terms.end(self.used).is_some_and(|end| end <= now)
    }

    /// Refuses when the token count is not the expected one.
    pub fn expect_tokens(&self, expected: Option<u32>) -> Result<(), Error> {
        let actual = count(self.sizes().tokens);
        match expected {
            Some(expected) if expected != actual => {
                Err(Error::SessionMoved { session: self.key.name.clone(), expected, actual })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Returns the tokens to go on from without messages, if the session is bound to `expected`; none expects
    /// any model.
    pub fn raw_start(&self, expected: Option<&ModelName>) -> Result<TurnStart, Error> {
        if expected.is_some_and(|model| *model != self.model) {
            let (session, model) = (self.key.name.clone(), self.model.clone());
            return Err(Error::SessionWrongModel { session, model });
        }
        let (model, tokens) = (self.model.clone(), Arc::clone(&self.tokens));
        Ok(TurnStart {
            model,
            messages: Vec::new(),
            text: None,
            tokens,
            is_whole: self.turns.last().is_none_or(|last| last.is_whole),
            history: self.history,
            cache_salt: Arc::clone(&self.cache_salt),
            pinned: self.terms.pinned,
            tokenizer: self.tokenizer,
            known: "".into(),
            answer: None,
        })
    }

    /// Returns what a turn would build on, with the same check.
    fn start(&self, request: &TurnRequest) -> Result<TurnStart, Error> {
        let start = self.raw_start(request.model.as_ref())?;
        let history = request.history.unwrap_or(start.history);
        let text_bytes = self.turns.last().and_then(|last| last.text_bytes);
        let text = text_bytes.and_then(|end| shared_start(&self.text, end));
        let starts = self.turns.iter().filter_map(|turn| turn.answer.as_ref()?.text_bytes);
        let known = self.turns.iter().filter_map(|turn| turn.text_bytes).chain(starts).max();
        let known = known.and_then(|end| shared_start(&self.text, end)).unwrap_or_default();
        let answered = self.turns.iter().rev().find(|turn| turn.answer.is_some());
        let answer = answered.map(|&TurnEnd { message_count, token_count: tokens, text_bytes, .. }| {
            AnswerEnd { message: message_count.saturating_sub(1), tokens, text_bytes }
        });
        Ok(TurnStart { messages: self.messages.clone(), text, history, known, answer, ..start })
    }

    /// Begins a turn, if it may.
    pub fn begin(
        &mut self,
        turn: TurnId,
        request: &TurnRequest,
        now: SystemTime,
    ) -> Result<TurnStart, Error> {
        let session = || self.key.name.clone();
        let start = self.start(request)?;
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

    /// Notes whose tokens a turn that is about to be committed brings. Tokens of another tokenizer are not
    /// compared with them: no earlier turn ends within them.
    pub fn note_tokenizer(&mut self, turn: TurnId, tokenizer: TokenizerHash) {
        if self.busy != Some(turn) {
            return;
        }
        if self.tokenizer.is_some_and(|own| own != tokenizer) {
            for turn in &mut self.turns {
                (turn.text_bytes, turn.answer, turn.is_whole, turn.token_count) = (None, None, false, 0);
            }
        }
        self.tokenizer = Some(tokenizer);
    }

    /// Commits a turn. `tokens` are all of the session's now: the turn's context and the generated ones.
    /// Returns false if the turn does not run here (its session was deleted, and another took the name).
    pub fn commit(
        &mut self,
        turn: TurnId,
        tokens: Arc<[u32]>,
        content: TurnContent,
        now: SystemTime,
    ) -> bool {
        if self.busy != Some(turn) {
            return false;
        }
        let raw = matches!(content, TurnContent::Raw);
        let (mut text_bytes, mut kept, mut answer) = (None, TURN_BYTES, None);
        if let TurnContent::Chat { messages, text, text_is_whole, answer: start } = content {
            // What was generated is the new turn's, though an earlier one may have ended with the same.
            let prompt = start.as_ref().map_or(&*tokens, |start| &tokens[..start.tokens]);
            let prompt_bytes = start.as_ref().and_then(|start| start.text_bytes);
            let of_prompt = |text| prompt_bytes.and_then(|end| str::get(text, ..end)).unwrap_or(text);
            self.forget_rewritten(prompt, text.as_deref().map(of_prompt));
            kept += messages_bytes(&messages);
            self.messages.extend(messages.into_iter().map(Arc::new));
            answer = start;
            if let Some(text) = text {
                text_bytes = text_is_whole.then_some(text.len());
                self.text = text;
            }
        }
        let (message_count, token_count) = (self.messages.len(), tokens.len());
        self.turns.push(TurnEnd { message_count, token_count, text_bytes, is_whole: true, answer, raw });
        self.turn_bytes.push(Arc::new(self.held.charge(kept)));
        self.tokens = tokens;
        self.count_content();
        self.busy = None;
        self.used = now;
        true
    }

    /// Rolls a turn back; the session is as it was.
    pub fn roll_back(&mut self, turn: TurnId, now: SystemTime) {
        if self.busy == Some(turn) {
            self.busy = None;
            self.used = now;
        }
    }

    fn is_raw(&self) -> bool {
        self.turns.last().is_some_and(|turn| turn.raw)
    }

    pub(super) fn refuse_if_busy(&self) -> Result<(), Error> {
        if self.busy.is_some() { Err(Error::SessionBusy(self.key.name.clone())) } else { Ok(()) }
    }

    /// Charges text and tokens as they are now.
    pub(super) fn count_content(&mut self) {
        let bytes = self.text.len() + tokens_bytes(self.tokens.len());
        self.content_bytes = Arc::new(self.held.charge(bytes));
    }

    /// Moves the ends of earlier turns back to where a turn rewrote what came before (a template that drops
    /// old reasoning does), and forgets their text. Without a new text, the old one stays: then only the
    /// token that ended the last answer may be another one.
    fn forget_rewritten(&mut self, tokens: &[u32], text: Option<&str>) {
        let same_tokens = common_start(&self.tokens, tokens);
        let is_appended = text.is_none();
        let text = text.unwrap_or(&self.text);
        let same_bytes = common_start(self.text.as_bytes(), text.as_bytes());
        for turn in &mut self.turns {
            let is_last_another = turn.token_count == same_tokens + 1;
            if is_last_another && turn.answer.as_ref().is_some_and(|start| start.tokens <= same_tokens) {
                let end = turn.answer_end(&self.messages, &self.text).filter(|end| *end <= same_bytes);
                if end.is_some() || is_appended {
                    // Only the token that ended the answer is another one.
                    (turn.text_bytes, turn.token_count) = (end, same_tokens);
                    turn.answer = turn.answer.take().map(AnswerStart::unended);
                    continue;
                }
            }
            turn.text_bytes.take_if(|bytes| *bytes > same_bytes);
            if turn.token_count > same_tokens {
                (turn.answer, turn.is_whole, turn.token_count) = (None, false, same_tokens);
            }
            if let Some(start) = &mut turn.answer {
                start.text_bytes.take_if(|bytes| *bytes > same_bytes);
            }
        }
    }
}

/// Returns the first `end` bytes; shared if they are all.
pub(super) fn shared_start(text: &Arc<str>, end: usize) -> Option<Arc<str>> {
    if end == text.len() { Some(Arc::clone(text)) } else { text.get(..end).map(Arc::from) }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
