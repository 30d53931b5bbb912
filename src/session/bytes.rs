//! The bytes that an owner's sessions hold. Each part of a session is charged when it comes to be, and the
//! charge is shared by those who share the part: what forks have in common counts once, until the last of
//! them is gone. A charge has a number, by which stored forks share it again after a restart.

use std::collections::BTreeMap;
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
pub(super) struct Held(Arc<Ledger>);

#[derive(Debug, Default)]
struct Ledger {
    bytes: AtomicU64,
    /// The number of the last charge.
    numbered: AtomicU64,
}

/// Some of them, until this is dropped.
#[derive(Debug)]
pub(super) struct Charge {
    held: Held,
    bytes: u64,
    number: u64,
}

/// Bytes that are charged, and the number of the charge among its owner's: forks have the same, and count
/// once. Files of older daemons have no number, 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Charged {
    /// The bytes.
    pub bytes: usize,
    /// The number.
    pub number: u64,
}

impl Held {
    /// Returns the bytes that are charged.
    pub(super) fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// Returns whether something is charged, or will be.
    pub(super) fn is_used(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Charges bytes.
    pub(super) fn charge(&self, bytes: usize) -> Charge {
        let number = self.0.numbered.fetch_add(1, Ordering::Relaxed) + 1;
        self.charge_as(Charged { bytes, number })
    }

    fn charge_as(&self, charged: Charged) -> Charge {
        let Charged { bytes, number } = charged;
        let bytes = bytes as u64;
        self.0.bytes.fetch_add(bytes, Ordering::Relaxed);
        Charge { held: self.clone(), bytes, number }
    }

    /// Gives no charge a number up to this one.
    pub(super) fn number_above(&self, number: u64) {
        self.0.numbered.fetch_max(number, Ordering::Relaxed);
    }
}

/// The charges of an owner's stored sessions: those with the same number are one.
#[derive(Debug, Default)]
pub(super) struct Charges(BTreeMap<Charged, Arc<Charge>>);

impl Charges {
    /// Charges what was charged when it was stored, once.
    pub(super) fn again(&mut self, held: &Held, charged: Charged) -> Arc<Charge> {
        if charged.number == 0 {
            // The file is of a daemon that numbered nothing.
            return Arc::new(held.charge(charged.bytes));
        }
        let charge = self.0.entry(charged).or_insert_with(|| Arc::new(held.charge_as(charged)));
        Arc::clone(charge)
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

    /// Returns the bytes as they were given, and its number.
    pub(super) fn charged(&self) -> Charged {
        Charged { bytes: usize::try_from(self.bytes).unwrap_or(usize::MAX), number: self.number }
    }

    /// Charges other bytes instead.
    pub(super) fn change(&mut self, bytes: u64) {
        self.held.0.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.held.0.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = bytes;
    }
}

impl PartialEq for Charge {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.held.0.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
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
