//! Opening a state folder: it is locked, its format is compared, and the sessions in it are found.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Mutex;

use tokio::sync::watch;

use super::disk::{self, Disk, Folder};
use super::file::{self, Found, Tail};
use super::{Kept, OpenStore, Shelf, StoreError, Stored, Written, clean};
use crate::ids::SessionKey;
use crate::lock::{LockError, lock};
use crate::session::{Outline, Snapshot};

/// Format of the files.
const FORMAT: u32 = 1;

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
    let (mut shelf, stored) = shelve(Box::new(sessions)).map_err(fault)?;
    shelf.lock = Mutex::new(Some(held));
    Ok((OpenStore(shelf), stored))
}

/// Compares the folder's format with ours; gives a new folder ours. Returns another one as an error.
fn format(root: &dyn Disk) -> io::Result<Result<(), String>> {
    match root.read(VERSION, 0, VERSION_BYTES_MAX) {
        Ok(bytes) => {
            let found = String::from_utf8_lossy(&bytes).trim().to_owned();
            Ok(if found == FORMAT.to_string() { Ok(()) } else { Err(found) })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            disk::replace(root, VERSION, format!("{FORMAT}\n").as_bytes()).map(Ok)
        }
        Err(error) => Err(error),
    }
}

/// Finds the sessions on a disk.
pub(super) fn shelve(disk: Box<dyn Disk>) -> io::Result<(Shelf, Vec<Stored>)> {
    let mut note = clean::take(&*disk)?;
    let mut found = Sessions::new();
    for name in disk.names()? {
        let Some(id) = file::id(&name) else {
            if name.ends_with(disk::NEW) {
                // The daemon ended before this file got its name.
                disk.remove(&name)?;
            }
            continue;
        };
        let noted = note.remove(&id);
        let tail = noted.as_ref().map(|(_, tail)| *tail);
        match (file::look(&*disk, id, tail)?, noted) {
            (Found::Whole(outline, tail, torn), _) => {
                if torn > 0 {
                    tracing::info!(session = %outline.key, bytes = torn, "an unfinished change was dropped");
                }
                add(&mut found, outline, tail, None);
            }
            (Found::Damaged(outline, why), _) => add(&mut found, outline, Tail::default(), Some(why)),
            (Found::Unreadable, Some((outline, _))) => {
                add(&mut found, outline, Tail::default(), Some("its file cannot be read".into()));
            }
            (Found::Unreadable, None) => tracing::warn!(file = name, "the file of a session cannot be read"),
        }
    }
    for (outline, _) in note.into_values() {
        add(&mut found, outline, Tail::default(), Some("its file is gone".into()));
    }
    let stored = found.values().map(|(kept, damage)| (kept.told.outline.clone(), damage.clone())).collect();
    let kept = found.into_iter().map(|(key, (kept, _))| (key, kept)).collect();
    let written = watch::Sender::new(Written::default());
    Ok((Shelf { disk, kept: Mutex::new(kept), written, lock: Mutex::new(None) }, stored))
}

/// Sessions that were found, and why they are damaged.
type Sessions = BTreeMap<SessionKey, (Kept, Option<String>)>;

/// Adds a session. Of two files with the same one an intact one counts, of those the later.
fn add(found: &mut Sessions, outline: Outline, tail: Tail, damage: Option<String>) {
    let key = outline.key.clone();
    if let Some(why) = &damage {
        tracing::warn!(session = %key, file = file::name(outline.id), why, "a stored session is damaged");
    }
    let damaged = damage.is_some();
    if let Some((other, _)) = found.get(&key) {
        tracing::warn!(session = %key, "two files have the same session; one of them is left alone");
        if (!other.damaged, other.id()) > (!damaged, outline.id) {
            return;
        }
    }
    let told = Snapshot { outline, contents: None };
    found.insert(key, (Kept { tail, told, damaged, unsure: false }, damage));
}
