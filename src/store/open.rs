//! Opening a state folder: it is locked, its format is compared, and the sessions in it are found.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use super::clean::{self, Note};
use super::disk::{self, Disk, Folder};
use super::file::{self, Found, GONE, Tail};
use super::shelf::{Doubt, Kept, Shelf};
use super::{OpenStore, StoreError, Stored, starts};
use crate::ids::{SessionId, SessionKey};
use crate::lock::{LockError, lock};
use crate::session::{Outline, Snapshot};

/// Format of the files. In format 1, all that an answer says is its message's text; its files are read too.
const FORMAT: u32 = 2;

/// The formats before it, whose folders become its own.
const OLDER: [&str; 1] = ["1"];

/// File that says it.
const VERSION: &str = "version";

/// Bytes of it at most.
const VERSION_BYTES_MAX: usize = 64;

/// Folder of the sessions' files within the state folder.
const SESSIONS: &str = "sessions";

/// File that the daemon holds locked.
const LOCK: &str = "lock";

/// Opens the folder; makes it if it is missing. Returns the sessions in it as well, without their content.
///
/// # Errors
/// Another daemon uses it, its format is a newer one, or it cannot be read or written.
pub fn open(folder: &Path) -> Result<(OpenStore, Vec<Stored>), StoreError> {
    let fault = |source| StoreError::Io { folder: folder.to_owned(), source };
    let root = Folder::open(folder).map_err(fault)?;
    let held = match lock(&folder.join(LOCK)) {
        Ok(held) => held,
        Err(LockError::Held { pid }) => return Err(StoreError::Held { folder: folder.to_owned(), pid }),
        Err(LockError::Io(source)) => return Err(fault(source)),
    };
    if let Err(found) = format(&root).map_err(fault)? {
        return Err(StoreError::Format { folder: folder.to_owned(), found, known: FORMAT });
    }
    let sessions = Folder::open(&folder.join(SESSIONS)).map_err(fault)?;
    root.sync_names().map_err(fault)?;
    let (shelf, stored) = shelve(Box::new(sessions)).map_err(fault)?;
    Ok((OpenStore { shelf, lock: held }, stored))
}

