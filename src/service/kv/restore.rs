//! Reading back: before a session's turn is handed to the engine, what its caches lack and a snapshot has is
//! read, beside other turns' steps, and parked. The turn goes on as usual then, and finds it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{READING_UNIT, READING_UNITS, Snapshots};
use crate::count::count;
use crate::engine::{AdoptWork, CacheUse, CachedAsk, EngineHandle, KvFacts, KvRoom, RoomAsk};
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

impl Snapshots {
    /// Parks what the caches lack of a turn's prompt and the session's snapshot has. Whatever fails, the turn
    /// computes it.
    pub(in crate::service) async fn restore(&self, engine: &EngineHandle, lacking: Lacking<'_>) {
        self.take_evicted();
        let CacheUse::Shared(salt) = lacking.cache else { return };
        let Some(kept) = self.kept() else { return };
        let store = Arc::clone(&kept.store);
        let (id, owner) = (lacking.id, lacking.key.owner.clone());
        // A disk may hang, and others' reads take long: the turn waits for neither.
        let held = tokio::time::timeout(QUEUE_LIMIT, blocking(move || Ok(store.held(id))));
        let Ok(Ok(Some(SavedSnapshot { tokens: saved, bytes }))) = held.await else { return };
        // At least one token of a prompt runs.
        let saved = saved.min(count(lacking.tokens.len()).saturating_sub(1));
        let units = u32::try_from(bytes.div_ceil(READING_UNIT)).unwrap_or(READING_UNITS);
        let reading = Arc::clone(&kept.reading).acquire_many_owned(units.clamp(1, READING_UNITS));
        let Ok(Ok(reading)) = tokio::time::timeout(QUEUE_LIMIT, reading).await else { return };
        let (model, tokens) = (lacking.lease.model().clone(), Arc::clone(lacking.tokens));
        let of = CachedAsk { model, owner: owner.clone(), salt, tokens: Arc::clone(&tokens) };
        // The ledger has room for it before it is read.
        let Ok(Some(room)) = engine.room(RoomAsk { of, saved, bytes }).await else { return };
        let store = Arc::clone(&kept.store);
        let read = blocking(move || {
            let KvRoom { cached, facts, charge } = room;
            let KvFacts { revision, computes, layout, builder, model: _ } = &facts;
            let origin = KvOrigin { revision, computes, layout };
            let key = KvKey { fingerprint: Fingerprint::of(&origin), owner, salt: salt.0 };
            let wanted = Wanted { session: id, key: &key, layout, tokens: &tokens, held: cached };
            // Both are held until it is read, also if the caller leaves, and until it is parked.
            Ok((store.load(&wanted, &**builder), charge, reading))
        });
        let Ok(Ok((loaded, charge, _reading))) = tokio::time::timeout(READ_LIMIT, read).await else {
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
