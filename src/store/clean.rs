//! The note that a daemon leaves when it stops in order: the sessions, and where the file of each ends. A
//! file that ends otherwise at the next start was changed meanwhile; without the note it may just be torn.

use std::collections::BTreeMap;
use std::io;

use super::disk::{self, Disk};
use super::file::Tail;
use super::frame::{self, Seal};
use crate::ids::SessionId;
use crate::session::{Outline, Record, Replay, Snapshot, whole};

/// Its name.
pub(super) const NAME: &str = "clean";

/// The sessions of a note, and where their files end.
pub(super) type Note = BTreeMap<SessionId, (Outline, Tail)>;

/// Leaves the note.
pub(super) fn leave<'a>(
    disk: &dyn Disk,
    sessions: impl Iterator<Item = (&'a Snapshot, Tail)>,
) -> io::Result<()> {
    let (mut bytes, mut seal) = (Vec::new(), Seal::default());
    for (told, Tail { size, seal: end }) in sessions {
        let [Record { outline, .. }, _] = whole(&Snapshot { contents: None, ..told.clone() });
        let content = [&size.to_le_bytes()[..], &end].concat();
        seal = frame::put(&mut bytes, seal, &Record { outline, content });
    }
    disk::replace(disk, NAME, &bytes)
}

/// Returns what of the note is intact; nothing where there is none.
pub(super) fn read(disk: &dyn Disk) -> io::Result<Note> {
    let mut note = Note::new();
    let size = match disk.size(NAME) {
        Ok(size) => size,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(note),
        Err(error) => return Err(error),
    };
    let (mut at, mut before) = (0, Seal::default());
    while let Some(frame) = frame::at(disk, NAME, at, size)?.filter(|frame| frame.before == before) {
        let content = frame.content(disk, NAME)?;
        let (Ok(outline), Some(tail)) =
            (Replay::alone(&frame.outline), content.and_then(|bytes| tail(&bytes)))
        else {
            break;
        };
        note.insert(outline.id, (outline, tail));
        (at, before) = (frame.end(), frame.seal);
    }
    Ok(note)
}

fn tail(bytes: &[u8]) -> Option<Tail> {
    let (size, seal) = bytes.split_first_chunk()?;
    Some(Tail { size: u64::from_le_bytes(*size), seal: seal.try_into().ok()? })
}
