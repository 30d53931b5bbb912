//! A session as records of bounded size, for a file that leaves the daemon, and back. Such records are
//! nobody's: they have neither an owner nor a number. Who made them is not known, so they are weighed before
//! they are decoded: what an empty message or a value of one byte becomes in memory is counted first.

use std::sync::Arc;

use super::wire::{ContentRecord, OutlineRecord};
use super::{Keeps, Record, RecordError, Replay, values};
use crate::ids::SessionId;
use crate::session::bytes::{Charged, PART_BYTES, TURN_BYTES, messages_bytes, tokens_bytes};
use crate::session::message::Message;
use crate::session::snapshot::{Contents, Outline, Sizes};

/// Content of one record, unless a single message has more.
const PIECE_BYTES: usize = 256 << 10;

/// The records of a session at one moment. Its content is shared; one record of it is made at a time.
#[derive(Debug)]
pub struct Pieces {
    outline: Outline,
    contents: Contents,
    done: Sizes,
    has_ended: bool,
}

impl Pieces {
    /// Returns the records of a session.
    #[must_use]
    pub fn new(outline: &Outline, contents: Contents) -> Self {
        let mut outline = outline.clone();
        (outline.id, outline.content_number) = (SessionId::default(), 0);
        outline.key.owner = "".into();
        outline.turn_charges.iter_mut().for_each(|charged| charged.number = 0);
        Self { outline, contents, done: Sizes::default(), has_ended: false }
    }

    /// Returns where the next record ends.
    fn next_end(&self) -> Sizes {
        let Contents { messages, text, tokens } = &self.contents;
        let mut end = self.done;
        let mut room = PIECE_BYTES;
        while let Some(message) = messages.get(end.messages) {
            let bytes = messages_bytes([&**message]);
            if bytes > room && end.messages > self.done.messages {
                return end;
            }
            end.messages += 1;
            room = room.saturating_sub(bytes);
        }
        let more = (room / size_of::<u32>()).min(tokens.len() - end.tokens);
        end.tokens += more;
        room -= tokens_bytes(more);
        end.text_bytes = text.floor_char_boundary(end.text_bytes + room.min(text.len() - end.text_bytes));
        end
    }
}

impl Iterator for Pieces {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        if self.has_ended {
            return None;
        }
        let (start, end) = (self.done, self.next_end());
        let Contents { messages, text, tokens } = &self.contents;
        let content = ContentRecord::new(
            &messages[start.messages..end.messages],
            &tokens[start.tokens..end.tokens],
            &text[start.text_bytes..end.text_bytes],
        );
        self.done = end;
        self.has_ended = end == self.contents.sizes();
        let keeps = Keeps { turns: 0, content: start };
        let outline = if self.has_ended {
            OutlineRecord::new(&self.outline, keeps)
        } else {
            let (turns, turn_charges) = (Vec::new(), Vec::new());
            OutlineRecord::new(&Outline { sizes: end, turns, turn_charges, ..self.outline.clone() }, keeps)
        };
        Some(Record { outline: outline.to_bytes(), content: content.to_bytes() })
    }
}

/// Why records make no session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PieceError {
    /// They are not a session's.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The session would have more bytes than it may.
    #[error("the session has more than {limit_bytes} bytes")]
    TooLarge {
        /// The limit.
        limit_bytes: usize,
    },
}

/// A session in the making from records that somebody sent.
#[derive(Debug, Default)]
pub struct Joined {
    replay: Replay,
    sizes: Sizes,
    /// Bytes of the content so far, as sessions are charged.
    bytes: usize,
}

impl Joined {
    /// Adds a record, unless the session would have more than `limit_bytes`.
    ///
    /// # Errors
    /// It does not follow from those before, or the session is too large.
    pub fn add(&mut self, outline: &[u8], content: &[u8], limit_bytes: usize) -> Result<(), PieceError> {
        let weight = outline_weight(outline)?.saturating_add(content_weight(content)?);
        if self.bytes.saturating_add(weight) > limit_bytes.saturating_mul(2) {
            // What is weighed is hardly more than what is charged.
            return Err(PieceError::TooLarge { limit_bytes });
        }
        let keeps = self.replay.outline(outline)?;
        if keeps.content != self.sizes || keeps.turns != 0 {
            return Err(RecordError::Contradiction("it does not add to what was there").into());
        }
        self.replay.content(keeps, content)?;
        let added = &self.replay.messages[self.sizes.messages..];
        self.bytes += messages_bytes(added.iter().map(|message| &**message));
        let sizes = self.replay.sizes();
        self.bytes +=
            tokens_bytes(sizes.tokens - self.sizes.tokens) + sizes.text_bytes - self.sizes.text_bytes;
        self.sizes = sizes;
        if self.bytes > limit_bytes { Err(PieceError::TooLarge { limit_bytes }) } else { Ok(()) }
    }

