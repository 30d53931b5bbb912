//! A session as one file that leaves the daemon: written and read in pieces, of which only one is in memory
//! besides the session.
//!
//! | bytes | what |
//! |---|---|
//! | 12 | `mlxd session` |
//! | 4 | the format, least byte first |
//! | … | frames, as in the files of the store ([`frame`]) |
//! | 4, 16 | `end.`, and the seal of that and of the last frame's seal |
//!
//! The seals say that the file is what was written, not by whom: what is read is checked as anybody's bytes.

use super::frame::{self, Header, SEAL_BYTES, Seal, seal_of};
use crate::session::{Contents, Joined, Outline, PieceError, Pieces, RecordError};

const MAGIC: [u8; 12] = *b"mlxd session";

/// Format of the file. In format 1, all that an answer says is its message's text; it is read too.
const FORMAT: u32 = 2;

const START_BYTES: usize = MAGIC.len() + size_of::<u32>();

const END: [u8; 4] = *b"end.";

const END_BYTES: usize = END.len() + SEAL_BYTES;

/// Bytes of a file beyond twice those of its session.
const SLACK_BYTES: usize = 64 << 10;

/// A session on its way out.
#[derive(Debug)]
pub struct Export {
    pieces: Pieces,
    seal: Seal,
    has_begun: bool,
    has_ended: bool,
}

impl Export {
    /// Returns the file of a session.
    #[must_use]
    pub fn new(outline: &Outline, contents: Contents) -> Self {
        let pieces = Pieces::new(outline, contents);
        Self { pieces, seal: Seal::default(), has_begun: false, has_ended: false }
    }
}

impl Iterator for Export {
    type Item = Vec<u8>;

    /// Returns the next part of the file.
    fn next(&mut self) -> Option<Vec<u8>> {
        if self.has_ended {
            return None;
        }
        let mut bytes = Vec::new();
        if !self.has_begun {
            bytes.extend(MAGIC);
            bytes.extend(FORMAT.to_le_bytes());
            self.has_begun = true;
        }
        if let Some(record) = self.pieces.next() {
            self.seal = frame::put(&mut bytes, self.seal, &record);
        } else {
            bytes.extend(end(self.seal));
            self.has_ended = true;
        }
        Some(bytes)
    }
}

/// Returns the end of a file.
fn end(last: Seal) -> Vec<u8> {
    [&END[..], &seal_of(&[&END, &last])].concat()
}

/// Why bytes are not a session's file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortableError {
    /// They do not begin as one.
    #[error("it is not a file of a session")]
    Foreign,
    /// A newer mlxd wrote it.
    #[error("it has format {found}; this mlxd reads formats up to {known}")]
    Format {
        /// Its format.
        found: u32,
        /// The newest that is known.
        known: u32,
    },
    /// Some of it is not what was written.
    #[error("it is damaged at byte {at}")]
    Damaged {
        /// Where the damaged part begins.
        at: u64,
    },
    /// It ends too early.
    #[error("it ends too early")]
    Incomplete,
    /// It goes on after its end.
    #[error("it goes on after its end")]
    Overlong,
    /// It is intact, and yet no session.
    #[error("{0}")]
    Record(#[from] RecordError),
    /// The session has more bytes than it may.
    #[error("the session has more than {limit_bytes} bytes")]
    TooLarge {
        /// The limit.
        limit_bytes: usize,
    },
}

impl From<PieceError> for PortableError {
    fn from(error: PieceError) -> Self {
        match error {
            PieceError::Record(error) => Self::Record(error),
            PieceError::TooLarge { limit_bytes } => Self::TooLarge { limit_bytes },
        }
    }
}

/// A session on its way in.
#[derive(Debug)]
pub struct Import {
    joined: Joined,
    limit_bytes: usize,
    /// What has come of the next part.
    buffer: Vec<u8>,
    /// Bytes of the file before the buffer.
    at: u64,
    seal: Seal,
    state: State,
}

/// Which part of the file comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    Frames,
    /// None.
    Ended,
}

