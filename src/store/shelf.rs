//! The sessions' files, and what each tells: what the writer and those who read share.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::disk::Disk;
use super::file::{self, LoadError, Tail};
use super::{Written, starts};
use crate::ids::{SessionId, SessionKey};
use crate::session::{Contents, Outline, Snapshot};

/// A session's file, and what it tells.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) tail: Tail,
    pub(super) told: Snapshot,
    /// Why the file says something else, if it does: it only goes with the session.
    pub(super) damage: Option<String>,
    pub(super) doubt: Doubt,
    /// Whether it is durable: what a killed daemon left may not be.
    pub(super) synced: bool,
    /// Size up to which the file is not written anew to make it smaller: there was no room for that.
    pub(super) rewrite_above: u64,
    /// The sessions that had the name before, whose files may be there still. They go when this one is sure
    /// to be there, and before it does.
    pub(super) older: Vec<SessionId>,
}

/// What is not known of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Doubt {
    /// Everything is known.
    #[default]
    Nothing,
    /// What follows its tail: a write or a sync of it failed.
    End,
    /// Whether it has its name after a power failure.
    Name,
}

impl Kept {
    /// A file that tells this and nothing else.
    pub(super) fn new(tail: Tail, told: Snapshot) -> Self {
        Self {
            tail,
            told,
            damage: None,
            doubt: Doubt::Nothing,
            synced: true,
            rewrite_above: 0,
            older: Vec::new(),
        }
    }

    /// A file that says something else.
    pub(super) fn damaged(outline: Outline, tail: Tail, why: String) -> Self {
        Self { damage: Some(why), ..Self::new(tail, Snapshot { outline, contents: None }) }
    }

    pub(super) fn id(&self) -> SessionId {
        self.told.outline.id
    }
}

pub(super) struct Shelf {
    pub(super) disk: Box<dyn Disk>,
    pub(super) written: watch::Sender<Written>,
    kept: Mutex<BTreeMap<SessionKey, Kept>>,
    starts: u64,
}

impl Shelf {
    pub(super) fn new(disk: Box<dyn Disk>, kept: BTreeMap<SessionKey, Kept>, starts: u64) -> Self {
        Self { disk, written: watch::Sender::default(), kept: Mutex::new(kept), starts }
    }

    /// Returns the first number that no session ever had.
    pub(super) fn first_number(&self) -> SessionId {
        starts::first_number(self.starts)
    }

    pub(super) fn kept(&self) -> MutexGuard<'_, BTreeMap<SessionKey, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a file may have more than it is known to tell.
    pub(super) fn doubt(&self, key: &SessionKey) {
        if let Some(kept) = self.kept().get_mut(key).filter(|kept| kept.doubt == Doubt::Nothing) {
            kept.doubt = Doubt::End;
        }
    }

    /// Removes the files of the sessions that had a name before, once the one that has it is sure to stay.
    pub(super) fn drop_older(&self, key: &SessionKey) -> io::Result<()> {
        let is_sure = |kept: &&Kept| kept.doubt != Doubt::Name;
        let older = self.kept().get(key).filter(is_sure).map_or_else(Vec::new, |kept| kept.older.clone());
        if older.is_empty() {
            return Ok(());
        }
        older.iter().try_for_each(|older| self.disk.remove(&file::name(*older)))?;
        self.kept().get_mut(key).into_iter().for_each(|kept| kept.older.clear());
        Ok(())
    }

    /// Returns the size of a session's file in bytes.
    pub(super) fn file_bytes(&self, key: &SessionKey) -> u64 {
        self.kept().get(key).map_or(0, |kept| kept.tail.size)
    }

    /// Reads a session's content; the writer then knows what its file tells.
    pub(super) fn load(&self, key: &SessionKey, id: SessionId) -> Result<Contents, LoadError> {
        let kept = self.kept().get(key).filter(|kept| kept.id() == id).cloned();
        let Some(kept) = kept else { return Err(LoadError::Damaged("it has no file".into())) };
        if let Some(contents) = kept.told.contents {
            return Ok(contents);
        }
        let loaded = file::load(&*self.disk, id, kept.tail);
        if !kept.synced && self.disk.sync(&file::name(id)).is_err() {
            // What is shown is to stay: the next change writes it anew.
            self.doubt(key);
        }
        let mut shelf = self.kept();
        let Some(kept) = shelf.get_mut(key).filter(|kept| kept.id() == id) else { return loaded };
        // The writer may have read it meanwhile, and given it another file.
        if let Some(contents) = &kept.told.contents {
            return Ok(contents.clone());
        }
        match &loaded {
            Ok(contents) => {
                kept.told.contents = Some(contents.clone());
                kept.synced = true;
            }
            Err(LoadError::Damaged(why)) => kept.damage = Some(why.clone()),
            Err(LoadError::Io(_)) => {}
        }
        loaded
    }
}
