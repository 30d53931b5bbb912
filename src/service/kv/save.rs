//! Saving: what is evicted, what a caller asks for, and at the end of the daemon what is worth it.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::{Kept, Snapshots};
use crate::count::common_start;
use crate::engine::{CachedAsk, ExportAsk, KvCharge, KvCopy, KvFacts, KvLayout, KvSegment, Salt};
use crate::error::Error;
use crate::ids::{ModelName, SessionId, SessionKey, SessionName};
use crate::service::Service;
use crate::service::cache::hash;
use crate::service::caller::Caller;
use crate::service::fields::session_name;
use crate::session::SessionView;
use crate::store::{Fingerprint, GivenUp, KvKey, KvOrigin, NewSnapshot, SavedSnapshot, SnapshotError};

/// Key of the configuration without which there are no snapshots.
const KEY: &str = "snapshots";

/// Fewest tokens of another session for which it gets a snapshot of what is evicted: fewer are soon
/// computed.
const SHARED_TOKENS_MIN: usize = 64;

/// Most other sessions that get one, those used last.
const SHARING_MAX: usize = 8;

/// When to try again to write to a disk that failed: the store does not sooner.
pub(in crate::service) const DISK_RETRY: Duration = Duration::from_secs(10);

/// A session whose KV is on disk.
#[derive(Clone, Debug)]
pub struct SavedSession {
    /// The session.
    pub view: SessionView,
    /// Number of its tokens whose KV is on disk.
    pub tokens: u32,
    /// Bytes of that, those included that other sessions share.
    pub bytes: u64,
}

type Outcome = Result<SavedSnapshot, SnapshotError>;

/// What a save comes to of which nobody says anything any more.
const ENDED: Outcome = Err(SnapshotError::GivenUp(GivenUp::Ended));

impl Snapshots {
    /// Saves an evicted cache if it is of use to its session.
    pub(super) fn keep(&self, copy: KvCopy) {
        let Some(kept) = self.kept() else { return };
        let Some(key) = &copy.session else { return };
        let Ok(view) = kept.sessions.read(key, |session| Ok(session.view())) else { return };
        let parcel = Parcel::new(copy);
        let useful = parcel.of(&view).0.len();
        if useful == 0 || parcel.held(kept, &view) > useful {
            return;
        }
        // Its own session first: there may not be room for all of them.
        let mut others = kept.sessions.in_memory_of(&view.key.owner);
        others.sort_by_key(|other| Reverse(other.used));
        let shares = |other: &SessionView| parcel.is_for(kept, &view, other);
        let others: Vec<_> = others.into_iter().filter(shares).take(SHARING_MAX).collect();
        for view in std::iter::once(view).chain(others) {
            if let Err(error) = self.write(&view, &parcel) {
                tracing::debug!(session = %view.key, %error, "an evicted KV cache is not saved");
            }
        }
    }

    /// Hands a cache to the store; the receiver tells when it is on disk.
    fn write(
        &self,
        view: &SessionView,
        parcel: &Parcel,
    ) -> Result<oneshot::Receiver<Outcome>, SnapshotError> {
        let Some(kept) = self.kept() else { return Err(SnapshotError::Missing) };
        let (session, charge) = (view.id, Arc::clone(&parcel.charge));
        // Whole segments of the session's own tokens, and no others: they go with it.
        let (tokens, segments) = parcel.of(view);
        if segments.is_empty() {
            return Err(SnapshotError::Missing);
        }
        let (key, layout) = (parcel.key.clone(), Arc::clone(&parcel.layout));
        let snapshot = NewSnapshot { session, key, layout, tokens, segments, used: view.used };
        let saving = kept.store.save(snapshot).inspect_err(|error| kept.count(&Err(error.clone())))?;
        let ((told, outcome), (ended, end)) = (oneshot::channel(), watch::channel(()));
        kept.waiting().insert(session, end);
        let snapshots = self.clone();
        let name = view.key.clone();
        tokio::spawn(async move {
            let saved = saving.await.unwrap_or(ENDED);
            drop((charge, ended));
            snapshots.written(session, &name, &saved);
            drop(told.send(saved));
        });
        Ok(outcome)
    }

