//! How a session is cut back: to the end of a turn or of a message, or to a number of tokens. What remains is
//! true: messages, text and tokens say the same as far as they are known.
//!
//! Within a chat turn tokens end in the answer, of which the session then holds what the remaining tokens
//! stand for, or before it. At its very beginning the turn keeps its messages but for the answer; before
//! that, it keeps none: its tokens are then those of an unfinished text, which a raw turn continues and a
//! chat turn renders anew.

use std::sync::Arc;
use std::time::SystemTime;

use super::bytes::{TURN_BYTES, messages_bytes};
use super::message::Message;
use super::snapshot::{AnswerForms, AnswerStart, TurnEnd};
use super::state::{Session, shared_start};
use crate::error::Error;
use crate::ids::{ModelName, TokenizerHash};

/// A cut within an answer. It is done once the text of the answer's remaining tokens is known.
#[derive(Clone, Debug, PartialEq)]
pub struct AnswerCut {
    /// The model whose tokenizer knows that text.
    pub model: ModelName,
    /// Whose tokens they are, where that is known.
    pub tokenizer: Option<TokenizerHash>,
    /// The tokens of the session when this was asked.
    tokens: Arc<[u32]>,
    /// Number of tokens before the answer.
    start: usize,
    /// Number of tokens that remain, those before the answer included.
    end: usize,
    /// The whole answer.
    pub answer: Arc<Message>,
    /// What it was written in.
    pub forms: AnswerForms,
}

impl AnswerCut {
    /// Returns the answer's tokens that remain; at least one.
    #[must_use]
    pub fn remaining(&self) -> &[u32] {
        &self.tokens[self.start..self.end]
    }
}

/// What remains of a turn that is cut.
struct Remainder {
    tokens: usize,
    /// Messages that remain of those that the session has.
    messages: usize,
    /// The shortened answer.
    answer: Option<Message>,
    /// The text of the session's tokens; none where it is not known.
    text: Option<Arc<str>>,
    /// Whether the tokens are those of the messages.
    is_whole: bool,
    start: Option<AnswerStart>,
}

impl Session {
    /// Truncates to the first `turn_count` turns.
    ///
    /// # Errors
    /// It has fewer, or a turn runs.
    pub fn truncate_turns(&mut self, turn_count: usize, now: SystemTime) -> Result<(), Error> {
        self.refuse_if_busy()?;
        if turn_count > self.turns.len() {
            return Err(Error::field("turn_count", format!("the session has {} turns", self.turns.len())));
        }
        self.keep_turns(turn_count, now);
        Ok(())
    }

    /// Truncates to the first `message_count` messages: to the end of a turn, or of what one had before its
    /// answer.
    ///
    /// # Errors
    /// It has fewer, a turn runs, or these messages end elsewhere: their tokens are not known.
    pub fn truncate_messages(&mut self, message_count: usize, now: SystemTime) -> Result<(), Error> {
        self.refuse_if_busy()?;
        let held = self.messages.len();
        if message_count > held {
            return Err(Error::field("message_count", format!("the session has {held} messages")));
        }
        let place = self.turns.partition_point(|turn| turn.message_count < message_count);
        match self.turns.get(place).cloned() {
            _ if message_count == 0 => self.keep_turns(0, now),
            Some(turn) if turn.message_count == message_count => self.keep_turns(place + 1, now),
            Some(TurnEnd { answer: Some(start), message_count: all, .. }) if all == message_count + 1 => {
                self.shorten(place, self.without_answer(&start, message_count), now);
            }
            Some(_) | None => {
                let why = "must be the end of a turn, or leave out nothing of it but its answer";
                return Err(Error::field("message_count", why));
            }
        }
        Ok(())
    }

