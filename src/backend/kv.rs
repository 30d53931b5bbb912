//! Places of KV caches, as engine and device name them: slots in slabs, parked caches, and the checkpoints of
//! recurrent states. Engine and device drop the same checkpoint when a slot has too many, by
//! [`add_checkpoint`].

use crate::error::Error;

/// A place in a KV slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId {
    /// Number of the slab, given by the engine.
    pub slab: u32,
    /// Index of the slot in its slab.
    pub slot: u32,
}

/// A parked KV cache: what a sequence that no longer runs left behind, at its exact length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParkedId(pub u64);

/// The beginning of a parked cache, which another one shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// The cache.
    pub id: ParkedId,
    /// Number of its first tokens; a segment ends there.
    pub tokens: u32,
}

/// What is to be parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parking {
    /// Number of the cache, given by the engine.
    pub id: ParkedId,
    /// Where it is.
    pub slot: SlotId,
    /// Number of its tokens: all that the slot has.
    pub tokens: u32,
    /// What it shares with a parked cache.
    pub base: Option<Base>,
}

impl Parking {
    /// Returns the number of tokens that it shares.
    #[must_use]
    pub fn shared(&self) -> u32 {
        self.base.map_or(0, |base| base.tokens)
    }
}

/// What is to be restored, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restoring {
    /// The parked cache.
    pub id: ParkedId,
    /// Number of its first tokens.
    pub tokens: u32,
    /// Where to.
    pub slot: SlotId,
    /// Number of its first tokens that the slot has already.
    pub held: u32,
    /// Number of all tokens that the slot has; those beyond `tokens` are overwritten with zeros.
    pub used: u32,
}

/// Why a slot was not cut back.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TruncateError {
    /// The model has recurrent states, and none were saved at this length. The slot is as it was.
    #[error("no checkpoint at {tokens} tokens")]
    NoCheckpoint {
        /// The length that was asked for.
        tokens: u32,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] Error),
}

/// Most checkpoints of a slot, besides the one at its end.
pub const CHECKPOINTS_MAX: usize = 4;

/// Appends a checkpoint. When the slot has [`CHECKPOINTS_MAX`], the second is dropped: the first stands
/// behind the tokens that all turns of a conversation begin with.
pub fn add_checkpoint<C>(checkpoints: &mut Vec<C>, checkpoint: C) {
    if checkpoints.len() == CHECKPOINTS_MAX {
        checkpoints.remove(1);
    }
    checkpoints.push(checkpoint);
}
