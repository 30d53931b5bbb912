//! Snapshots of sessions' KV caches, as the use cases see them: what the engine evicts is saved if the
//! session is still there, what a turn lacks is read back, and a session can be saved on request. A snapshot
//! is a cache: whatever goes wrong with one, the turn computes anew.

mod places;
mod restore;
mod save;

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};

use super::room::Room;
use super::sessions::TurnHold;
use crate::engine::{EngineHandle, KvCopy, KvOutbox};
use crate::error::Error;
use crate::ids::SessionId;
use crate::session::SessionBook;
use crate::store::{GivenUp, SavedSnapshot, SnapshotError, SnapshotStats as StoreStats, Snapshots as Store};

use places::Places;
pub(super) use restore::Lacking;
pub use save::SavedSession;

/// Evicted caches that may wait to be handed to the store; it takes them at once.
const EVICTED_MAX: usize = 64;

/// Time in which a disk that works writes an array: after twice that long nothing waits for it any more.
const HELD_LIMIT: Duration = Duration::from_secs(30);

/// Bytes of snapshots that are read at once; a larger one is read alone.
const READING_BYTES_MAX: u64 = 2 << 30;

/// The snapshots of the sessions, once there are any.
#[derive(Clone, Default)]
pub(super) struct Snapshots(Arc<OnceLock<Kept>>);

/// What there is once snapshots are kept.
struct Kept {
    store: Arc<Store>,
    sessions: Arc<SessionBook<TurnHold>>,
    evicted: Mutex<mpsc::Receiver<KvCopy>>,
    /// Saves that are not on disk yet, each closed by its end.
    waiting: Mutex<HashMap<SessionId, watch::Receiver<()>>>,
    reading: Room,
    /// Reads that did not end in time, as long as they go on.
    late: Arc<Mutex<Vec<Weak<()>>>>,
    saving: Arc<Places>,
    counts: Counts,
    bytes_max: u64,
}

/// Counts since the start.
#[derive(Debug, Default)]
struct Counts {
    saved: AtomicU64,
    failed: AtomicU64,
    restored: AtomicU64,
    restored_tokens: AtomicU64,
}

/// What snapshots take and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotStats {
    /// Whether they are kept at all.
    pub enabled: bool,
    /// Whether they can be written now.
    pub writable: bool,
    /// Number of sessions that have one.
    pub snapshots: u32,
    /// Bytes on disk.
    pub bytes: u64,
    /// Limit of these.
    pub bytes_max: u64,
    /// Bytes that wait to be written.
    pub waiting_bytes: u64,
    /// Snapshots that were written.
    pub saved_total: u64,
    /// Snapshots that could not be written.
    pub failed_total: u64,
    /// Snapshots from which a turn went on.
    pub restored_total: u64,
    /// Tokens that were read instead of computed.
    pub restored_tokens_total: u64,
}

