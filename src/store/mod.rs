//! Sessions on disk: a folder with a file per session ([`file`]), written by one thread ([`writer`]). The
//! thread is told which sessions changed, and makes their files tell what they are now; whoever must not
//! answer before waits for it. Nothing here decides what a session is: `session` says what its records are.
//!
//! The folder holds besides: `lock` (one daemon at a time), `version` (of the format), and, while no daemon
//! runs, `clean` ([`clean`]).

mod clean;
mod disk;
#[cfg(test)]
mod failing;
mod file;
mod frame;
mod open;
mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use tokio::sync::watch;

use crate::ids::{SessionId, SessionKey};
use crate::session::{Changes, Contents, Outline, Snapshot};
use disk::Disk;
pub use file::LoadError;
use file::Tail;
pub use open::open;
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
    #[error("{} has format {found:?}; this mlxd reads format {known}", folder.display())]
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
    /// Number of the last change that it has dealt with.
    pub number: u64,
    /// Sessions whose last change could not be written; they are tried again.
    pub behind: u32,
}

/// A session's file, and what it tells.
#[derive(Clone, Debug)]
struct Kept {
    tail: Tail,
    told: Snapshot,
    /// Whether the file says something else, which only goes with the session.
    damaged: bool,
    /// Whether it is not known what the file says: it is written anew.
    unsure: bool,
}

impl Kept {
    fn id(&self) -> SessionId {
        self.told.outline.id
    }
}

/// What the writer and those who read share.
struct Shelf {
    disk: Box<dyn Disk>,
    kept: Mutex<BTreeMap<SessionKey, Kept>>,
    written: watch::Sender<Written>,
    /// Held by this daemon while it is open.
    lock: Mutex<Option<File>>,
}

impl Shelf {
    fn kept(&self) -> MutexGuard<'_, BTreeMap<SessionKey, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a session's content; the writer then knows what its file tells.
    fn load(&self, key: &SessionKey, id: SessionId) -> Result<Contents, LoadError> {
        let kept = self.kept().get(key).filter(|kept| kept.id() == id).cloned();
        let Some(kept) = kept else { return Err(LoadError::Damaged("it has no file".into())) };
        let loaded = file::load(&*self.disk, id, kept.tail);
        let mut shelf = self.kept();
        let Some(kept) = shelf.get_mut(key).filter(|kept| kept.id() == id) else { return loaded };
        // Somebody else may have read it meanwhile, and changed it.
        if let Some(contents) = &kept.told.contents {
            return Ok(contents.clone());
        }
        match &loaded {
            Ok(contents) => kept.told.contents = Some(contents.clone()),
            Err(LoadError::Damaged(_)) => kept.damaged = true,
            Err(LoadError::Io(_)) => {}
        }
        loaded
    }
}

/// A folder that is this daemon's, before anything is written.
pub struct OpenStore(Shelf);

impl OpenStore {
    /// Starts to write the sessions that `changes` names; `now` tells what each is.
    ///
    /// # Errors
    /// The system has no thread for it.
    pub fn start(
        self,
        durability: Durability,
        changes: Arc<Changes>,
        now: impl Fn(&SessionKey) -> Option<Snapshot> + Send + 'static,
    ) -> io::Result<Store> {
        let shelf = Arc::new(self.0);
        changes.listen();
        let writer = Writer::new(Arc::clone(&shelf), durability, Arc::clone(&changes), Box::new(now));
        let thread = std::thread::Builder::new().name("store".into()).spawn(move || writer.run())?;
        Ok(Store { shelf, durability, changes, thread: Mutex::new(Some(thread)) })
    }
}

/// The sessions on disk.
pub struct Store {
    shelf: Arc<Shelf>,
    durability: Durability,
    changes: Arc<Changes>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Store {
    /// Returns when all changes until now are on disk, where that has to be waited for, or cannot be written.
    pub async fn saved(&self) {
        if self.durability == Durability::Second {
            return;
        }
        let number = self.changes.number();
        // It ends with the writer, after which nothing is saved.
        drop(self.shelf.written.subscribe().wait_for(|written| written.number >= number).await);
    }

    /// Returns what has been written.
    #[must_use]
    pub fn written(&self) -> Written {
        *self.shelf.written.borrow()
    }

    /// Reads a session's content. It blocks.
    ///
    /// # Errors
    /// The file is damaged, or cannot be read.
    pub fn load(&self, key: &SessionKey, id: SessionId) -> Result<Contents, LoadError> {
        self.shelf.load(key, id)
    }

    /// Writes what is left and gives the folder back. It blocks.
    pub fn close(&self) {
        self.changes.end();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // It has said why on its way if it panicked.
        drop(thread.map(JoinHandle::join));
        drop(self.shelf.lock.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests;
