//! A file that one process holds locked, with its process id inside: one daemon per socket and per state
//! folder. The file stays when the process ends: removing it would let two lock two files of the same name.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags, flock};

/// Bytes of a process id and the end of its line, at most.
const PID_BYTES_MAX: u64 = 20;

/// Why a file is not locked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// Another process holds it.
    #[error("the process {pid} holds it")]
    Held {
        /// Process id of the other.
        pid: String,
    },
    /// It cannot be opened, or is not a lock.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Locks a file for as long as the answer is open; makes it if it is missing.
///
/// # Errors
/// Another process holds it, or it cannot be opened, or it is something else than a lock.
pub(crate) fn lock(path: &Path) -> Result<File, LockError> {
    let mut lock = open(path)?;
    if let Err(error) = flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        if error != rustix::io::Errno::WOULDBLOCK {
            return Err(io::Error::from(error).into());
        }
        let mut pid = String::new();
        lock.take(PID_BYTES_MAX).read_to_string(&mut pid)?;
        return Err(LockError::Held { pid: pid.trim().to_owned() });
    }
    lock.set_len(0)?;
    lock.rewind()?;
    writeln!(lock, "{}", std::process::id())?;
    Ok(lock)
}

/// Opens the lock file, or makes it. A link, or a file that holds anything but a process id, is not ours to
/// write to.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    // Bits of the system's own flags, which fit its own type of them.
    options.custom_flags(OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits().cast_signed());
    let foreign = |why: &str| io::Error::other(format!("{} {why}", path.display()));
    let mut file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            return Err(foreign("is a link"));
        }
        Err(error) => return Err(error),
    };
    let mut content = Vec::new();
    let is_file = file.metadata()?.is_file();
    if is_file {
        Read::take(&mut file, PID_BYTES_MAX + 1).read_to_end(&mut content)?;
    }
    let is_pid = content.iter().all(|byte| byte.is_ascii_digit() || *byte == b'\n');
    if !is_file || !is_pid || content.len() as u64 > PID_BYTES_MAX {
        return Err(foreign("exists and is not a daemon's lock"));
    }
    file.rewind()?;
    Ok(file)
}