impl Import {
    /// Returns a session of which nothing has come. It may have at most `limit_bytes`.
    #[must_use]
    pub fn new(limit_bytes: usize) -> Self {
        let (joined, buffer, seal) = (Joined::default(), Vec::new(), Seal::default());
        Self { joined, limit_bytes, buffer, at: 0, seal, state: State::Start }
    }

    /// Returns the bytes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.joined.bytes() + self.buffer.len()
    }

    /// Takes the next bytes of the file.
    ///
    /// # Errors
    /// They are not those of a session, or the session is too large.
    pub fn add(&mut self, bytes: &[u8]) -> Result<(), PortableError> {
        if self.at + (self.buffer.len() + bytes.len()) as u64 > self.file_bytes_max() as u64 {
            return Err(PortableError::TooLarge { limit_bytes: self.limit_bytes });
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.extend_from_slice(bytes);
        let mut rest = &*buffer;
        loop {
            let taken = self.take(rest)?;
            if taken == 0 {
                break;
            }
            self.at += taken as u64;
            rest = &rest[taken..];
        }
        let taken = buffer.len() - rest.len();
        if taken < buffer.len() {
            buffer.drain(..taken);
            self.buffer = buffer;
        }
        Ok(())
    }

    /// Returns the bytes that a file may have.
    fn file_bytes_max(&self) -> usize {
        self.limit_bytes.saturating_mul(2).saturating_add(SLACK_BYTES)
    }

    /// Takes the next part of the file, with which `bytes` begin; returns its size, 0 if it is not all there.
    fn take(&mut self, bytes: &[u8]) -> Result<usize, PortableError> {
        match self.state {
            State::Start => self.take_start(bytes),
            State::Frames if bytes.starts_with(&END) => self.take_end(bytes),
            State::Frames => self.take_frame(bytes),
            State::Ended if bytes.is_empty() => Ok(0),
            State::Ended => Err(PortableError::Overlong),
        }
    }

    fn take_start(&mut self, bytes: &[u8]) -> Result<usize, PortableError> {
        let known = bytes.len().min(MAGIC.len());
        if bytes[..known] != MAGIC[..known] {
            return Err(PortableError::Foreign);
        }
        let Some(format) = bytes.get(MAGIC.len()..).and_then(<[u8]>::first_chunk) else { return Ok(0) };
        match u32::from_le_bytes(*format) {
            1..=FORMAT => {
                self.state = State::Frames;
                Ok(START_BYTES)
            }
            0 => Err(PortableError::Foreign),
            found => Err(PortableError::Format { found, known: FORMAT }),
        }
    }

    fn take_frame(&mut self, bytes: &[u8]) -> Result<usize, PortableError> {
        if bytes.len() < frame::HEADER_BYTES {
            return Ok(0);
        }
        let damaged = || PortableError::Damaged { at: self.at };
        let header = Header::read(bytes).filter(|header| header.before == self.seal).ok_or_else(damaged)?;
        let frame_bytes = header.frame_bytes().and_then(|bytes| usize::try_from(bytes).ok());
        // A larger one would not come to its end before it is refused.
        let frame_bytes = frame_bytes.filter(|bytes| *bytes <= self.file_bytes_max()).ok_or_else(damaged)?;
        let Some(frame) = bytes.get(..frame_bytes) else { return Ok(0) };
        let (outline, content) = header.parts(frame).ok_or_else(damaged)?;
        self.joined.add(outline, content, self.limit_bytes)?;
        self.seal = header.seal;
        Ok(frame_bytes)
    }

    fn take_end(&mut self, bytes: &[u8]) -> Result<usize, PortableError> {
        let Some(found) = bytes.get(..END_BYTES) else { return Ok(0) };
        if found != end(self.seal) {
            return Err(PortableError::Damaged { at: self.at });
        }
        self.state = State::Ended;
        Ok(END_BYTES)
    }

    /// Returns the session once all of it has come.
    ///
    /// # Errors
    /// The file is not complete, or no session's.
    pub fn finish(self) -> Result<(Outline, Contents), PortableError> {
        if self.state != State::Ended {
            return Err(PortableError::Incomplete);
        }
        Ok(self.joined.into_session()?)
    }
}

#[cfg(test)]
#[path = "portable_tests.rs"]
mod tests;