    /// Truncates to the first `token_count` tokens. Returns the cut that is left to do with
    /// [`Self::cut_answer`] if they end within an answer.
    ///
    /// # Errors
    /// It has fewer, or a turn runs.
    pub fn truncate_tokens(
        &mut self,
        token_count: usize,
        now: SystemTime,
    ) -> Result<Option<AnswerCut>, Error> {
        self.refuse_if_busy()?;
        if token_count > self.tokens.len() {
            return Err(Error::field("token_count", format!("the session has {} tokens", self.tokens.len())));
        }
        let whole = self.turns.partition_point(|turn| turn.token_count <= token_count);
        let before = whole.checked_sub(1).map(|last| &self.turns[last]);
        let (tokens_before, messages) = before.map_or((0, 0), |last| (last.token_count, last.message_count));
        let shortened = self.turns.get(whole).filter(|_| tokens_before < token_count);
        let Some(TurnEnd { message_count, answer, .. }) = shortened.cloned() else {
            self.keep_turns(whole, now);
            return Ok(None);
        };
        let remainder = match answer {
            Some(start) if start.tokens < token_count => {
                let (model, tokens) = (self.model.clone(), Arc::clone(&self.tokens));
                let (tokenizer, end) = (self.tokenizer, token_count);
                let AnswerStart { tokens: start, forms, .. } = start;
                let answer = Arc::clone(&self.messages[message_count - 1]);
                return Ok(Some(AnswerCut { model, tokenizer, tokens, start, end, answer, forms }));
            }
            Some(start) if start.tokens == token_count => self.without_answer(&start, message_count - 1),
            Some(_) | None => {
                let (answer, text, start) = (None, None, None);
                // The unfinished text is of none of them: nothing may be appended to it but raw text.
                Remainder { tokens: token_count, messages, answer, text, is_whole: false, start }
            }
        };
        self.shorten(whole, remainder, now);
        Ok(None)
    }

    /// Does a cut within an answer; `text` is what its remaining tokens stand for, `answer` what they say.
    /// Returns false if the session was changed since: the cut is to be asked for again.
    ///
    /// # Errors
    /// A turn runs.
    pub fn cut_answer(
        &mut self,
        cut: &AnswerCut,
        (text, answer): (&str, Message),
        now: SystemTime,
    ) -> Result<bool, Error> {
        self.refuse_if_busy()?;
        let place = self.turns.partition_point(|turn| turn.token_count <= cut.end);
        let turn = self.turns.get(place).filter(|_| Arc::ptr_eq(&self.tokens, &cut.tokens));
        let start = turn.and_then(|turn| turn.answer.clone()).filter(|start| start.tokens == cut.start);
        let (Some(turn), Some(start)) = (turn, start) else { return Ok(false) };
        let before = start.text_bytes.and_then(|bytes| self.text.get(..bytes));
        let remainder = Remainder {
            tokens: cut.end,
            messages: turn.message_count - 1,
            answer: Some(answer),
            text: before.map(|before| [before, text].concat().into()),
            is_whole: turn.is_whole,
            start: Some(start.unended()),
        };
        self.shorten(place, remainder, now);
        Ok(true)
    }

    /// Returns what remains of a turn without its answer.
    fn without_answer(&self, start: &AnswerStart, messages: usize) -> Remainder {
        let text = start.text_bytes.and_then(|bytes| shared_start(&self.text, bytes));
        Remainder { tokens: start.tokens, messages, answer: None, text, is_whole: true, start: None }
    }

    /// Cuts within the turn at `place`.
    fn shorten(&mut self, place: usize, remainder: Remainder, now: SystemTime) {
        let Remainder { tokens, messages, answer, text, is_whole, start } = remainder;
        let raw = self.turns[place].raw;
        let (all_tokens, all_messages) = (Arc::clone(&self.tokens), self.messages.clone());
        self.keep_turns(place, now);
        let own = all_messages.into_iter().take(messages).skip(self.messages.len());
        let own: Vec<Arc<Message>> = own.chain(answer.map(Arc::new)).collect();
        let kept = TURN_BYTES + messages_bytes(own.iter().map(|message| &**message));
        self.messages.extend(own);
        let (message_count, text_bytes) = (self.messages.len(), text.as_ref().map(|text| text.len()));
        self.turns.push(TurnEnd {
            message_count,
            token_count: tokens,
            text_bytes,
            is_whole: is_whole || raw,
            answer: start,
            raw,
        });
        self.turn_bytes.push(Arc::new(self.held.charge(kept)));
        self.tokens = all_tokens[..tokens].into();
        self.text = text.unwrap_or_else(|| Arc::clone(&self.text));
        self.count_content();
    }

    /// Keeps the first turns.
    pub(super) fn keep_turns(&mut self, turn_count: usize, now: SystemTime) {
        self.turns.truncate(turn_count);
        self.turn_bytes.truncate(turn_count);
        let (messages, tokens) =
            self.turns.last().map_or((0, 0), |last| (last.message_count, last.token_count));
        self.messages.truncate(messages);
        if tokens < self.tokens.len() {
            self.tokens = self.tokens[..tokens].into();
        }
        let known =
            |turn: &TurnEnd| [turn.text_bytes, turn.answer.as_ref().and_then(|start| start.text_bytes)];
        let text_bytes = self.turns.iter().flat_map(known).flatten().max().unwrap_or(0);
        self.text = shared_start(&self.text, text_bytes).unwrap_or_default();
        self.count_content();
        self.used = now;
    }
}
