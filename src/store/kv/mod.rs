//! Snapshots of KV caches on disk: a session's cache as a list of parts (`manifest`), each part a file that
//! is named by what it holds (`name`, `part`), so that sessions which begin alike share files as they share
//! memory. A snapshot is a cache of a cache: whatever is wrong with one, the session is recomputed from its
//! tokens, and data that is not exactly what was written is never used.
//!
//! One thread writes (`writer`), off the engine's. What waits for it can be loaded already.

#[cfg(test)]
mod by_hand;
mod index;
mod load;
mod manifest;
mod name;
mod part;
mod shelf;
mod writer;

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use tokio::sync::oneshot;

use super::disk::{Disk, Folder};
use crate::backend::{BuildKv, KvLayout, KvPart, KvSegment, check_segments};
use crate::count::count;
use crate::ids::{Principal, SessionId};
#[cfg(test)]
pub(crate) use by_hand::ByHand;
use shelf::{Job, Shelf};
use writer::{Known, Writer};

/// Time that a disk that works takes to write a piece.
const GIVING_UP: Duration = Duration::from_millis(500);

/// Limits of the snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotSettings {
    /// Bytes of all files; the least recently used snapshots of those who have an equal share or more go
    /// first.
    pub disk_bytes_max: u64,
    /// Bytes that may wait to be written.
    pub queue_bytes_max: u64,
}

/// What a KV cache was computed with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvOrigin<'a> {
    /// The model's revision: the state of its files.
    pub revision: &'a str,
    /// How its matrices are quantized while they are read, and what it computes in, as text.
    pub computes: &'a str,
    /// The arrays of its caches.
    pub layout: &'a KvLayout,
}

/// Says which caches are alike: a hash of a [`KvOrigin`] and of the format of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

/// Whose cache it is, and of what. Nothing is shared where any of it differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvKey {
    /// What it was computed with.
    pub fingerprint: Fingerprint,
    /// Its owner.
    pub owner: Principal,
    /// What shapes it besides owner and tokens (`cache::Salt`). Media do not: caches with any are not saved.
    pub salt: [u8; 32],
}

/// A snapshot to write.
#[derive(Clone, Debug)]
pub struct NewSnapshot {
    /// Its session; what it has already is replaced.
    pub session: SessionId,
    /// Whose cache it is.
    pub key: KvKey,
    /// The arrays of the caches.
    pub layout: Arc<KvLayout>,
    /// The tokens of the cache: as many as the segments have.
    pub tokens: Arc<[u32]>,
    /// What [`crate::backend::Backend::export`] returned: from the first token on.
    pub segments: Vec<KvSegment>,
    /// Time of the session's last use.
    pub used: SystemTime,
}

/// A snapshot that is on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SavedSnapshot {
    /// Number of its tokens.
    pub tokens: u32,
    /// Bytes of its files, shared ones included.
    pub bytes: u64,
}

/// What is wanted of a snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The session.
    pub session: SessionId,
    /// Whose cache it is to be.
    pub key: &'a KvKey,
    /// The arrays of the caches.
    pub layout: &'a KvLayout,
    /// The session's tokens now.
    pub tokens: &'a [u32],
    /// Number of the first of them that are not needed, because a parked cache has them.
    pub held: u32,
    /// Whether nobody waits for it any more: then no further file is read.
    pub stop: &'a AtomicBool,
}

/// What was loaded: the longest beginning of the wanted tokens that the snapshot can restore.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Its tokens: from `held` on, whole segments one after the other.
    pub tokens: Range<u32>,
    /// To be imported. With recurrent states, the last one has a checkpoint at its end.
    pub segments: Vec<KvSegment>,
    /// What kept it from being longer, if something was wrong with the files.
    pub fault: Option<SnapshotError>,
}

