//! Sessions as bytes: a record turns what a session was into what it is. Its *outline* holds all facts but
//! the content and how much of the old content stays; its *content* holds what was added. A session is
//! replayed from all of its records, or, while nobody uses it, from their outlines alone.
//!
//! The bytes are protobuf (`wire`), so that fields can be added: a reader skips those that it does not know.
//! Whoever stores records guards them with checksums; here nothing is believed that cannot be a session.

mod pieces;
mod values;
mod wire;

use std::sync::Arc;

use super::message::Message;
use super::snapshot::{Contents, Outline, Sizes, Snapshot};
use crate::count::common_start;
pub use pieces::{Joined, PieceError, Pieces};
use wire::{ContentRecord, OutlineRecord};

/// What turns a session from what it was into what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// All facts but the content.
    pub outline: Vec<u8>,
    /// The added content; empty for none.
    pub content: Vec<u8>,
}

/// The part of the content before a record that stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keeps {
    turns: usize,
    content: Sizes,
}

/// Why a record cannot be one of a session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It cannot be decoded.
    #[error("a record cannot be decoded: {0}")]
    Malformed(String),
    /// It does not follow from those before it.
    #[error("a record contradicts those before it: {0}")]
    Contradiction(&'static str),
}

/// Returns the record that turns `before`, or nothing, into `now`; none if they are the same.
#[must_use]
pub fn record(before: Option<&Snapshot>, now: &Snapshot) -> Option<Record> {
    if before.is_some_and(|before| before.outline == now.outline && same_contents(before, now)) {
        return None;
    }
    let keeps = before.map_or_else(Keeps::default, |before| keeps(before, now));
    Some(Record::new(now, keeps))
}

/// Returns two records that make `now` out of nothing: the facts alone, and everything. Where one of the two
/// is lost, the other still tells whose session it was.
#[must_use]
pub fn whole(now: &Snapshot) -> [Record; 2] {
    let outline = Outline {
        turns: Vec::new(),
        turn_charges: Vec::new(),
        sizes: Sizes::default(),
        ..now.outline.clone()
    };
    let facts = Snapshot { outline, contents: Some(Contents::default()) };
    [Record::new(&facts, Keeps::default()), Record::new(now, Keeps::default())]
}

impl Record {
    fn new(now: &Snapshot, keeps: Keeps) -> Self {
        let outline = OutlineRecord::new(&now.outline, keeps);
        let content = now.contents.as_ref().map_or_else(Vec::new, |contents| added(contents, keeps.content));
        Self { outline: outline.to_bytes(), content }
    }
}

fn same_contents(before: &Snapshot, now: &Snapshot) -> bool {
    keeps(before, now).content == before.outline.sizes
}

/// Returns what both have in common. A cold session's content is what it was.
fn keeps(before: &Snapshot, now: &Snapshot) -> Keeps {
    let (Outline { turns: old, turn_charges: old_charges, .. }, Outline { turns, turn_charges, .. }) =
        (&before.outline, &now.outline);
    let turns = old.iter().zip(old_charges).zip(turns.iter().zip(turn_charges));
    let turns = turns.take_while(|(old, new)| old == new).count();
    let content = match (&before.contents, &now.contents) {
        (_, None) => now.outline.sizes,
        (Some(before), Some(now)) => common(before, now),
        // It must have been read: what was there before is not known here, so all of it is written.
        (None, Some(_)) => Sizes::default(),
    };
    Keeps { turns, content }
}

fn common(before: &Contents, now: &Contents) -> Sizes {
    let same = |(old, new): &(&Arc<Message>, &Arc<Message>)| Arc::ptr_eq(old, new) || old == new;
    let messages = before.messages.iter().zip(&now.messages).take_while(same).count();
    let tokens = if Arc::ptr_eq(&before.tokens, &now.tokens) {
        now.tokens.len()
    } else {
        common_start(&before.tokens, &now.tokens)
    };
    let text_bytes = if Arc::ptr_eq(&before.text, &now.text) {
        now.text.len()
    } else {
        now.text.floor_char_boundary(common_start(before.text.as_bytes(), now.text.as_bytes()))
    };
    Sizes { messages, tokens, text_bytes }
}

/// Returns what was added, as bytes.
fn added(contents: &Contents, keeps: Sizes) -> Vec<u8> {
    let Contents { messages, text, tokens } = contents;
    let messages = messages.get(keeps.messages..).unwrap_or_default();
    let (tokens, text) = (tokens.get(keeps.tokens..), text.get(keeps.text_bytes..));
    ContentRecord::new(messages, tokens.unwrap_or_default(), text.unwrap_or_default()).to_bytes()
}

/// A session in the making, from the records since it was made.
#[derive(Debug, Default)]
pub struct Replay {
    outline: Option<Outline>,
    messages: Vec<Arc<Message>>,
    tokens: Vec<u32>,
    text: String,
}

impl Replay {
    /// Takes the outline of the next record.
    ///
    /// # Errors
    /// It cannot be decoded, or does not follow from those before.
    pub fn outline(&mut self, bytes: &[u8]) -> Result<Keeps, RecordError> {
        let record = OutlineRecord::from_bytes(bytes)?;
        let before = self.outline.take();
        let sizes = before.as_ref().map_or_else(Sizes::default, |before| before.sizes);
        let (outline, keeps) = record.after(before)?;
        let Sizes { messages, tokens, text_bytes } = keeps.content;
        if messages > sizes.messages || tokens > sizes.tokens || text_bytes > sizes.text_bytes {
            return Err(RecordError::Contradiction("more is kept than there was"));
        }
        if !outline.is_sound() {
            return Err(RecordError::Contradiction("a turn ends beyond the content"));
        }
        self.outline = Some(outline);
        Ok(keeps)
    }

    /// Takes the content of the record whose outline was taken last.
    ///
    /// # Errors
    /// It cannot be decoded, or does not make the content that the outline says.
    pub fn content(&mut self, keeps: Keeps, bytes: &[u8]) -> Result<(), RecordError> {
        let (messages, tokens, text) = ContentRecord::from_bytes(bytes)?.into_parts()?;
        let keeps = keeps.content;
        if !self.text.is_char_boundary(keeps.text_bytes) {
            return Err(RecordError::Contradiction("the text is cut inside a character"));
        }
        self.messages.truncate(keeps.messages);
        self.messages.extend(messages.into_iter().map(Arc::new));
        self.tokens.truncate(keeps.tokens);
        self.tokens.extend(tokens);
        self.text.truncate(keeps.text_bytes);
        self.text.push_str(&text);
        let sizes = self.sizes();
        match &self.outline {
            Some(outline) if outline.sizes == sizes => Ok(()),
            Some(_) | None => Err(RecordError::Contradiction("the content has other sizes than its outline")),
        }
    }

    /// Returns the sizes of the content so far.
    fn sizes(&self) -> Sizes {
        Sizes { messages: self.messages.len(), tokens: self.tokens.len(), text_bytes: self.text.len() }
    }

    /// Returns the facts that an outline tells without those before it.
    ///
    /// # Errors
    /// It cannot be decoded.
    pub fn alone(bytes: &[u8]) -> Result<Outline, RecordError> {
        OutlineRecord::from_bytes(bytes)?.facts()
    }

    /// Returns the session without its content; none without a record.
    #[must_use]
    pub fn into_outline(self) -> Option<Outline> {
        self.outline
    }

    /// Returns the content.
    #[must_use]
    pub fn into_contents(self) -> Contents {
        let Self { messages, tokens, text, .. } = self;
        Contents { messages, text: text.into(), tokens: tokens.into() }
    }
}

#[cfg(test)]
mod tests;
