//! The thread that writes. It takes all changes that wait, writes every file of theirs, then makes all of
//! them durable: changes that come together wait together. A session whose file cannot be written stays in
//! its list and is tried again with the next change, or after a while: the file then gets what it missed.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::disk;
use super::file::{self, Piece};
use super::{Durability, Kept, Shelf, Written, clean};
use crate::count::count;
use crate::ids::SessionKey;
use crate::session::{Changes, Outline, Snapshot, record};

/// Time between two tries to write what could not be written.
const RETRY: Duration = Duration::from_secs(10);

/// Time in which changes are collected where nobody waits for them.
const COLLECT: Duration = Duration::from_secs(1);

/// Time of use that may be lost.
const USE_LOST: Duration = Duration::from_secs(60);

/// Tells what a session is now; none if it is gone.
pub(super) type Source = Box<dyn Fn(&SessionKey) -> Option<Snapshot> + Send>;

pub(super) struct Writer {
    shelf: Arc<Shelf>,
    durability: Durability,
    changes: Arc<Changes>,
    now: Source,
    /// Sessions whose file could not be written.
    behind: BTreeSet<SessionKey>,
    /// Sessions that were only used since their file was written.
    used: BTreeSet<SessionKey>,
}

/// A session's file that is written, and not yet durable.
struct Step {
    key: SessionKey,
    /// The file to sync.
    file: Option<String>,
    /// The name that the file gets then.
    renamed: Option<String>,
    /// What the file tells; none if it is gone.
    kept: Option<Kept>,
}

impl Writer {
    pub(super) fn new(shelf: Arc<Shelf>, durability: Durability, changes: Arc<Changes>, now: Source) -> Self {
        Self { shelf, durability, changes, now, behind: BTreeSet::new(), used: BTreeSet::new() }
    }

    /// Writes until there are no more changes.
    pub(super) fn run(mut self) {
        let _end = End(Arc::clone(&self.shelf));
        loop {
            let limit = (!self.behind.is_empty()).then_some(RETRY);
            let mut taken = self.changes.take(limit);
            if taken.ended {
                taken.keys.append(&mut self.used);
            }
            self.write(taken.keys, taken.ended);
            let behind = count(self.behind.len());
            self.shelf.written.send_replace(Written { number: taken.number, behind });
            if taken.ended {
                break;
            }
            if self.durability == Durability::Second {
                self.changes.pause(COLLECT);
            }
        }
        if let Err(error) = self.leave() {
            tracing::warn!(%error, "the state folder could not be left in order");
        }
    }

    /// Writes what sessions are now, and those that are behind.
    pub(super) fn write(&mut self, mut keys: BTreeSet<SessionKey>, is_last: bool) {
        let were_behind = self.behind.len();
        keys.append(&mut self.behind);
        let mut first_error = None;
        let mut fail = |key: SessionKey, error: io::Error| {
            self.behind.insert(key);
            first_error.get_or_insert(error);
        };
        let mut steps = Vec::new();
        for key in keys {
            self.used.remove(&key);
            let told = self.shelf.kept().get(&key).cloned();
            let now = (self.now)(&key);
            if !is_last && is_only_used(told.as_ref(), now.as_ref()) {
                self.used.insert(key);
                continue;
            }
            match put(&self.shelf, &key, told, now) {
                Ok(step) => steps.extend(step),
                Err(error) => fail(key, error),
            }
        }
        let mut names_changed = false;
        let mut durable = Vec::with_capacity(steps.len());
        for step in steps {
            match step.sync(&self.shelf) {
                Ok(()) => {
                    names_changed |= step.renamed.is_some() || step.kept.is_none();
                    durable.push(step);
                }
                Err(error) => fail(step.key, error),
            }
        }
        let named = if names_changed { self.shelf.disk.sync_names() } else { Ok(()) };
        for step in durable {
            // A file that is still what it was gets the change again; of one with a new name it is not known.
            if named.is_err() && (step.renamed.is_some() || step.kept.is_none()) {
                self.behind.insert(step.key.clone());
            }
            step.keep(&self.shelf, named.is_err());
        }
        let error = named.err().or(first_error);
        self.report(were_behind, error);
    }

