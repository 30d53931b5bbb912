//! A session's snapshot as the list of its parts: a small file, named by the session's number, of one line of
//! JSON and a seal of it. It is written last, so that what it lists is on disk.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::SavedSnapshot;
use super::name::{Name, Naming, Piece};
use crate::ids::SessionId;
use crate::store::disk::{self, Disk};

/// End of the names of manifests' files.
const ENDING: &str = ".json";

/// Most bytes of a manifest; some 200 for each part.
const BYTES_MAX: usize = 1 << 20;

/// A part of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) piece: Piece,
    pub(super) name: Name,
    /// Bytes of its file.
    pub(super) bytes: u64,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Manifest {
    /// Whose cache it is, and of what.
    pub(super) key: Name,
    /// Time of the session's last use, in seconds since 1970.
    pub(super) used: u64,
    /// Its parts in the order of their ends; segments follow one another from the first token on.
    pub(super) parts: Vec<Listed>,
}

/// What a manifest's file says.
#[derive(Debug)]
pub(super) enum Read {
    /// A snapshot.
    Whole(Manifest),
    /// Something else than was written, or nothing that this mlxd can read.
    Damaged,
    /// There is no file.
    Missing,
}

/// Returns the name of a session's manifest.
pub(super) fn file(session: SessionId) -> String {
    format!("{:016x}{ENDING}", session.0)
}

/// Returns the session whose manifest has this name.
pub(super) fn session(file: &str) -> Option<SessionId> {
    let number = u64::from_str_radix(file.strip_suffix(ENDING)?, 16).ok().map(SessionId)?;
    (self::file(number) == file).then_some(number)
}

/// Returns a time as it is stored.
pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

impl Manifest {
    /// Returns the number of tokens.
    pub(super) fn tokens(&self) -> u32 {
        let ends = self.parts.iter().map(|part| part.piece.end());
        ends.max().unwrap_or(0)
    }

    /// Returns what it is, for its owner.
    pub(super) fn saved(&self) -> SavedSnapshot {
        let bytes = self.parts.iter().fold(0, |sum: u64, part| sum.saturating_add(part.bytes));
        SavedSnapshot { tokens: self.tokens(), bytes }
    }

    /// Returns the list of what is of these tokens: of whole segments, up to the last state that there is.
    pub(super) fn of(&self, tokens: &[u32]) -> Self {
        let is_state = |part: &&Listed| matches!(part.piece, Piece::States(_));
        let mut naming = Naming::new(self.key, tokens);
        let is_own = |part: &&Listed| naming.name(&part.piece) == Some(part.name);
        let mut parts: Vec<Listed> = self.parts.iter().take_while(is_own).cloned().collect();
        let end = |parts: &[Listed]| {
            let segments = parts.iter().filter(|part| !is_state(part));
            segments.map(|part| part.piece.end()).max().unwrap_or(0)
        };
        let last = end(&parts);
        parts.retain(|part| part.piece.end() <= last);
        if self.parts.iter().any(|part| is_state(&part)) {
            // Tokens after the last state cannot be restored.
            let saved = parts.iter().filter(is_state).map(|part| part.piece.end()).max().unwrap_or(0);
            parts.retain(|part| match &part.piece {
                Piece::Tokens(own) => own.start < saved,
                Piece::States(_) => true,
            });
        }
        Self { parts, ..self.clone() }
    }

    fn bytes(&self, session: SessionId) -> Vec<u8> {
        let parts: Vec<Value> = self.parts.iter().map(Listed::json).collect();
        let line = json!({ "format": 1, "key": self.key.to_string(), "used": self.used, "parts": parts });
        let line = line.to_string();
        format!("{line}\n{}\n", seal(session, &line)).into_bytes()
    }

    /// Returns the bytes of its file.
    pub(super) fn size(&self, session: SessionId) -> u64 {
        self.bytes(session).len() as u64
    }

    /// Writes it, in one step as others see it.
    pub(super) fn write(&self, disk: &dyn Disk, session: SessionId) -> io::Result<()> {
        disk::replace(disk, &file(session), &self.bytes(session))
    }
}

/// Reads a session's manifest.
pub(super) fn read(disk: &dyn Disk, session: SessionId) -> io::Result<Read> {
    let bytes = match disk.read(&file(session), 0, BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Read::Missing),
        Err(error) => return Err(error),
    };
    Ok(parsed(&bytes, session).map_or(Read::Damaged, Read::Whole))
}

fn parsed(bytes: &[u8], session: SessionId) -> Option<Manifest> {
    let (line, rest) = std::str::from_utf8(bytes).ok()?.split_once('\n')?;
    if rest.strip_suffix('\n')? != seal(session, line).to_string() {
        return None;
    }
    let value: Value = serde_json::from_str(line).ok()?;
    if value.get("format")?.as_u64()? != 1 {
        return None;
    }
    let parts = value.get("parts")?.as_array()?.iter().map(Listed::parsed).collect::<Option<Vec<_>>>()?;
    let manifest = Manifest {
        key: Name::parse(value.get("key")?.as_str()?)?,
        used: value.get("used")?.as_u64()?,
        parts,
    };
    manifest.is_in_order().then_some(manifest)
}

impl Manifest {
    /// Returns whether segments follow one another, and states stand in them.
    fn is_in_order(&self) -> bool {
        let (mut end, mut last) = (0, 0);
        self.parts.iter().all(|part| {
            let follows = match &part.piece {
                Piece::Tokens(tokens) => {
                    let follows = tokens.start == end && tokens.end > end;
                    end = tokens.end;
                    follows
                }
                Piece::States(length) => *length > 0,
            };
            let ordered = last <= part.piece.end();
            last = part.piece.end();
            follows && ordered
        }) && last == end
    }
}

impl Listed {
    fn json(&self) -> Value {
        let (kind, start, end) = match &self.piece {
            Piece::Tokens(tokens) => ("tokens", tokens.start, tokens.end),
            Piece::States(length) => ("states", 0, *length),
        };
        json!({ "kind": kind, "start": start, "end": end, "name": self.name.to_string(), "bytes": self.bytes })
    }

    fn parsed(value: &Value) -> Option<Self> {
        let number = |key: &str| u32::try_from(value.get(key)?.as_u64()?).ok();
        let piece = match value.get("kind")?.as_str()? {
            "tokens" => Piece::Tokens(number("start")?..number("end")?),
            "states" => Piece::States(number("end")?),
            _ => return None,
        };
        let name = Name::parse(value.get("name")?.as_str()?)?;
        Some(Self { piece, name, bytes: value.get("bytes")?.as_u64()? })
    }
}

/// Returns the seal of a session's line: of another session it is another.
fn seal(session: SessionId, line: &str) -> Name {
    let mut hash = Sha256::new_with_prefix(session.0.to_le_bytes());
    hash.update(line);
    Name(hash.finalize().into())
}