impl Snapshots {
    /// Keeps snapshots in a store from now on. One owner may ask for `saves_max` at once.
    pub(super) async fn begin(
        &self,
        engine: &EngineHandle,
        sessions: &Arc<SessionBook<TurnHold>>,
        (store, bytes_max): (Store, u64),
        saves_max: u32,
    ) -> Result<(), Error> {
        let (copies, evicted) = mpsc::channel(EVICTED_MAX);
        let hurry = Arc::new(Notify::new());
        let outbox = KvOutbox { copies, hurry: Arc::clone(&hurry) };
        let kept = Kept {
            store: Arc::new(store),
            sessions: Arc::clone(sessions),
            evicted: Mutex::new(evicted),
            waiting: Mutex::default(),
            reading: Room::new(READING_BYTES_MAX),
            late: Arc::default(),
            saving: Arc::new(Places::new(saves_max)),
            counts: Counts::default(),
            bytes_max,
        };
        // Only the first is taken; a second would be closed at once.
        drop(self.0.set(kept));
        let snapshots = self.clone();
        tokio::spawn(async move { snapshots.save_evicted().await });
        let snapshots = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(HELD_LIMIT).await;
                snapshots.kept().into_iter().for_each(|kept| kept.store.look_after());
            }
        });
        let snapshots = self.clone();
        tokio::spawn(async move {
            loop {
                hurry.notified().await;
                snapshots.give_up();
            }
        });
        engine.save_evicted(outbox).await
    }

    fn kept(&self) -> Option<&Kept> {
        self.0.get()
    }

    /// Saves what the engine evicts, as long as it lives.
    async fn save_evicted(&self) {
        let Some(kept) = self.kept() else { return };
        let next = || {
            poll_fn(|context| {
                let mut evicted = kept.evicted();
                match evicted.poll_recv(context) {
                    // Under the lock: who finds nothing there finds it in the store.
                    Poll::Ready(Some(copy)) => {
                        self.keep(copy);
                        Poll::Ready(true)
                    }
                    Poll::Ready(None) => Poll::Ready(false),
                    Poll::Pending => Poll::Pending,
                }
            })
        };
        while next().await {}
    }

    /// Gives up what waits to be written: somebody needs its memory now.
    fn give_up(&self) {
        self.take_evicted();
        if let Some(kept) = self.kept() {
            kept.store.give_up_waiting();
        }
    }

    /// Takes what the engine has evicted so far.
    fn take_evicted(&self) {
        let Some(kept) = self.kept() else { return };
        let mut evicted = kept.evicted();
        while let Ok(copy) = evicted.try_recv() {
            self.keep(copy);
        }
    }

    /// Returns what a session's snapshot holds, as far as that is known without looking into it. It may
    /// block.
    pub(super) fn held(&self, session: SessionId) -> Option<SavedSnapshot> {
        self.kept()?.store.held(session)
    }

    /// Gives a fork, given its tokens, the snapshot of the session that it was made of.
    pub(super) fn fork(&self, from: SessionId, (to, tokens): (SessionId, Arc<[u32]>)) {
        self.take_evicted();
        if let Some(kept) = self.kept() {
            kept.store.fork(from, to, tokens);
        }
    }

    /// Frees bytes of the disk, which is full, for the sessions themselves; returns whether there may be any
    /// to free.
    pub(super) fn make_way(&self, bytes: u64) -> bool {
        self.kept().is_some_and(|kept| kept.store.make_way(bytes))
    }

    /// Removes the snapshot of a session that is gone.
    pub(super) fn forget(&self, session: SessionId) {
        if let Some(kept) = self.kept() {
            kept.store.forget(session);
        }
    }

    /// Returns what they take and did; to others than the owner of the daemon only whether they are kept.
    pub(super) fn stats(&self, is_owner: bool) -> SnapshotStats {
        let Some(Kept { store, counts, bytes_max, .. }) = self.kept() else {
            return SnapshotStats::default();
        };
        let StoreStats { enabled, bytes, count, queued_bytes, last_error: _ } = store.stats();
        if !is_owner {
            return SnapshotStats { enabled: true, writable: enabled, ..SnapshotStats::default() };
        }
        let Counts { saved, failed, restored, restored_tokens } = counts;
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        SnapshotStats {
            enabled: true,
            writable: enabled,
            snapshots: count,
            bytes,
            bytes_max: *bytes_max,
            waiting_bytes: queued_bytes,
            saved_total: read(saved),
            failed_total: read(failed),
            restored_total: read(restored),
            restored_tokens_total: read(restored_tokens),
        }
    }

    /// Writes what waits, as far as `limit` allows. It blocks.
    pub(super) fn close(&self, limit: Duration) {
        if let Some(kept) = self.kept() {
            kept.store.close(limit);
        }
    }
}

impl Kept {
    fn evicted(&self) -> MutexGuard<'_, mpsc::Receiver<KvCopy>> {
        self.evicted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<SessionId, watch::Receiver<()>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, outcome: &Result<SavedSnapshot, SnapshotError>) {
        let count = match outcome {
            Ok(_) => &self.counts.saved,
            Err(SnapshotError::GivenUp(GivenUp::Full | GivenUp::Held)) => &self.counts.failed,
            // Not a failure: somebody else's is written, or the session is gone.
            Err(SnapshotError::GivenUp(_)) => return,
            Err(_) => &self.counts.failed,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}
