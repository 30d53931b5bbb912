//! Sessions on disk: a folder with a file per session ([`file`]), written by one thread ([`writer`]). The
//! thread is told which sessions changed, and makes their files tell what they are now; whoever must not
//! answer before waits for it. Nothing here decides what a session is: `session` says what its records are.
//!
//! The folder holds besides: `lock` (one daemon at a time), `version` (of the format), `starts` ([`starts`]),
//! and, while no daemon runs, `clean` ([`clean`]).

mod clean;
mod disk;
#[cfg(test)]
mod failing;
mod file;
mod frame;
mod kv;
mod open;
mod portable;
mod put;
mod shelf;
mod starts;
#[cfg(test)]
pub(crate) mod stepped;
mod writer;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::ids::{SessionId, SessionKey};
use crate::session::{Changes, Contents, Outline, Snapshot};
pub use file::LoadError;
#[cfg(test)]
pub(crate) use kv::ByHand;
pub use kv::{
    Fingerprint, GivenUp, KvKey, KvOrigin, Loaded, NewSnapshot, SavedSnapshot, SnapshotError,
    SnapshotSettings, SnapshotStats, Snapshots, Wanted,
};
pub use open::open;
pub use portable::{Export, Import, PortableError};
use shelf::Shelf;
use writer::Writer;

/// When a change is on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Before it is acknowledged.
    #[default]
    Turn,
    /// Within a second.
    Second,
}

/// Why a folder cannot be the daemon's.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another daemon uses it.
    #[error("a daemon (pid {pid}) uses {} already", folder.display())]
    Held {
        /// The folder.
        folder: PathBuf,
        /// Process id of the other daemon.
        pid: String,
    },
    /// It was written by a newer mlxd, or by something else.
    #[error("{} has format {found:?}; this mlxd reads formats up to {known}", folder.display())]
    Format {
        /// The folder.
        folder: PathBuf,
        /// What its version says.
        found: String,
        /// The format of this mlxd.
        known: u32,
    },
    /// It cannot be read or written.
    #[error("{}: {source}", folder.display())]
    Io {
        /// The folder.
        folder: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

/// A session that was found, and why it is damaged, if it is.
pub type Stored = (Outline, Option<String>);

/// What the writer has reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Sessions whose last change could not be written; they are tried again.
    pub behind: u32,
    /// Whether nothing more is written.
    pub ended: bool,
}

/// A folder that is this daemon's, before anything is written.
pub struct OpenStore {
    shelf: Shelf,
    lock: File,
}

impl OpenStore {
    /// Returns the first number that no session in the folder ever had.
    #[must_use]
    pub fn first_number(&self) -> SessionId {
        self.shelf.first_number()
    }

    /// Starts to write the sessions that `changes` names; `now` tells what each is. Where the disk is full
    /// `make_way` is asked to free bytes, and whether it does.
    ///
    /// # Errors
    /// The system has no thread for it.
    pub fn start(
        self,
        durability: Durability,
        changes: Arc<Changes>,
        now: impl Fn(&SessionKey) -> Option<Snapshot> + Send + 'static,
        make_way: impl Fn(u64) -> bool + Send + 'static,
    ) -> io::Result<Store> {
        let Self { shelf, lock } = self;
        let shelf = Arc::new(shelf);
        changes.listen();
        let writer = Writer::new(Arc::clone(&shelf), durability, Arc::clone(&changes), Box::new(now));
        let writer = writer.with_way(Box::new(make_way));
        let thread = std::thread::Builder::new().name("store".into()).spawn(move || writer.run())?;
        Ok(Store { shelf, durability, changes, open: Mutex::new(Some((thread, lock))) })
    }
}

/// The sessions on disk.
pub struct Store {
    shelf: Arc<Shelf>,
    durability: Durability,
    changes: Arc<Changes>,
    /// The thread that writes, and the lock of the folder, until it is closed.
    open: Mutex<Option<(JoinHandle<()>, File)>>,
}

impl Store {
    /// Returns when all changes of a session until now are on disk, where that has to be waited for, or
    /// cannot be written.
    pub async fn saved(&self, key: &SessionKey) {
        if self.durability == Durability::Second {
            return;
        }
        let Some(number) = self.changes.pending(key) else { return };
        let mut written = self.shelf.written.subscribe();
        // After its end nothing is saved.
        let settled = |written: &Written| written.ended || self.changes.is_settled(key, number);
        drop(written.wait_for(settled).await);
    }

    /// Returns what has been written.
    #[must_use]
    pub fn written(&self) -> Written {
        *self.shelf.written.borrow()
    }

    /// Returns the size of a session's file in bytes.
    #[must_use]
    pub fn file_bytes(&self, key: &SessionKey) -> u64 {
        self.shelf.file_bytes(key)
    }

    /// Reads a session's content. It blocks.
    ///
    /// # Errors
    /// The file is damaged, or cannot be read.
    pub fn load(&self, key: &SessionKey, id: SessionId) -> Result<Contents, LoadError> {
        self.shelf.load(key, id)
    }

    /// Writes what is left; returns when nothing more is written.
    pub async fn finish(&self) {
        self.changes.end();
        drop(self.shelf.written.subscribe().wait_for(|written| written.ended).await);
    }

    /// Writes what is left and gives the folder back. It blocks.
    pub fn close(&self) {
        self.changes.end();
        if let Some((thread, lock)) = self.open.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // It has said why on its way if it panicked.
            drop(thread.join());
            drop(lock);
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests;
