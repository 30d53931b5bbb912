//! The number of daemons that have started on a folder. Each numbers its sessions from a number of its own
//! on, so that none is given twice, also where files are gone or cannot be read.

use super::disk::{self, Disk};
use super::file::NUMBER_MAX;
use crate::ids::SessionId;

/// The file's name.
pub(super) const NAME: &str = "starts";

/// Bytes of it at most.
const BYTES_MAX: usize = 20;

/// Bits of the numbers that one daemon gives.
const BITS: u32 = 32;

/// Starts whose sessions can have files.
const STARTS_MAX: u64 = NUMBER_MAX >> BITS;

/// Counts a start, where `last` is the highest number of a file that was found. Returns the starts so far.
pub(super) fn count(disk: &dyn Disk, last: SessionId) -> u64 {
    let told = disk.read(NAME, 0, BYTES_MAX);
    let told = told.ok().and_then(|bytes| String::from_utf8_lossy(&bytes).trim().parse().ok());
    // Where it cannot be read, the files that there are still say enough.
    let starts = told.unwrap_or(0_u64).min(STARTS_MAX).max(last.0 >> BITS) + 1;
    if let Err(error) = disk::replace(disk, NAME, format!("{starts}\n").as_bytes()) {
        // A full disk: the sessions are there all the same.
        tracing::warn!(%error, file = NAME, "the number of starts cannot be written");
    }
    starts
}

/// Returns the first number of the daemon with this number of starts.
pub(super) fn first_number(starts: u64) -> SessionId {
    SessionId((starts << BITS) + 1)
}
