//! The state of a download as its watchers see it: bytes by file, read at any time from any thread.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What happens to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileState {
    /// It has not begun, or another process downloads it.
    Waiting,
    /// Its bytes arrive.
    Downloading,
    /// Its hash is computed.
    Verifying,
    /// It is in the cache.
    Done,
}

/// A file of a download.
#[derive(Debug)]
pub struct FileProgress {
    /// Path in the repo.
    pub name: String,
    /// Size in bytes.
    pub total_bytes: u64,
    done_bytes: AtomicU64,
    state: AtomicU8,
}

/// Progress of a download.
#[derive(Debug, Default)]
pub struct Progress {
    files: Mutex<Vec<Arc<FileProgress>>>,
    /// Bytes that came over the network.
    received_bytes: AtomicU64,
}

impl FileProgress {
    /// Returns the bytes that are on disk.
    #[must_use]
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes.load(Ordering::Relaxed).min(self.total_bytes)
    }

    /// Returns what happens to it.
    #[must_use]
    pub fn state(&self) -> FileState {
        match self.state.load(Ordering::Relaxed) {
            0 => FileState::Waiting,
            1 => FileState::Downloading,
            2 => FileState::Verifying,
            _ => FileState::Done,
        }
    }

    pub(super) fn set(&self, state: FileState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    pub(super) fn add(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn set_done(&self, bytes: u64) {
        self.done_bytes.store(bytes, Ordering::Relaxed);
    }
}

impl Progress {
    /// Returns the files that are known by now, in the order of the repo's list.
    #[must_use]
    pub fn files(&self) -> Vec<Arc<FileProgress>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the bytes on disk and in all.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        let files = self.files();
        (files.iter().map(|file| file.done_bytes()).sum(), files.iter().map(|file| file.total_bytes).sum())
    }

    /// Returns the bytes that came over the network.
    #[must_use]
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn receive(&self, bytes: u64) {
        self.received_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds a file, or returns the one of this name.
    pub(super) fn file(&self, name: &str, total_bytes: u64) -> Arc<FileProgress> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = files.iter().find(|file| file.name == name) {
            return Arc::clone(known);
        }
        let file = FileProgress {
            name: name.to_owned(),
            total_bytes,
            done_bytes: AtomicU64::new(0),
            state: AtomicU8::new(FileState::Waiting as u8),
        };
        let file = Arc::new(file);
        files.push(Arc::clone(&file));
        file
    }
}
