//! Reading back: before a session's turn is handed to the engine, what its caches lack and a snapshot has is
//! read, beside other turns' steps, and parked. The turn goes on as usual then, and finds it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tracing::Instrument as _;

use super::Snapshots;
use crate::count::count;
use crate::engine::{AdoptWork, CacheUse, CachedAsk, EngineHandle, KvCharge, KvFacts, KvRoom, RoomAsk};
use crate::error::Error;
use crate::ids::{SessionId, SessionKey};
use crate::residency::ModelLease;
use crate::service::blocking;
use crate::store::{Fingerprint, KvKey, KvOrigin, Loaded, SavedSnapshot, SnapshotError, Wanted};

/// Longest wait until a snapshot may be read: others are read first, or the disk hangs.
const QUEUE_LIMIT: Duration = Duration::from_secs(5);

/// Time to read a snapshot; after it the turn computes.
const READ_LIMIT: Duration = Duration::from_secs(30);

/// A turn that may lack cached KV which its session's snapshot has.
#[derive(Debug)]
pub(in crate::service) struct Lacking<'a> {
    /// The session.
    pub(in crate::service) key: SessionKey,
    /// Its number.
    pub(in crate::service) id: SessionId,
    /// Whether it is pinned.
    pub(in crate::service) pinned: bool,
    /// Which caches the turn may use.
    pub(in crate::service) cache: CacheUse,
    /// The resident model.
    pub(in crate::service) lease: &'a ModelLease,
    /// All tokens of the turn's prompt.
    pub(in crate::service) tokens: &'a Arc<[u32]>,
}

/// Reads beside everything else, also if the caller leaves. What does not come within `limit` is told to
/// stop, and gives its charge back at once: a disk that does not answer holds no memory that others wait for,
/// but for what was read by then. It is among the `late` ones until it ends.
async fn in_time<T: Send + 'static>(
    limit: Duration,
    charge: KvCharge,
    read: impl FnOnce(&AtomicBool) -> T + Send + 'static,
    late: &Arc<Mutex<Vec<Weak<()>>>>,
) -> Option<(T, KvCharge)> {
    let late = Arc::clone(late);
    let reading = async move {
        let (stop, runs) = (Arc::new(AtomicBool::new(false)), Arc::new(()));
        let (told, is_running) = (Arc::clone(&stop), Arc::downgrade(&runs));
        let read = blocking(move || {
            let _runs = runs;
            Ok(read(&told))
        });
        let read = tokio::time::timeout(limit, read).await;
        if read.is_err() {
            stop.store(true, Ordering::Relaxed);
            lock(&late).push(is_running);
        }
        read.ok()?.ok().map(|read| (read, charge))
    };
    tokio::spawn(reading.in_current_span()).await.ok().flatten()
}

/// Returns whether a read that was not in time still goes on.
fn is_late(late: &Mutex<Vec<Weak<()>>>) -> bool {
    let mut late = lock(late);
    late.retain(|read| read.strong_count() > 0);
    !late.is_empty()
}

