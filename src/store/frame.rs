//! The frames that a session's file is made of, one a record, one after the other:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | `mlx1` |
//! | 8, 8 | sizes of outline and content, least byte first |
//! | 16 | the seal of the frame before; zeros in the first |
//! | 16 | the seal of the content |
//! | 16 | the seal of all of this and of the outline |
//! | … | the outline, the content |
//!
//! A seal is the start of a SHA-256. Each frame names the one before, so that none can be missing, moved or
//! another file's; the sessions' outlines are read without their content.

use std::io;

use sha2::{Digest, Sha256};

use super::disk::Disk;
use crate::session::Record;

const MAGIC: [u8; 4] = *b"mlx1";

const SIZES_AT: usize = MAGIC.len();
const BEFORE_AT: usize = SIZES_AT + 16;
const CONTENT_SEAL_AT: usize = BEFORE_AT + SEAL_BYTES;
const SEAL_AT: usize = CONTENT_SEAL_AT + SEAL_BYTES;
pub(super) const HEADER_BYTES: usize = SEAL_AT + SEAL_BYTES;

pub(super) const SEAL_BYTES: usize = 16;

/// Bytes that are read at first: a header and most outlines.
const FIRST_READ_BYTES: usize = 4 << 10;

/// Bytes that are searched at a time for a frame.
const SEARCH_BYTES: usize = 1 << 20;

/// Bytes that are read of what may be frames, for each byte that is searched.
const FIND_TIMES: u64 = 4;

/// The least of them.
const FIND_BYTES_MIN: u64 = 1 << 20;

/// What identifies a frame and all before it.
pub(super) type Seal = [u8; SEAL_BYTES];

/// A frame whose outline is intact; its content has not been looked at.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) outline: Vec<u8>,
    pub(super) before: Seal,
    pub(super) seal: Seal,
    content_seal: Seal,
    content_at: u64,
    content_bytes: u64,
}

/// Appends a record's frame; returns its seal.
pub(super) fn put(bytes: &mut Vec<u8>, before: Seal, record: &Record) -> Seal {
    let Record { outline, content } = record;
    let start = bytes.len();
    bytes.extend(MAGIC);
    bytes.extend((outline.len() as u64).to_le_bytes());
    bytes.extend((content.len() as u64).to_le_bytes());
    bytes.extend(before);
    bytes.extend(seal_of(&[content]));
    let seal = seal_of(&[&bytes[start..], outline]);
    bytes.extend(seal);
    bytes.extend(outline);
    bytes.extend(content);
    seal
}

/// The start of a frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) outline_bytes: u64,
    pub(super) content_bytes: u64,
    pub(super) before: Seal,
    pub(super) seal: Seal,
    content_seal: Seal,
}

impl Header {
    /// Reads a header; none if there is none. Whether it is intact is not known before its outline is read.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let header = bytes.get(..HEADER_BYTES)?;
        if header[..SIZES_AT] != MAGIC {
            return None;
        }
        let (outline, rest) = header[SIZES_AT..].split_first_chunk()?;
        let content = rest.first_chunk()?;
        Some(Self {
            outline_bytes: u64::from_le_bytes(*outline),
            content_bytes: u64::from_le_bytes(*content),
            before: seal_at(header, BEFORE_AT),
            content_seal: seal_at(header, CONTENT_SEAL_AT),
            seal: seal_at(header, SEAL_AT),
        })
    }

    /// Returns the bytes of the frame; none if there cannot be as many.
    pub(super) fn frame_bytes(&self) -> Option<u64> {
        self.head_bytes()?.checked_add(self.content_bytes)
    }

    /// Returns the bytes of header and outline.
    fn head_bytes(&self) -> Option<u64> {
        (HEADER_BYTES as u64).checked_add(self.outline_bytes)
    }

    /// Returns the bytes of header and outline, if the frame may be in `room` bytes.
    fn head_within(&self, room: u64) -> Option<u64> {
        let is_within = self.frame_bytes().is_some_and(|end| end <= room);
        self.head_bytes().filter(|_| is_within)
    }

    /// Returns the outline after the header in `head`; none if one of the two is not intact.
    fn outline<'a>(&self, head: &'a [u8]) -> Option<&'a [u8]> {
        let (header, outline) = head.split_at_checked(HEADER_BYTES)?;
        (seal_of(&[&header[..SEAL_AT], outline]) == self.seal).then_some(outline)
    }

    /// Returns outline and content of a whole frame; none if it is not intact.
    pub(super) fn parts<'a>(&self, frame: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        let (head, content) = frame.split_at_checked(fitting(self.head_bytes()?))?;
        let outline = self.outline(head)?;
        (seal_of(&[content]) == self.content_seal).then_some((outline, content))
    }
}

