//! Parked caches on their way to disk: handed to whoever writes them, and charged to the ledger until they
//! are written. What is given back meanwhile is taken off only between two ticks or commands, so that the
//! ledger does not change under a decision.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc::OwnedPermit;

use super::api::{KvCharge, KvCopy, KvOutbox};

/// What was handed over and is not written yet.
#[derive(Debug, Default)]
pub(crate) struct Saving {
    outbox: Option<KvOutbox>,
    charged_bytes: u64,
    released: Arc<AtomicU64>,
}

impl Saving {
    /// Hands caches that are evicted to `outbox` from now on.
    pub(super) fn begin(&mut self, outbox: KvOutbox) {
        self.outbox = Some(outbox);
    }

    /// Takes off the ledger what has been written or given up since.
    pub(super) fn settle(&mut self) {
        self.charged_bytes -= self.released.swap(0, Ordering::Relaxed);
    }

    /// Returns the bytes that are charged.
    pub(super) fn charged_bytes(&self) -> u64 {
        self.charged_bytes
    }

    /// Charges bytes until the charge is dropped.
    pub(super) fn charge(&mut self, bytes: u64) -> KvCharge {
        self.charged_bytes += bytes;
        KvCharge::new(bytes, &self.released)
    }

    /// Returns a place for one cache, if somebody takes them and has room.
    pub(super) fn place(&self) -> Option<OwnedPermit<KvCopy>> {
        self.outbox.as_ref()?.copies.clone().try_reserve_owned().ok()
    }

    /// Asks for the memory of what waits to be written: somebody else needs it now.
    pub(super) fn hurry(&self) {
        if self.charged_bytes > 0
            && let Some(outbox) = &self.outbox
        {
            outbox.hurry.notify_one();
        }
    }
}
