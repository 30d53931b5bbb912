//! One session's file: named by the session's number, appended to with each change, written anew when most of
//! it no longer counts. A power failure may leave the last frame torn: it was not acknowledged, and the next
//! one takes its place. A frame that is wrong anywhere else, or is missing, is damage of this session alone.

use std::io;

use super::disk::Disk;
use super::frame::{self, Beyond, Frame, Seal};
use crate::ids::SessionId;
use crate::session::{Contents, Outline, RecordError, Replay, Snapshot, record, whole};

/// Bytes beyond twice the session's own before its file is written anew.
pub(super) const SLACK_BYTES: u64 = 64 << 10;

/// Why a session is damaged, mostly.
const CHANGED: &str = "a part of its file was changed";

/// Why it is damaged where there is no file.
pub(super) const GONE: &str = "its file is gone";

/// The end of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tail {
    pub(super) size: u64,
    pub(super) seal: Seal,
}

/// What a file says.
#[derive(Debug)]
pub(super) enum Found {
    /// A session, without its content; and the bytes of a torn frame.
    Whole(Outline, Tail, u64),
    /// A session that cannot be read, and why; and whether it says that it has this file, as no copy does.
    Damaged(Outline, String, bool),
    /// Nobody's: not even its name can be read.
    Unreadable,
}

/// Bytes to write, and the end of the file after them.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) bytes: Vec<u8>,
    pub(super) tail: Tail,
}

/// Returns the name of a session's file.
pub(super) fn name(id: SessionId) -> String {
    format!("{:016x}", id.0)
}

/// Highest number of a session that has a file; those above it leave room to go on numbering.
pub(super) const NUMBER_MAX: u64 = u64::MAX >> 1;

/// Returns the session whose file has this name.
pub(super) fn id(name: &str) -> Option<SessionId> {
    let number = u64::from_str_radix(name, 16).ok().filter(|number| *number <= NUMBER_MAX)?;
    let id = SessionId(number);
    (self::name(id) == name).then_some(id)
}

/// Returns what to append so that the file tells `now`; none if it does already.
pub(super) fn appended(tail: Tail, before: &Snapshot, now: &Snapshot) -> Option<Piece> {
    let record = record(Some(before), now)?;
    let mut bytes = Vec::new();
    let seal = frame::put(&mut bytes, tail.seal, &record);
    let size = tail.size + bytes.len() as u64;
    Some(Piece { bytes, tail: Tail { size, seal } })
}

/// Returns a whole file that tells `now`.
pub(super) fn anew(now: &Snapshot) -> Piece {
    let mut bytes = Vec::new();
    let seal =
        whole(now).iter().fold(Seal::default(), |before, record| frame::put(&mut bytes, before, record));
    let size = bytes.len() as u64;
    Piece { bytes, tail: Tail { size, seal } }
}

/// Returns whether most of a file of `size` bytes no longer counts.
pub(super) fn is_stale(size: u64, now: &Snapshot) -> bool {
    let Outline { sizes, turn_charges, .. } = &now.outline;
    let turns: usize = turn_charges.iter().map(|turn| turn.bytes).sum();
    let own = sizes.text_bytes + sizes.tokens * size_of::<u32>() + turns;
    size > 2 * own as u64 + SLACK_BYTES
}

/// Frames of a file that is written at once: it gets its name only when they are durable.
const FRAMES_AT_ONCE: usize = 2;