/// Returns the frame at `at` of a file of `size` bytes; none if there is no intact one.
pub(super) fn at(disk: &dyn Disk, file: &str, at: u64, size: u64) -> io::Result<Option<Frame>> {
    let room = size.saturating_sub(at);
    let mut bytes = disk.read(file, at, FIRST_READ_BYTES.min(fitting(room)))?;
    let Some(header) = Header::read(&bytes) else { return Ok(None) };
    let Some(head) = header.head_within(room) else { return Ok(None) };
    if head > bytes.len() as u64 {
        bytes = disk.read(file, at, fitting(head))?;
    }
    bytes.truncate(fitting(head));
    let Some(outline) = header.outline(&bytes) else { return Ok(None) };
    let Header { before, seal, content_seal, content_bytes, .. } = header;
    let (outline, content_at) = (outline.to_vec(), at + head);
    Ok(Some(Frame { outline, before, seal, content_seal, content_at, content_bytes }))
}

/// What lies beyond the last frame that follows from those before it.
#[derive(Debug)]
pub(super) enum Beyond {
    /// No frame.
    Nothing,
    /// An intact one, the first.
    Frame(Frame),
    /// More beginnings of frames than were looked at, none of them intact so far.
    Unclear,
}

/// Searches for an intact frame from `from` on. What the session says may be full of beginnings of frames: no
/// more is read for them than is searched, a few times over.
pub(super) fn find(disk: &dyn Disk, file: &str, from: u64, size: u64) -> io::Result<Beyond> {
    let mut start = from;
    let mut left = FIND_BYTES_MIN.max((size - from.min(size)) * FIND_TIMES);
    while size.saturating_sub(start) >= HEADER_BYTES as u64 {
        let bytes = disk.read(file, start, SEARCH_BYTES.min(fitting(size - start)))?;
        for (offset, header) in bytes.windows(HEADER_BYTES).enumerate() {
            let place = start + offset as u64;
            let header = Header::read(header);
            let Some(head) = header.and_then(|header| header.head_within(size - place)) else { continue };
            let Some(rest) = left.checked_sub(head.max(FIRST_READ_BYTES as u64)) else {
                return Ok(Beyond::Unclear);
            };
            left = rest;
            if let Some(frame) = at(disk, file, place, size)? {
                return Ok(Beyond::Frame(frame));
            }
        }
        if bytes.len() < SEARCH_BYTES {
            break;
        }
        // The next piece begins so that no header is cut apart.
        start += (bytes.len() - HEADER_BYTES) as u64 + 1;
    }
    Ok(Beyond::Nothing)
}

impl Frame {
    /// Returns where the next frame begins.
    pub(super) fn end(&self) -> u64 {
        self.content_at + self.content_bytes
    }

    /// Returns the content; none if it is not what was written.
    pub(super) fn content(&self, disk: &dyn Disk, file: &str) -> io::Result<Option<Vec<u8>>> {
        let content = disk.read(file, self.content_at, fitting(self.content_bytes))?;
        Ok((seal_of(&[&content]) == self.content_seal).then_some(content))
    }
}

/// Returns the seal of bytes that follow one another.
pub(super) fn seal_of(parts: &[&[u8]]) -> Seal {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    seal_at(&hash.finalize(), 0)
}

/// Returns a seal out of bytes that have one at `at`.
fn seal_at(bytes: &[u8], at: usize) -> Seal {
    let mut seal = Seal::default();
    seal.copy_from_slice(&bytes[at..at + SEAL_BYTES]);
    seal
}

/// Returns a size in memory; files have no more bytes than fit.
fn fitting(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