    /// Notes that a save has ended.
    fn written(&self, session: SessionId, name: &SessionKey, outcome: &Outcome) {
        let Some(kept) = self.kept() else { return };
        kept.count(outcome);
        // Another one of the session may wait since.
        let mut waiting = kept.waiting();
        if waiting.get(&session).is_some_and(|end| end.has_changed().is_err()) {
            waiting.remove(&session);
        }
        drop(waiting);
        match outcome {
            Ok(SavedSnapshot { tokens, bytes }) => tracing::debug!(session = %name, tokens, bytes, "saved"),
            Err(error) => tracing::debug!(session = %name, %error, "not saved"),
        }
    }

    /// Waits until the save that is under way has ended.
    async fn ended(&self, session: SessionId) {
        let end = self.kept().and_then(|kept| kept.waiting().get(&session).cloned());
        if let Some(mut end) = end {
            // It is closed by the end.
            while end.changed().await.is_ok() {}
        }
    }
}

impl Service {
    /// Writes what is cached of a session's KV to disk; returns once it is there. Computes nothing.
    ///
    /// # Errors
    /// The caller has no such session, it moved, snapshots are off, too many of the caller's wait, the disk
    /// fails, or there is no memory for what waits to be written.
    pub async fn save_session(
        &self,
        caller: &Caller,
        name: &str,
        expected_token_count: Option<u32>,
    ) -> Result<SavedSession, Error> {
        let key = caller.session(session_name("name", name)?);
        self.saves.warm(&self.sessions, &key).await?;
        let view = || {
            self.sessions.read(&key, |session| {
                session.expect_tokens(expected_token_count)?;
                Ok(session.view())
            })
        };
        view()?;
        let kept = self.snapshots.kept().ok_or(Error::SnapshotsOff(KEY))?;
        let place = kept.saving.enter(&key.owner).await?;
        // It may have gone on meanwhile.
        let view = view()?;
        let saved = self.save(kept, &view, false).await?;
        drop(place);
        let SavedSnapshot { tokens, bytes } = saved.unwrap_or(SavedSnapshot { tokens: 0, bytes: 0 });
        Ok(SavedSession { view, tokens, bytes })
    }

    /// Saves what is cached of a session, unless more of it is on disk. Returns what is on disk then.
    async fn save(
        &self,
        kept: &Kept,
        view: &SessionView,
        if_worth: bool,
    ) -> Result<Option<SavedSnapshot>, Error> {
        let of = CachedAsk {
            model: view.model.clone(),
            owner: view.key.owner.clone(),
            salt: hash(&view.cache_salt),
            tokens: Arc::clone(&view.tokens),
        };
        // What is on its way may be more than what is cached; and one at a time takes enough memory.
        self.snapshots.take_evicted();
        self.snapshots.ended(view.id).await;
        let copy = self.engine.export(ExportAsk { of, if_worth }).await?;
        let held = |key: Option<&KvKey>| kept.store.held_of(view.id, &view.tokens, key);
        let Some(copy) = copy else { return Ok(held(None)) };
        let parcel = Parcel::new(copy);
        let own = parcel.of(view).0.len();
        if own == 0 || parcel.held(kept, view) > own {
            return Ok(held(Some(&parcel.key)));
        }
        let refusal = |error: SnapshotError| refusal(&view.key.name, &error);
        let saving = self.snapshots.write(view, &parcel).map_err(refusal)?;
        drop(parcel);
        saving.await.unwrap_or(ENDED).map(Some).map_err(refusal)
    }

    /// Saves the sessions whose cached KV is worth it before the daemon ends, the last used first, within
    /// `limit`. Returns how many there were.
    pub async fn save_sessions(&self, limit: Duration) -> usize {
        let Some(kept) = self.snapshots.kept() else { return 0 };
        let mut saved = 0;
        let all = async {
            for view in self.sessions.in_memory() {
                match self.save(kept, &view, true).await {
                    Ok(held) => saved += usize::from(held.is_some()),
                    Err(error) => tracing::debug!(session = %view.key, %error, "not saved"),
                }
            }
        };
        if tokio::time::timeout(limit, all).await.is_err() {
            tracing::info!(saved, ?limit, "not all sessions' KV caches were saved in time");
        }
        saved
    }
}