    /// Returns the bytes of the content so far.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the whole session. What its turns are charged with is counted anew, and shared with no other.
    ///
    /// # Errors
    /// The records are not all of a session.
    pub fn into_session(mut self) -> Result<(Outline, Contents), RecordError> {
        let Some(outline) = self.replay.outline.take() else {
            return Err(RecordError::Contradiction("there is no session"));
        };
        let contents = self.replay.into_contents();
        let turn_charges = turn_charges(&outline, &contents.messages)?;
        Ok((Outline { turn_charges, content_number: 0, ..outline }, contents))
    }
}

/// Returns what each turn is charged with. Turns follow one another and hold all of the content.
fn turn_charges(outline: &Outline, messages: &[Arc<Message>]) -> Result<Vec<Charged>, RecordError> {
    let (mut from, mut tokens, mut charges) = (0, 0, Vec::with_capacity(outline.turns.len()));
    for turn in &outline.turns {
        let own = messages.get(from..turn.message_count).filter(|_| turn.token_count >= tokens);
        let own = own.ok_or(RecordError::Contradiction("a turn ends before the one before it"))?;
        let bytes = TURN_BYTES + messages_bytes(own.iter().map(|message| &**message));
        charges.push(Charged { bytes, number: 0 });
        (from, tokens) = (turn.message_count, turn.token_count);
    }
    let is_all = from == messages.len() && tokens == outline.sizes.tokens;
    is_all.then_some(charges).ok_or(RecordError::Contradiction("some content is of no turn"))
}

/// A length-delimited field's type, in the lowest three bits of its key.
const DELIMITED: u64 = 2;

/// Fields of a content record and of what is in it, by their path.
const MESSAGES: u64 = 1;
const TOKENS: u64 = 2;
const PARTS: u64 = 3;
const CALL: u64 = 2;
const ARGUMENTS: u64 = 3;

/// Returns about what an outline takes in memory.
fn outline_weight(bytes: &[u8]) -> Result<usize, RecordError> {
    let mut weight = bytes.len();
    fields(bytes, |_, content| {
        // A turn, or a label.
        weight += content.map_or(0, |_| PART_BYTES);
        Ok(())
    })?;
    Ok(weight)
}

/// Returns about what a content is charged with.
fn content_weight(bytes: &[u8]) -> Result<usize, RecordError> {
    let mut weight = 0;
    fields(bytes, |field, content| {
        weight += match (field, content) {
            (MESSAGES, Some(message)) => message_weight(message)?,
            // Packed: each ends with a byte below 128.
            (TOKENS, Some(packed)) => tokens_bytes(packed.iter().filter(|byte| **byte < 0x80).count()),
            (_, Some(text)) => text.len(),
            (_, None) => size_of::<u32>(),
        };
        Ok(())
    })?;
    Ok(weight)
}

/// Returns about what a message is charged with.
fn message_weight(bytes: &[u8]) -> Result<usize, RecordError> {
    let mut weight = PART_BYTES + bytes.len();
    fields(bytes, |field, content| {
        let Some(part) = content.filter(|_| field == PARTS) else { return Ok(()) };
        weight += PART_BYTES;
        fields(part, |field, content| {
            let Some(call) = content.filter(|_| field == CALL) else { return Ok(()) };
            fields(call, |field, content| {
                let Some(arguments) = content.filter(|_| field == ARGUMENTS) else { return Ok(()) };
                let charge = values::charge(arguments)
                    .ok_or_else(|| RecordError::Malformed("the arguments of a tool call".into()))?;
                weight = weight - arguments.len() + charge;
                Ok(())
            })
        })
    })?;
    Ok(weight)
}

/// Calls `each` with the number of every field of a message, and its content if it has a length.
fn fields<'a>(
    mut bytes: &'a [u8],
    mut each: impl FnMut(u64, Option<&'a [u8]>) -> Result<(), RecordError>,
) -> Result<(), RecordError> {
    let malformed = || RecordError::Malformed("a field ends too early".into());
    while !bytes.is_empty() {
        let key = varint(&mut bytes).ok_or_else(malformed)?;
        let length = match key & 7 {
            0 => varint(&mut bytes).map(|_| 0),
            1 => Some(8),
            DELIMITED => varint(&mut bytes).and_then(|length| usize::try_from(length).ok()),
            5 => Some(4),
            // Groups are not in the format.
            _ => None,
        };
        let (content, rest) =
            length.and_then(|length| bytes.split_at_checked(length)).ok_or_else(malformed)?;
        bytes = rest;
        each(key >> 3, (key & 7 == DELIMITED).then_some(content))?;
    }
    Ok(())
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
#[path = "pieces_tests.rs"]
mod tests;
