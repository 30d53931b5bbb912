//! One session's file is made to tell what the session is: a frame is appended, or the file is written anew,
//! or removed. A new file replaces one of which most no longer counts, or that may have more than it is known
//! to tell. Where there is no room for it, the change is appended all the same.

use std::io;

use super::disk;
use super::file::{self, LoadError, Piece, SLACK_BYTES};
use super::shelf::{Doubt, Kept, Shelf};
use crate::ids::SessionKey;
use crate::session::Snapshot;

/// A session's file that is written, and not yet durable.
pub(super) struct Step {
    pub(super) key: SessionKey,
    /// Bytes that were written.
    pub(super) bytes: u64,
    /// The file to sync; none where only names have changed.
    appended: Option<String>,
    /// What the file tells; none if it is gone.
    kept: Option<Kept>,
}

/// Writes one session's file; returns what is left to do, if it changed.
pub(super) fn put(
    shelf: &Shelf,
    key: &SessionKey,
    told: Option<Kept>,
    now: Option<Snapshot>,
) -> io::Result<Option<Step>> {
    let mut older = told.as_ref().map_or_else(Vec::new, |told| told.older.clone());
    if now.is_none() {
        older.iter().try_for_each(|older| shelf.disk.remove(&file::name(*older)))?;
    }
    let mut step = written(shelf, key, told, now)?;
    if let Some(Step { kept: Some(kept), .. }) = &mut step {
        kept.older.append(&mut older);
    }
    Ok(step)
}

/// Makes one session's file tell what it is.
fn written(
    shelf: &Shelf,
    key: &SessionKey,
    told: Option<Kept>,
    now: Option<Snapshot>,
) -> io::Result<Option<Step>> {
    let remove = |told: &Kept| shelf.disk.remove(&file::name(told.id()));
    match (told, now) {
        (None, None) => Ok(None),
        (Some(told), None) => {
            remove(&told)?;
            Ok(Some(Step { key: key.clone(), bytes: 0, appended: None, kept: None }))
        }
        (None, Some(now)) => anew(shelf, key, now).map(Some),
        // The name was given to another session since. At any moment there is one of both.
        (Some(told), Some(now)) if told.id() != now.outline.id => {
            let mut step = anew(shelf, key, now)?;
            step.kept.iter_mut().for_each(|kept| kept.older.push(told.id()));
            Ok(Some(step))
        }
        // What is damaged cannot change.
        (Some(Kept { damage: Some(_), .. }), Some(_)) => Ok(None),
        (Some(told), Some(now)) => change(shelf, key, told, now),
    }
}

/// Makes a file that tells what a session was tell what it is.
fn change(shelf: &Shelf, key: &SessionKey, told: Kept, now: Snapshot) -> io::Result<Option<Step>> {
    let piece = file::appended(told.tail, &told.told, &now);
    if piece.is_none() && told.doubt == Doubt::Nothing {
        return Ok(None);
    }
    // Where nothing changed, what may follow the tail is cut off.
    let Piece { bytes, tail } = piece.unwrap_or(Piece { bytes: Vec::new(), tail: told.tail });
    let mut rewrite_above = told.rewrite_above;
    let is_stale = file::is_stale(tail.size, &now) && tail.size > rewrite_above;
    if is_stale || told.doubt != Doubt::Nothing {
        let whole = with_contents(shelf, key, &told, &now);
        match whole.and_then(|whole| anew(shelf, key, whole)) {
            // To go on needs less room; it has to be the file that has the name.
            Err(_) if told.doubt != Doubt::Name => rewrite_above = tail.size + SLACK_BYTES,
            done => return done.map(Some),
        }
    }
    let name = file::name(told.id());
    shelf.disk.write(&name, told.tail.size, &bytes)?;
    let contents = now.contents.or(told.told.contents);
    let now = Snapshot { outline: now.outline, contents };
    let kept = Kept { rewrite_above, ..Kept::new(tail, now) };
    Ok(Some(Step { key: key.clone(), bytes: bytes.len() as u64, appended: Some(name), kept: Some(kept) }))
}

/// Writes a file anew.
fn anew(shelf: &Shelf, key: &SessionKey, now: Snapshot) -> io::Result<Step> {
    let Piece { bytes, tail } = file::anew(&now);
    disk::put(&*shelf.disk, &file::name(now.outline.id), &bytes)?;
    let kept = Some(Kept::new(tail, now));
    Ok(Step { key: key.clone(), bytes: bytes.len() as u64, appended: None, kept })
}

/// Returns a session with its content, which is read if nobody has read it yet.
fn with_contents(shelf: &Shelf, key: &SessionKey, told: &Kept, now: &Snapshot) -> io::Result<Snapshot> {
    let contents = match &now.contents {
        Some(contents) => contents.clone(),
        // Who loads the session meanwhile gets it from the shelf: its file is about to be another.
        None => shelf.load(key, told.id()).map_err(|error| match error {
            LoadError::Io(error) => error,
            LoadError::Damaged(why) => io::Error::other(why),
        })?,
    };
    Ok(Snapshot { outline: now.outline.clone(), contents: Some(contents) })
}

impl Step {
    /// Returns whether names have to be made durable for it.
    pub(super) fn is_named(&self) -> bool {
        self.appended.is_none()
    }

    /// Makes the file durable.
    pub(super) fn sync(&self, shelf: &Shelf) -> io::Result<()> {
        self.appended.as_ref().map_or(Ok(()), |file| shelf.disk.sync(file))
    }

    /// Notes what the file tells; or, where names are not durable, that this is not known.
    pub(super) fn keep(self, shelf: &Shelf, names_durable: bool) {
        let is_named = self.is_named();
        let mut shelf = shelf.kept();
        let Some(mut kept) = self.kept else {
            if names_durable {
                shelf.remove(&self.key);
            }
            return;
        };
        if is_named && !names_durable {
            kept.doubt = Doubt::Name;
        }
        // The content may have been read while the file was written.
        if let Some(read) = shelf.get(&self.key).filter(|other| other.id() == kept.id()) {
            kept.told.contents = kept.told.contents.or_else(|| read.told.contents.clone());
            kept.damage.clone_from(&read.damage);
        }
        shelf.insert(self.key, kept);
    }
}
