//! Parked caches that leave the engine as plain data, to be written to disk, and come back.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Notify, mpsc};

use crate::backend::{BuildKv, KvLayout, KvSegment};
use crate::cache::{Salt, Transcript};
use crate::ids::{ModelName, Principal, SessionKey};
use crate::residency::ModelLease;

use super::CachedAsk;

/// What the caches of a resident model are.
#[derive(Clone, Debug)]
pub struct KvFacts {
    /// The model.
    pub model: ModelName,
    /// Identity of its weights.
    pub revision: String,
    /// Everything else that its caches were computed with, as text.
    pub computes: String,
    /// The arrays of its caches.
    pub layout: Arc<KvLayout>,
    /// Makes them, on any thread.
    pub builder: Arc<dyn BuildKv>,
}

/// A question whether there is room for what a snapshot has.
#[derive(Clone, Debug)]
pub struct RoomAsk {
    /// The tokens that are wanted, and whose they are.
    pub of: CachedAsk,
    /// Number of the first of them that the snapshot has.
    pub saved: u32,
    /// Bytes of it.
    pub bytes: u64,
}

/// Room for what a snapshot has and no cache.
#[derive(Debug)]
pub struct KvRoom {
    /// Number of the first tokens that are cached.
    pub cached: u32,
    /// What the model's caches are.
    pub facts: KvFacts,
    /// Holds the room until the cache is parked.
    pub charge: KvCharge,
}

/// A wish to save what is cached of a session.
#[derive(Clone, Debug)]
pub struct ExportAsk {
    /// Its tokens, and whose they are.
    pub of: CachedAsk,
    /// Whether it is saved only if computing it again would take longer.
    pub if_worth: bool,
}

/// A parked cache on its way to disk. Its memory is charged as long as this is held.
#[derive(Debug)]
pub struct KvCopy {
    /// The session that it was parked for; none where another's has the same tokens.
    pub session: Option<SessionKey>,
    /// Whose it is.
    pub owner: Principal,
    /// The salt that it has.
    pub salt: Salt,
    /// What it was computed with.
    pub facts: KvFacts,
    /// Its content, from the first token on.
    pub segments: Vec<KvSegment>,
    pub(crate) transcript: Transcript,
    /// Taken off the ledger when this is dropped.
    pub(crate) charge: KvCharge,
}

impl KvCopy {
    /// Returns its tokens.
    #[must_use]
    pub fn tokens(&self) -> Arc<[u32]> {
        self.transcript.tokens(0..self.transcript.len()).collect()
    }

    /// Returns the segments, and the charge to hold as long as they are.
    #[must_use]
    pub fn into_parts(self) -> (Vec<KvSegment>, KvCharge) {
        (self.segments, self.charge)
    }
}

/// Where caches of sessions go before they are evicted.
#[derive(Clone, Debug)]
pub struct KvOutbox {
    /// Takes them; what it has no room for is lost.
    pub copies: mpsc::Sender<KvCopy>,
    /// Told when the memory of those that wait is needed: they are to be given up.
    pub hurry: Arc<Notify>,
}

/// Bytes that the ledger counts until this is dropped.
#[derive(Debug)]
pub struct KvCharge {
    bytes: u64,
    released: Arc<AtomicU64>,
}

impl KvCharge {
    /// Returns a charge; its bytes are added to `released` when it is dropped.
    pub(crate) fn new(bytes: u64, released: &Arc<AtomicU64>) -> Self {
        Self { bytes, released: Arc::clone(released) }
    }

    /// Gives the bytes back at once.
    pub(crate) fn release(&mut self) {
        self.released.fetch_add(std::mem::take(&mut self.bytes), Ordering::Relaxed);
    }
}

impl Drop for KvCharge {
    fn drop(&mut self) {
        self.release();
    }
}

/// A cache that was read from disk, to be parked.
#[derive(Debug)]
pub struct AdoptWork {
    /// The model, from before it was asked what its caches are.
    pub model: ModelLease,
    /// Whose it is.
    pub owner: Principal,
    /// The salt that it has.
    pub salt: Salt,
    /// The session that it goes with.
    pub session: SessionKey,
    /// Whether that is pinned.
    pub pinned: bool,
    /// The tokens of the cache, all of them.
    pub tokens: Arc<[u32]>,
    /// Those that were read; parked caches have the ones before.
    pub read: Range<u32>,
    /// The content of those.
    pub segments: Vec<KvSegment>,
    /// The room that it was read into.
    pub charge: KvCharge,
}