/// Why there is no snapshot, or it cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// The session has none, or none of these tokens.
    #[error("there is no snapshot of these tokens")]
    Missing,
    /// It is of another model, in other formats, of another owner, or from another version of mlxd.
    #[error("the snapshot was made with another model, format or owner")]
    Foreign,
    /// A file is not what was written.
    #[error("the snapshot is damaged: {0}")]
    Damaged(String),
    /// More waits to be written than may.
    #[error("{queued_bytes} bytes wait to be written, of at most {queue_bytes_max}")]
    Busy {
        /// Bytes that wait.
        queued_bytes: u64,
        /// The limit.
        queue_bytes_max: u64,
    },
    /// It is larger than all snapshots may be.
    #[error("the snapshot has {bytes} bytes; snapshot_disk_bytes_max is {disk_bytes_max}")]
    TooLarge {
        /// Bytes of its files.
        bytes: u64,
        /// The limit.
        disk_bytes_max: u64,
    },
    /// It would take what others have within an equal share.
    #[error(
        "the snapshot has {bytes} bytes; others leave {left_bytes} of snapshot_disk_bytes_max to its owner"
    )]
    Share {
        /// Bytes of its files.
        bytes: u64,
        /// What its owner may have.
        left_bytes: u64,
        /// The limit of all.
        disk_bytes_max: u64,
    },
    /// The disk has little room, which is left to others.
    #[error("{free_bytes} bytes are free on the disk, and {spared_bytes} are left to others")]
    Full {
        /// Bytes that are free.
        free_bytes: u64,
        /// Bytes that snapshots leave free.
        spared_bytes: u64,
    },
    /// The disk fails, or did a moment ago: nothing is written until it is tried again.
    #[error("snapshots cannot be written: {0}")]
    Disk(String),
    /// The device did not show its arrays, or did not take ours.
    #[error("{0}")]
    Device(String),
    /// It was given up before it was written, though nothing failed.
    #[error("it was given up: {0}")]
    GivenUp(GivenUp),
}

/// Why a snapshot was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GivenUp {
    /// Its session is gone.
    #[error("the session was deleted")]
    Deleted,
    /// Another snapshot of the session took its place.
    #[error("the session was saved anew")]
    Replaced,
    /// Its memory was wanted.
    #[error("its memory was needed")]
    Hurried,
    /// The disk is full, and sessions themselves are to be written.
    #[error("the disk is full, and sessions are written first")]
    Full,
    /// The disk does not answer.
    #[error("the disk does not answer")]
    Held,
    /// Nothing more is written.
    #[error("the daemon ends")]
    Ended,
}

impl From<io::Error> for SnapshotError {
    fn from(error: io::Error) -> Self {
        Self::Disk(error.to_string())
    }
}

/// What snapshots take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotStats {
    /// Whether they are written: false while the disk fails.
    pub enabled: bool,
    /// Bytes of all files; 0 until they were counted, soon after the start.
    pub bytes: u64,
    /// Number of snapshots.
    pub count: u32,
    /// Bytes that wait to be written.
    pub queued_bytes: u64,
    /// Why the last one that failed was not written.
    pub last_error: Option<String>,
}

