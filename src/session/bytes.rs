//! The bytes that an owner's sessions hold. Each part of a session is charged when it comes to be, and the
//! charge is shared by those who share the part: what forks have in common counts once, until the last of
//! them is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::message::Message;

/// Bytes of a session without content.
pub(super) const SESSION_BYTES: usize = 512;

/// Bytes of a turn besides its messages.
pub(super) const TURN_BYTES: usize = 64;

/// Bytes of a message, of a part of one, or of a label, besides what it holds.
pub(super) const PART_BYTES: usize = 64;

/// The bytes of one owner.
#[derive(Clone, Debug, Default)]
pub(super) struct Held(Arc<AtomicU64>);

/// Some of them, until this is dropped.
#[derive(Debug)]
pub(super) struct Charge {
    held: Held,
    bytes: u64,
}

impl Held {
    /// Returns the bytes that are charged.
    pub(super) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Charges bytes.
    pub(super) fn charge(&self, bytes: usize) -> Charge {
        let bytes = bytes as u64;
        self.0.fetch_add(bytes, Ordering::Relaxed);
        Charge { held: self.clone(), bytes }
    }
}

impl PartialEq for Held {
    /// Holds always: a session is the same, whatever its owner holds besides.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Charge {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the bytes as they were given.
    pub(super) fn charged(&self) -> usize {
        usize::try_from(self.bytes).unwrap_or(usize::MAX)
    }
}

impl PartialEq for Charge {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.held.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Returns the bytes of messages as a session keeps them, with every field.
#[must_use]
pub fn messages_bytes<'a>(messages: impl IntoIterator<Item = &'a Message>) -> usize {
    messages.into_iter().map(|message| message.bytes() + message.part_count() * PART_BYTES).sum()
}

/// Returns the bytes of tokens.
#[must_use]
pub fn tokens_bytes(tokens: usize) -> usize {
    tokens * size_of::<u32>()
}