fn lock(late: &Mutex<Vec<Weak<()>>>) -> MutexGuard<'_, Vec<Weak<()>>> {
    late.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Snapshots {
    /// Parks what the caches lack of a turn's prompt and the session's snapshot has. Whatever fails, the turn
    /// computes it.
    pub(in crate::service) async fn restore(&self, engine: &EngineHandle, lacking: Lacking<'_>) {
        self.take_evicted();
        let CacheUse::Shared(salt) = lacking.cache else { return };
        let Some(kept) = self.kept() else { return };
        // While a disk does not answer, no turn waits for it, nor takes a thread.
        if is_late(&kept.late) {
            return;
        }
        let store = Arc::clone(&kept.store);
        let (id, owner) = (lacking.id, lacking.key.owner.clone());
        // A disk may hang, and others' reads take long: the turn waits for neither.
        let held = tokio::time::timeout(QUEUE_LIMIT, blocking(move || Ok(store.held(id))));
        let Ok(Ok(Some(SavedSnapshot { tokens: saved, bytes }))) = held.await else { return };
        // At least one token of a prompt runs.
        let saved = saved.min(count(lacking.tokens.len()).saturating_sub(1));
        let Ok(reading) = tokio::time::timeout(QUEUE_LIMIT, kept.reading.take(bytes)).await else { return };
        let (model, tokens) = (lacking.lease.model().clone(), Arc::clone(lacking.tokens));
        let of = CachedAsk { model, owner: owner.clone(), salt, tokens: Arc::clone(&tokens) };
        // The ledger has room for it before it is read.
        let Ok(Some(room)) = engine.room(RoomAsk { of, saved, bytes }).await else { return };
        let store = Arc::clone(&kept.store);
        let KvRoom { cached, facts, charge } = room;
        let read = move |stop: &AtomicBool| {
            let KvFacts { revision, computes, layout, builder, model: _ } = &facts;
            let origin = KvOrigin { revision, computes, layout };
            let key = KvKey { fingerprint: Fingerprint::of(&origin), owner, salt: salt.0 };
            let wanted = Wanted { session: id, key: &key, layout, tokens: &tokens, held: cached, stop };
            // The room is held until it is parked, and by a read that does not end.
            (store.load(&wanted, &**builder), reading)
        };
        let Some(((loaded, _reading), charge)) = in_time(READ_LIMIT, charge, read, &kept.late).await else {
            tracing::warn!(session = %lacking.key, "a snapshot is not read in time; the turn computes");
            return;
        };
        match loaded {
            Ok(Loaded { fault, tokens: read, segments }) => {
                if let Some(fault) = fault {
                    tracing::warn!(session = %lacking.key, %fault, "a part of a snapshot is computed anew");
                }
                let tokens: Arc<[u32]> = lacking.tokens[..read.end as usize].into();
                let Lacking { key: session, pinned, lease, .. } = lacking;
                let (owner, model, name) = (session.owner.clone(), lease.clone(), session.clone());
                let read_tokens = read.end - read.start;
                let work = AdoptWork { model, owner, salt, session, pinned, tokens, read, segments, charge };
                match engine.adopt(work).await {
                    Ok(bytes) => {
                        kept.counts.restored.fetch_add(1, Ordering::Relaxed);
                        kept.counts.restored_tokens.fetch_add(read_tokens.into(), Ordering::Relaxed);
                        tracing::debug!(session = %name, tokens = read_tokens, bytes, "restored");
                    }
                    Err(error) => {
                        let cause = if let Error::Internal(text) = &error { text } else { "" };
                        tracing::info!(session = %name, %error, cause, "a snapshot was not taken over");
                    }
                }
            }
            Err(error @ SnapshotError::Damaged(_)) => {
                tracing::warn!(session = %lacking.key, %error, "the KV cache is computed anew");
                kept.store.forget(id);
            }
            Err(error) => tracing::info!(session = %lacking.key, %error, "the KV cache is computed anew"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_read_that_does_not_end_gives_its_memory_back_and_stops_once_it_can() {
        let released = Arc::new(AtomicU64::new(0));
        let charge = || KvCharge::new(7, &released);
        let (sender, told) = mpsc::sync_channel(1);
        let (go, gate) = mpsc::sync_channel::<()>(0);
        let hangs = move |stop: &AtomicBool| {
            assert!(gate.recv().is_err());
            sender.send(stop.load(Ordering::Relaxed)).unwrap();
        };
        let late = Arc::default();
        assert!(in_time(Duration::from_millis(1), charge(), hangs, &late).await.is_none());
        assert_eq!((released.load(Ordering::Relaxed), is_late(&late)), (7, true));
        drop(go);
        assert!(told.recv().unwrap(), "it is told to stop");
        while is_late(&late) {
            tokio::task::yield_now().await;
        }
        let (read, held) = in_time(Duration::from_secs(60), charge(), |_| 5, &late).await.unwrap();
        assert_eq!((read, released.load(Ordering::Relaxed)), (5, 7));
        drop(held);
        assert_eq!(released.load(Ordering::Relaxed), 14);
    }
}
