//! What a session is at one moment, as plain data that is stored and read back: its outline (all but the
//! content) and, if it is in memory, the content. After a start only outlines are known: a session is *cold*
//! until its content is read.

use std::sync::Arc;
use std::time::SystemTime;

use super::bytes::Charged;
use super::history::History;
use super::message::Message;
use super::terms::Terms;
use crate::ids::{ModelName, SessionId, SessionKey, TokenizerHash};

/// Where the answer of a turn begins in its session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnswerStart {
    /// Tokens before it.
    pub tokens: usize,
    /// Bytes of text before it; none where that is not known.
    pub text_bytes: Option<usize>,
    /// Bytes of text of the token that ended it, 0 if none did; none where that was not noted.
    pub ending_bytes: Option<usize>,
    /// What it was written in.
    pub forms: AnswerForms,
}

/// The forms in which the text of an answer holds what is not text, by their names; None: that is text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnswerForms {
    /// That of tool calls.
    pub tools: Option<Arc<str>>,
    /// That of reasoning.
    pub reasoning: Option<Arc<str>>,
    /// Whether it begins within reasoning.
    pub begins_reasoning: bool,
}

impl AnswerStart {
    /// Returns it for an answer that no token ends.
    pub(super) fn unended(self) -> Self {
        Self { ending_bytes: Some(0), ..self }
    }
}

/// The end of a finished turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TurnEnd {
    /// Messages at its end; the raw turns of a session add none.
    pub message_count: usize,
    /// Tokens at its end.
    pub token_count: usize,
    /// Bytes of text at its end; none where the tokens' text is not known.
    pub(super) text_bytes: Option<usize>,
    /// Whether its tokens hold all of its messages, and nothing else: a later turn may have rewritten them.
    pub(super) is_whole: bool,
    /// Where its answer, its last message, begins; none without one, and where a later turn rewrote it.
    pub(super) answer: Option<AnswerStart>,
    /// Whether its input was text or ids instead of messages.
    pub raw: bool,
}

impl TurnEnd {
    /// Returns where the text of its answer ends, if a token that ended it follows there.
    pub(super) fn answer_end(&self, messages: &[Arc<Message>], text: &str) -> Option<usize> {
        let AnswerStart { text_bytes, ending_bytes, .. } = self.answer.as_ref()?;
        let (start, all) = ((*text_bytes)?, self.text_bytes?);
        if let Some(bytes) = *ending_bytes {
            let end = all.checked_sub(bytes)?;
            return (start <= end && end < all && text.is_char_boundary(end)).then_some(end);
        }
        // It was stored before that was noted, when all of an answer was its text.
        let answer = messages.get(self.message_count.checked_sub(1)?)?.joined_text();
        let end = start + answer.len();
        (end < all && text.get(start..end) == Some(&*answer)).then_some(end)
    }

    /// Returns whether it lies within a content of these sizes.
    fn is_within(&self, sizes: Sizes) -> bool {
        self.message_count <= sizes.messages
            && self.token_count <= sizes.tokens
            && self.text_bytes.is_none_or(|bytes| bytes <= sizes.text_bytes)
            && self.answer.as_ref().is_none_or(|start| {
                self.message_count > 0
                    && start.tokens <= self.token_count
                    && start.text_bytes.is_none_or(|bytes| bytes <= sizes.text_bytes)
            })
    }
}

/// All facts of a session but its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outline {
    /// Its number.
    pub id: SessionId,
    /// Its owner and name.
    pub key: SessionKey,
    /// The model it is bound to.
    pub model: ModelName,
    /// How long it stays, and its labels.
    pub terms: Terms,
    /// Time of its creation.
    pub created: SystemTime,
    /// Time of its last use.
    pub used: SystemTime,
    /// How its chat turns go on.
    pub history: History,
    /// Salt of its cached KV; empty for none.
    pub cache_salt: Arc<str>,
    /// Whose tokens it holds, where that is known.
    pub tokenizer: Option<TokenizerHash>,
    /// Its finished turns.
    pub turns: Vec<TurnEnd>,
    /// What each of them is charged with.
    pub turn_charges: Vec<Charged>,
    /// Sizes of its content.
    pub sizes: Sizes,
    /// The number of the charge for its text and tokens.
    pub content_number: u64,
}

/// Sizes of a session's content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Messages.
    pub messages: usize,
    /// Tokens.
    pub tokens: usize,
    /// Bytes of rendered text.
    pub text_bytes: usize,
}

/// A session's content; shared, never copied.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// The messages.
    pub messages: Vec<Arc<Message>>,
    /// The messages as rendered, as far as that is known.
    pub text: Arc<str>,
    /// The tokens.
    pub tokens: Arc<[u32]>,
}

impl Contents {
    /// Returns its sizes.
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        let Self { messages, text, tokens } = self;
        Sizes { messages: messages.len(), tokens: tokens.len(), text_bytes: text.len() }
    }
}

/// A session at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// All but the content.
    pub outline: Outline,
    /// The content; none of a cold session.
    pub contents: Option<Contents>,
}

/// Bytes that no session comes near; sums of them stay far from an overflow.
const BYTES_MAX: usize = 1 << 48;

/// Numbers that no charge comes near.
const NUMBER_MAX: u64 = 1 << 62;

impl Outline {
    /// Returns the numbers of its charges.
    pub(super) fn charge_numbers(&self) -> impl Iterator<Item = u64> {
        self.turn_charges.iter().map(|turn| turn.number).chain([self.content_number])
    }

    /// Returns whether it can be a session's: its turns end within its content, and its sizes can be charged.
    pub(super) fn is_sound(&self) -> bool {
        let Self { turns, turn_charges, sizes, .. } = self;
        let Sizes { messages, tokens, text_bytes } = *sizes;
        let bytes = turn_charges.iter().map(|turn| turn.bytes).chain([messages, tokens, text_bytes]);
        turns.len() == turn_charges.len()
            && turns.iter().all(|turn| turn.is_within(*sizes))
            && self.charge_numbers().all(|number| number <= NUMBER_MAX)
            && bytes.fold(0, usize::saturating_add) <= BYTES_MAX
    }
}