/// Compares the folder's format with ours; gives a new folder ours, and an older one, which older versions
/// do not open any more. Returns another one as an error.
fn format(root: &dyn Disk) -> io::Result<Result<(), String>> {
    let found = match root.read(VERSION, 0, VERSION_BYTES_MAX) {
        Ok(bytes) => Some(String::from_utf8_lossy(&bytes).trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    match found {
        Some(found) if found == FORMAT.to_string() => Ok(Ok(())),
        Some(found) if !OLDER.contains(&&*found) => Ok(Err(found)),
        Some(_) | None => disk::replace(root, VERSION, format!("{FORMAT}\n").as_bytes()).map(Ok),
    }
}

/// Finds the sessions on a disk. What is wrong with one file is that session's alone.
pub(super) fn shelve(disk: Box<dyn Disk>) -> io::Result<(Shelf, Vec<Stored>)> {
    let mut note = clean::read(&*disk).unwrap_or_else(|error| {
        tracing::warn!(%error, file = clean::NAME, "the note of the last daemon cannot be read");
        Note::default()
    });
    let mut found = Sessions::new();
    let mut last = SessionId(0);
    let names = disk.names()?;
    for name in &names {
        if let Some(id) = file::id(name) {
            last = last.max(id);
            look(&*disk, &mut found, id, note.remove(&id));
        } else if name.ends_with(disk::NEW)
            && let Err(error) = disk.remove(name)
        {
            // The daemon ended before this file got its name.
            tracing::warn!(%error, file = name, "an unfinished file cannot be removed");
        }
    }
    for (outline, _) in note.into_values() {
        last = last.max(outline.id);
        add(&mut found, true, Kept::damaged(outline, Tail::default(), GONE.into()));
    }
    let mut found: BTreeMap<_, _> = found.into_iter().map(|(key, (_, kept))| (key, kept)).collect();
    let noted = names.iter().any(|name| name == clean::NAME);
    if noted {
        // A start that failed before this finds the note again; what is written from now on it does not tell.
        disk.remove(clean::NAME)?;
    }
    // Files that a daemon named before it was killed are to stay too.
    match disk.sync_names() {
        Ok(()) => found.values_mut().for_each(|kept| forget_older(&*disk, kept)),
        Err(error) if noted => return Err(error),
        Err(_) => found.values_mut().for_each(|kept| kept.doubt = Doubt::Name),
    }
    let starts = starts::count(&*disk, last);
    let stored = found.values().map(|kept| (kept.told.outline.clone(), kept.damage.clone())).collect();
    Ok((Shelf::new(disk, found, starts), stored))
}

/// Looks at one session's file; the note may know the session, and where the file ends.
fn look(disk: &dyn Disk, found: &mut Sessions, id: SessionId, noted: Option<(Outline, Tail)>) {
    let known = noted.as_ref().map(|(_, tail)| *tail);
    let name = file::name(id);
    match (file::look(disk, id, known), noted) {
        (Ok(Found::Whole(outline, tail, torn)), _) => {
            if torn > 0 {
                tracing::info!(session = %outline.key, bytes = torn, "an unfinished change was dropped");
            }
            let told = Snapshot { outline, contents: None };
            add(found, true, Kept { synced: known.is_some(), ..Kept::new(tail, told) });
        }
        // The note says whose session this is; the file may be a copy of another's.
        (Ok(Found::Damaged(_, why, _)), Some((outline, _))) => {
            add(found, true, Kept::damaged(outline, Tail::default(), why));
        }
        (Ok(Found::Damaged(outline, why, is_own)), None) => {
            add(found, is_own, Kept::damaged(outline, Tail::default(), why));
        }
        (Ok(Found::Unreadable), Some((outline, _))) => {
            let why = "nothing in its file can be read";
            add(found, true, Kept::damaged(outline, Tail::default(), why.into()));
        }
        (Err(error), Some((outline, tail))) => {
            // The next start may read it, and then finds it whole.
            let why = format!("its file could not be read: {error}");
            add(found, true, Kept::damaged(outline, tail, why));
        }
        (Ok(Found::Unreadable), None) => {
            tracing::warn!(file = name, "the file of a session cannot be read, not even its name");
        }
        (Err(error), None) => tracing::warn!(%error, file = name, "the file of a session cannot be read"),
    }
}

/// Sessions that were found, each with whether its file says that it is the session's.
type Sessions = BTreeMap<SessionKey, (bool, Kept)>;

/// Removes the files of sessions that had a name before.
fn forget_older(disk: &dyn Disk, kept: &mut Kept) {
    let removed = kept.older.iter().try_for_each(|older| disk.remove(&file::name(*older)));
    match removed {
        Ok(()) => kept.older.clear(),
        Err(error) => {
            tracing::warn!(session = %kept.told.outline.key, %error, "an older file is not removed");
        }
    }
}

/// Adds the session of a file. Of two files with the same one the later counts, which took the name of the
/// other: damaged or not, unless it says that it is another file, as a copy does.
fn add(found: &mut Sessions, mut is_own: bool, mut kept: Kept) {
    let key = kept.told.outline.key.clone();
    if let Some(why) = &kept.damage {
        tracing::warn!(session = %key, file = file::name(kept.id()), why, "a stored session is damaged");
    }
    if let Some((mut other_is_own, mut other)) = found.remove(&key) {
        if (other_is_own, other.id()) > (is_own, kept.id()) {
            std::mem::swap(&mut other, &mut kept);
            std::mem::swap(&mut other_is_own, &mut is_own);
        }
        tracing::warn!(session = %key, file = file::name(other.id()), "another file has the session too");
        kept.older.append(&mut other.older);
        // A copy is left alone: it may be all that there is of something else.
        kept.older.extend((is_own && other_is_own).then(|| other.id()));
    }
    found.insert(key, (is_own, kept));
}