/// Reads what a file says, without the content, which only the last frame's is compared with its seal: unless
/// the file ends where it is `known` to end, that frame may be torn.
pub(super) fn look(disk: &dyn Disk, id: SessionId, known: Option<Tail>) -> io::Result<Found> {
    let file = &name(id);
    let size = disk.size(file)?;
    let mut read = read(disk, file, size)?;
    if let Some(last) = read.last.take_if(|last| known != Some(read.tail) && last.frames > FRAMES_AT_ONCE)
        && last.frame.content(disk, file)?.is_none()
    {
        read = self::read(disk, file, last.start)?;
    }
    let beyond = frame::find(disk, file, read.tail.size + 1, size)?;
    let is_torn = matches!(beyond, Beyond::Nothing);
    let facts = || read.facts.or_else(|| told_beyond(id, &beyond));
    let why = match (read.fault, &read.outline) {
        (Some(error), _) => error.to_string(),
        (None, Some(outline)) if outline.id != id => "the file of another session has its name".into(),
        (None, _) if !is_torn || read.frames < FRAMES_AT_ONCE => CHANGED.into(),
        (None, _) if known.is_some_and(|known| known != read.tail) => {
            "its file does not end where it did".into()
        }
        (None, _) => {
            let (tail, torn) = (read.tail, size - read.tail.size);
            return Ok(read.outline.map_or(Found::Unreadable, |outline| Found::Whole(outline, tail, torn)));
        }
    };
    // The number is the one by which the file is found.
    Ok(facts().map_or(Found::Unreadable, |facts| {
        let is_own = facts.id == id;
        Found::Damaged(Outline { id, ..facts }, why, is_own)
    }))
}

/// Returns what a frame beyond the first ones says of the session. A conversation may hold what looks like a
/// frame, and speak of anybody's session in it.
fn told_beyond(id: SessionId, beyond: &Beyond) -> Option<Outline> {
    let Beyond::Frame(frame) = beyond else { return None };
    Replay::alone(&frame.outline).ok().filter(|facts| facts.id == id)
}

/// What intact frames say.
#[derive(Default)]
struct Read {
    /// What the first one says by itself.
    facts: Option<Outline>,
    outline: Option<Outline>,
    frames: usize,
    tail: Tail,
    last: Option<Last>,
    /// Why the frame after them is intact and yet cannot follow.
    fault: Option<RecordError>,
}

/// The last frame, where it starts, and the number of frames with it.
struct Last {
    frame: Frame,
    start: u64,
    frames: usize,
}

fn read(disk: &dyn Disk, file: &str, size: u64) -> io::Result<Read> {
    let (mut read, mut replay) = (Read::default(), Replay::default());
    while let Some(frame) = next(disk, file, read.tail, size)? {
        if read.facts.is_none() {
            read.facts = Replay::alone(&frame.outline).ok();
        }
        if let Err(error) = replay.outline(&frame.outline) {
            read.fault = Some(error);
            break;
        }
        read.frames += 1;
        let start = read.tail.size;
        read.tail = Tail { size: frame.end(), seal: frame.seal };
        read.last = Some(Last { frame, start, frames: read.frames });
    }
    read.outline = replay.into_outline();
    Ok(read)
}

/// Why a session's content is not there.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its file says something else than was written.
    #[error("{0}")]
    Damaged(String),
    /// Its file cannot be read now.
    #[error("its file cannot be read: {0}")]
    Io(io::Error),
}

impl From<io::Error> for LoadError {
    fn from(error: io::Error) -> Self {
        // Nobody brings it back; everything else may pass.
        if error.kind() == io::ErrorKind::NotFound { Self::Damaged(GONE.into()) } else { Self::Io(error) }
    }
}

impl From<RecordError> for LoadError {
    fn from(error: RecordError) -> Self {
        Self::Damaged(error.to_string())
    }
}

/// Reads the content that a file has up to `tail`.
pub(super) fn load(disk: &dyn Disk, id: SessionId, tail: Tail) -> Result<Contents, LoadError> {
    let changed = || LoadError::Damaged(CHANGED.into());
    let file = &name(id);
    let (mut replay, mut at) = (Replay::default(), Tail::default());
    while at.size < tail.size {
        let frame = next(disk, file, at, tail.size)?.ok_or_else(changed)?;
        let keeps = replay.outline(&frame.outline)?;
        replay.content(keeps, &frame.content(disk, file)?.ok_or_else(changed)?)?;
        at = Tail { size: frame.end(), seal: frame.seal };
    }
    if at == tail { Ok(replay.into_contents()) } else { Err(changed()) }
}

/// Returns the frame that follows `tail`; none if there is no intact one.
fn next(disk: &dyn Disk, file: &str, tail: Tail, size: u64) -> io::Result<Option<Frame>> {
    Ok(frame::at(disk, file, tail.size, size)?.filter(|frame| frame.before == tail.seal))
}
