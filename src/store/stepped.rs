//! A store without its thread: a test lets the writer take its steps, on a disk that fails, and learns what
//! it was told. Everything else is the store's own.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub(crate) use super::failing::FailingDisk;
use super::shelf::Shelf;
use super::writer::Writer;
use super::{Durability, LoadError, Stored, open};
use crate::ids::{SessionId, SessionKey};
use crate::session::{Changes, Contents, SessionBook, Snapshot};

/// A session as the writer was told it; none if it is gone.
pub(crate) type Told = (SessionKey, Option<Snapshot>);

/// The store of one life of a daemon.
pub(crate) struct SteppedStore {
    pub(crate) disk: FailingDisk,
    shelf: Arc<Shelf>,
    writer: Writer,
    changes: Arc<Changes>,
    told: Arc<Mutex<Vec<Told>>>,
}

impl SteppedStore {
    /// Opens the folder on a disk for a daemon that starts, and gives its book the sessions in it, which it
    /// returns as well.
    pub(crate) fn open<H: Send + Sync + 'static>(
        disk: FailingDisk,
        book: &Arc<SessionBook<H>>,
    ) -> io::Result<(Self, Vec<Stored>)> {
        let (shelf, stored) = open::shelve(Box::new(disk.clone()))?;
        book.number_from(shelf.first_number());
        book.restore(stored.clone());
        let (shelf, changes, told) = (Arc::new(shelf), Arc::clone(book.changes()), Arc::default());
        changes.listen();
        let (source, log) = (Arc::clone(book), Arc::clone(&told));
        let now = move |key: &SessionKey| {
            let now = source.snapshot(key);
            lock(&log).push((key.clone(), now.clone()));
            now
        };
        let writer = Writer::new(Arc::clone(&shelf), Durability::Turn, Arc::clone(&changes), Box::new(now));
        Ok((Self { disk, shelf, writer, changes, told }, stored))
    }

    /// Writes what has changed, as the thread does; returns what the writer was told.
    pub(crate) fn step(&mut self) -> Vec<Told> {
        self.writer.step(self.changes.take(Some(Duration::ZERO)));
        std::mem::take(&mut *lock(&self.told))
    }

    /// Writes what is left and leaves in order; returns what the writer was told, and whether all that was
    /// done.
    pub(crate) fn leave(&mut self) -> (Vec<Told>, io::Result<()>) {
        self.changes.end();
        (self.step(), self.writer.leave())
    }

    /// Returns the sessions whose last change is not on the disk.
    pub(crate) fn behind(&self) -> &BTreeSet<SessionKey> {
        &self.writer.behind
    }

    /// Reads a session's content, as its first use does.
    pub(crate) fn load(&self, key: &SessionKey, id: SessionId) -> Result<Contents, LoadError> {
        self.shelf.load(key, id)
    }
}

fn lock(told: &Mutex<Vec<Told>>) -> std::sync::MutexGuard<'_, Vec<Told>> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}