    /// Says once that sessions are not written, and once that they are again.
    fn report(&self, were_behind: usize, error: Option<io::Error>) {
        match error {
            Some(error) if were_behind == 0 => {
                tracing::warn!(%error, "sessions cannot be written to state_dir; they go on in memory");
            }
            None if were_behind > 0 => tracing::info!("sessions are written to state_dir again"),
            Some(_) | None => {}
        }
    }

    /// Leaves the note that all is written, if it is.
    pub(super) fn leave(&self) -> io::Result<()> {
        if !self.behind.is_empty() {
            return Ok(());
        }
        let kept = self.shelf.kept();
        clean::leave(&*self.shelf.disk, kept.values().map(|kept| (&kept.told, kept.tail)))
    }
}

/// Returns whether a session differs from what its file tells by little time of its last use.
fn is_only_used(told: Option<&Kept>, now: Option<&Snapshot>) -> bool {
    let (Some(Kept { told, unsure: false, .. }), Some(now)) = (told, now) else { return false };
    let used = now.outline.used;
    let lost = used.duration_since(told.outline.used).unwrap_or(Duration::MAX);
    let outline = Outline { used, ..told.outline.clone() };
    lost < USE_LOST
        && outline == now.outline
        && record(Some(&Snapshot { outline, contents: told.contents.clone() }), now).is_none()
}

/// Writes one session's file; returns what is left to do, if it changed.
fn put(
    shelf: &Shelf,
    key: &SessionKey,
    told: Option<Kept>,
    now: Option<Snapshot>,
) -> io::Result<Option<Step>> {
    let disk = &*shelf.disk;
    let step = |file, renamed, kept| Some(Step { key: key.clone(), file, renamed, kept });
    let Some(now) = now else {
        let Some(told) = told else { return Ok(None) };
        disk.remove(&file::name(told.id()))?;
        return Ok(step(None, None, None));
    };
    let told = match told {
        Some(told) if told.id() == now.outline.id && !told.damaged => Some(told),
        // The name was given to another session since.
        Some(other) if other.id() != now.outline.id => {
            disk.remove(&file::name(other.id()))?;
            None
        }
        // What is damaged cannot change.
        Some(_) => return Ok(None),
        None => None,
    };
    let name = file::name(now.outline.id);
    let appended = told.as_ref().map(|told| file::appended(told.tail, &told.told, &now));
    let (written, at, renamed) = match (&told, appended) {
        (Some(told), Some(None)) if !told.unsure => return Ok(None),
        (Some(told), Some(Some(piece)))
            if !told.unsure && (now.contents.is_none() || !file::is_stale(piece.tail.size, &now)) =>
        {
            (piece, told.tail.size, None)
        }
        _ => (file::anew(&now), 0, Some(name.clone())),
    };
    let Piece { bytes, tail } = written;
    let file = if renamed.is_some() { format!("{name}{}", disk::NEW) } else { name };
    disk.write(&file, at, &bytes)?;
    let contents = now.contents.or_else(|| told.and_then(|told| told.told.contents));
    let told = Snapshot { outline: now.outline, contents };
    Ok(step(Some(file), renamed, Some(Kept { tail, told, damaged: false, unsure: false })))
}

impl Step {
    /// Makes the file durable, and gives it its name.
    fn sync(&self, shelf: &Shelf) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        shelf.disk.sync(file)?;
        match &self.renamed {
            Some(name) => shelf.disk.rename(file, name),
            None => Ok(()),
        }
    }

    /// Notes what the file tells; or, as its name is not durable, that this is not known.
    fn keep(self, shelf: &Shelf, unsure: bool) {
        let mut shelf = shelf.kept();
        let Some(mut kept) = self.kept else {
            if !unsure {
                shelf.remove(&self.key);
            }
            return;
        };
        kept.unsure = unsure && self.renamed.is_some();
        // The content may have been read while the file was written.
        if kept.told.contents.is_none() {
            let read = shelf.get(&self.key).filter(|other| other.id() == kept.id());
            kept.told.contents = read.and_then(|other| other.told.contents.clone());
        }
        shelf.insert(self.key, kept);
    }
}

/// Says that nothing more is written, also where the thread panics: nobody waits then.
struct End(Arc<Shelf>);

impl Drop for End {
    fn drop(&mut self) {
        let failed = u32::from(std::thread::panicking());
        self.0.written.send_modify(|written| {
            *written = Written { number: u64::MAX, behind: written.behind.max(failed) };
        });
    }
}