/// The snapshots in a folder.
pub struct Snapshots {
    shelf: Arc<Shelf>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Snapshots {
    /// Opens a folder, which it makes if it is missing, and starts the thread that writes. What is in the
    /// folder is looked at by that, and later. `known` says whose a session is, if there is one *now*: it is
    /// asked at any time, and the snapshots of sessions that are not known are removed.
    ///
    /// # Errors
    /// The folder cannot be made, or the system has no thread for it.
    pub fn start(
        folder: &Path,
        settings: SnapshotSettings,
        known: impl Fn(SessionId) -> Option<Principal> + Send + 'static,
    ) -> io::Result<Self> {
        Self::start_on(Box::new(Folder::open(folder)?), settings, Box::new(known))
    }

    fn start_on(disk: Box<dyn Disk>, settings: SnapshotSettings, known: Known) -> io::Result<Self> {
        let mut shelf = Shelf::new(disk, settings);
        (shelf.frees_apart, shelf.patience_max) = (true, writer::PATIENCE);
        let shelf = Arc::new(shelf);
        let writer = Writer::new(Arc::clone(&shelf), known);
        let thread = std::thread::Builder::new().name("kv-writer".into()).spawn(move || {
            crate::priority::stand_behind();
            writer.run();
        })?;
        Ok(Self { shelf, thread: Mutex::new(Some(thread)) })
    }

    /// Returns snapshots whose writer somebody drives by hand.
    #[cfg(test)]
    fn on(disk: Box<dyn Disk>, settings: SnapshotSettings, known: Known) -> (Self, Writer) {
        let shelf = Arc::new(Shelf::new(disk, settings));
        let writer = Writer::new(Arc::clone(&shelf), known);
        (Self { shelf, thread: Mutex::new(None) }, writer)
    }

    fn thread(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a snapshot, later; the receiver tells when it is on disk. Returns at once, so that the engine
    /// may call it. What waits for the same session already is given up; what is being written of it is
    /// written first. Who is told finds the arrays freed, unless somebody loaded them.
    ///
    /// # Errors
    /// `Busy`, or `Disk` while that is not tried; `Device` if it is not a whole cache. Then nothing is given
    /// up.
    pub fn save(
        &self,
        snapshot: NewSnapshot,
    ) -> Result<oneshot::Receiver<Result<SavedSnapshot, SnapshotError>>, SnapshotError> {
        let end = check_segments(0, &snapshot.segments)
            .map_err(|error| SnapshotError::Device(error.to_string()))?;
        if end == 0 || end as usize != snapshot.tokens.len() {
            return Err(SnapshotError::Device(format!("{} tokens of {end}", snapshot.tokens.len())));
        }
        self.shelf.save(snapshot)
    }

    /// Returns what a session's snapshot holds, written or waiting, without looking whether it is intact.
    /// Reads a small file at most, and that only soon after the start.
    #[must_use]
    pub fn held(&self, session: SessionId) -> Option<SavedSnapshot> {
        let Some(waiting) = self.shelf.waiting(session) else {
            return self.shelf.manifest(session).ok().map(|manifest| manifest.saved());
        };
        Some(SavedSnapshot { tokens: count(waiting.snapshot.tokens.len()), bytes: waiting.bytes })
    }

    /// Loads what there is of the wanted tokens. It blocks, for as long as it takes to read the files.
    ///
    /// # Errors
    /// There is nothing that can be used, and why.
    pub fn load(&self, wanted: &Wanted<'_>, builder: &dyn BuildKv) -> Result<Loaded, SnapshotError> {
        load::load(&self.shelf, wanted, builder)
    }

    /// Returns what a session's snapshot, written or waiting, has of these tokens in whole segments; `key`,
    /// if it is known, is what it has to be made with. Asks no disk: none before the folder was looked at.
    #[must_use]
    pub fn held_of(&self, session: SessionId, tokens: &[u32], key: Option<&KvKey>) -> Option<SavedSnapshot> {
        let held = match self.shelf.waiting(session) {
            Some(waiting) => {
                let (own, _parts) = writer::listed(&waiting.snapshot);
                own
            }
            None => self.shelf.state().index.as_ref()?.get(session)?.clone(),
        };
        let is_known = key.is_none_or(|key| held.key == name::key_name(key));
        is_known.then(|| held.of(tokens).saved()).filter(|held| held.tokens > 0)
    }

    /// Gives a session what whole segments of another's snapshot hold of its own tokens, later: it has no
    /// files of its own.
    pub fn fork(&self, from: SessionId, to: SessionId, tokens: Arc<[u32]>) {
        self.shelf.add(Job::Fork { from, to, tokens });
    }

    /// Removes a session's snapshot, later; what waits of it is given up.
    pub fn forget(&self, session: SessionId) {
        self.shelf.add(Job::Forget(session));
    }

    /// Removes snapshots of this many bytes, and what is being written, before anything else is done: the
    /// disk is full, and what cannot be computed again has to be written. Returns whether there may be any.
    pub fn make_way(&self, bytes: u64) -> bool {
        self.shelf.add(Job::MakeWay(bytes));
        self.shelf.has_some()
    }

    /// Gives up all that waits if nothing was written since the last call, though something is being written:
    /// a disk that does not answer holds no memory but that of what it was given. Nothing more is taken until
    /// it answers. Call it now and then.
    pub fn look_after(&self) {
        self.shelf.look_after();
    }

    /// Gives up all that waits, and what is being written before its next piece: its memory is wanted.
    pub fn give_up_waiting(&self) {
        self.shelf.give_up(GivenUp::Hurried);
    }

    /// Returns what snapshots take.
    #[must_use]
    pub fn stats(&self) -> SnapshotStats {
        self.shelf.stats()
    }

    /// Writes what waits, for as long as `limit`, and ends. It blocks. What is left is given up; a thread
    /// that a disk holds is left to itself.
    pub fn close(&self, limit: Duration) {
        self.shelf.end();
        let Some(thread) = self.thread().take() else { return };
        if !self.shelf.finished(limit) {
            self.shelf.give_up(GivenUp::Ended);
            if !self.shelf.finished(GIVING_UP) {
                tracing::warn!("a disk holds the thread that writes KV snapshots");
                return;
            }
        }
        // It has said why on its way if it panicked.
        drop(thread.join());
    }
}

impl Drop for Snapshots {
    fn drop(&mut self) {
        self.close(Duration::ZERO);
    }
}

impl NewSnapshot {
    /// Returns the bytes of its arrays.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let Self { layout, segments, .. } = self;
        let states = layout.bytes(KvPart::States, 0);
        let of = |segment: &KvSegment| {
            let tokens =
                layout.bytes(KvPart::Tokens, segment.tokens.end.saturating_sub(segment.tokens.start));
            tokens.saturating_add(states.saturating_mul(segment.states.len() as u64))
        };
        segments.iter().fold(0, |sum, segment| sum.saturating_add(of(segment)))
    }
}

#[cfg(test)]
mod tests;