/// A cache that is to be written, for one session or several.
struct Parcel {
    key: KvKey,
    model: ModelName,
    salt: Salt,
    layout: Arc<KvLayout>,
    tokens: Arc<[u32]>,
    segments: Vec<KvSegment>,
    charge: Arc<KvCharge>,
}

impl Parcel {
    fn new(copy: KvCopy) -> Self {
        let tokens = copy.tokens();
        let KvFacts { model, revision, computes, layout, builder: _ } = &copy.facts;
        let fingerprint = Fingerprint::of(&KvOrigin { revision, computes, layout });
        let key = KvKey { fingerprint, owner: copy.owner.clone(), salt: copy.salt.0 };
        let (model, salt, layout) = (model.clone(), copy.salt, Arc::clone(layout));
        let (segments, charge) = copy.into_parts();
        Self { key, model, salt, layout, tokens, segments, charge: Arc::new(charge) }
    }

    /// Returns what of it a session gets: the whole segments that hold its own tokens.
    fn of(&self, view: &SessionView) -> (Arc<[u32]>, Vec<KvSegment>) {
        let useful = common_start(&self.tokens, &view.tokens);
        let is_own = |segment: &&KvSegment| segment.tokens.end as usize <= useful;
        let segments: Vec<KvSegment> = self.segments.iter().take_while(is_own).cloned().collect();
        let end = segments.last().map_or(0, |last| last.tokens.end as usize);
        (self.tokens[..end].into(), segments)
    }

    /// Returns the number of a session's first tokens that its snapshot has, made as this cache was.
    fn held(&self, kept: &Kept, view: &SessionView) -> usize {
        let held = kept.store.held_of(view.id, &view.tokens, Some(&self.key));
        held.map_or(0, |held| held.tokens as usize)
    }

    /// Returns whether another session of its owner has most of its tokens in it, and no better snapshot: a
    /// cache that goes on takes the place of those that it covers, whosesoever they were.
    fn is_for(&self, kept: &Kept, own: &SessionView, other: &SessionView) -> bool {
        let is_alike =
            other.id != own.id && other.model == self.model && hash(&other.cache_salt) == self.salt;
        let useful = if is_alike { self.of(other).0.len() } else { 0 };
        let is_worth_it = useful >= SHARED_TOKENS_MIN && 2 * useful >= other.tokens.len();
        is_worth_it && self.held(kept, other) < useful
    }
}

/// Returns what a caller is told of a snapshot that was not written.
fn refusal(session: &SessionName, error: &SnapshotError) -> Error {
    match *error {
        // What others leave is theirs to know.
        SnapshotError::TooLarge { disk_bytes_max: value, .. }
        | SnapshotError::Share { disk_bytes_max: value, .. } => {
            Error::SessionLimit { limit: "snapshot_disk_bytes_max", value }
        }
        SnapshotError::GivenUp(GivenUp::Ended) => Error::Draining,
        SnapshotError::GivenUp(why @ (GivenUp::Deleted | GivenUp::Replaced)) => {
            Error::Cancelled(why.to_string())
        }
        SnapshotError::GivenUp(GivenUp::Hurried | GivenUp::Full | GivenUp::Held)
        | SnapshotError::Missing
        | SnapshotError::Foreign
        | SnapshotError::Damaged(_)
        | SnapshotError::Busy { .. }
        | SnapshotError::Full { .. }
        | SnapshotError::Disk(_)
        | SnapshotError::Device(_) => Error::SnapshotFailed {
            session: session.clone(),
            why: error.to_string(),
            retry_after: DISK_RETRY,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_asked_for_a_save_is_told_why_it_was_given_up() {
        let told = |why| refusal(&"s".into(), &SnapshotError::GivenUp(why));
        assert_eq!(told(GivenUp::Ended), Error::Draining);
        assert_eq!(told(GivenUp::Deleted), Error::Cancelled("the session was deleted".into()));
        assert_eq!(told(GivenUp::Replaced), Error::Cancelled("the session was saved anew".into()));
        let Error::SnapshotFailed { why, .. } = told(GivenUp::Hurried) else {
            panic!("it can be tried again")
        };
        assert_eq!(why, "it was given up: its memory was needed");
    }
}
