//! The unix socket and its lock. One daemon per socket: the lock file beside it holds the owner's process id.
//! A socket left behind by a dead daemon is replaced, that of a live one is not, and no other file is
//! removed.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::process::umask;
use tokio::net::UnixListener;

use super::DaemonError;

/// A socket path that this process has locked.
#[derive(Debug)]
pub(super) struct SocketLock {
    socket: PathBuf,
    /// Locked while it is open. The file stays when the daemon ends: removing it would let two daemons lock
    /// two files of the same name.
    _lock: File,
}

/// A listening socket and the guard of its file.
#[derive(Debug)]
pub(super) struct BoundSocket {
    pub(super) listener: UnixListener,
    pub(super) file: SocketFile,
}

/// Removes the socket's file on drop.
#[derive(Debug)]
pub(super) struct SocketFile(PathBuf);

impl SocketLock {
    /// Locks the path for this process; creates its folder if it is missing.
    pub(super) fn take(socket: &Path) -> Result<Self, DaemonError> {
        let fault = |source| DaemonError::Socket { socket: socket.to_owned(), source };
        if let Some(folder) = socket.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(fault)?;
        }
        let mut name = socket.as_os_str().to_owned();
        name.push(".lock");
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(Path::new(&name))
            .map_err(fault)?;
        if let Err(error) = flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(fault(error.into()));
            }
            let mut pid = String::new();
            lock.take(20).read_to_string(&mut pid).map_err(fault)?;
            return Err(DaemonError::Locked { socket: socket.to_owned(), pid: pid.trim().to_owned() });
        }
        lock.set_len(0).and_then(|()| lock.rewind()).map_err(fault)?;
        writeln!(lock, "{}", std::process::id()).map_err(fault)?;
        Ok(Self { socket: socket.to_owned(), _lock: lock })
    }

    /// Binds the socket with access for this user only.
    pub(super) fn bind(&self) -> Result<BoundSocket, DaemonError> {
        let socket = &self.socket;
        let fault = |source| DaemonError::Socket { socket: socket.clone(), source };
        match std::fs::symlink_metadata(socket) {
            Ok(found) if found.file_type().is_socket() => {
                // Another program may listen on the path without the lock.
                if UnixStream::connect(socket).is_ok() {
                    return Err(DaemonError::Locked { socket: socket.clone(), pid: "unknown".into() });
                }
                std::fs::remove_file(socket).map_err(fault)?;
            }
            Ok(_) => return Err(fault(io::Error::other("a file of that name exists and is not a socket"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(fault(error)),
        }
        // Set before the file exists, so that other users cannot connect in between.
        let before = umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(socket);
        umask(before);
        Ok(BoundSocket { listener: bound.map_err(fault)?, file: SocketFile(socket.clone()) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // The file may have been removed already.
        drop(std::fs::remove_file(&self.0));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_second_daemon_is_refused_with_the_firsts_pid() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("new/mlxd.sock");
        let first = SocketLock::take(&socket).unwrap();
        let mode = std::fs::metadata(socket.parent().unwrap()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let Err(DaemonError::Locked { pid, .. }) = SocketLock::take(&socket) else { panic!("taken twice") };
        assert_eq!(pid, std::process::id().to_string());
        drop(first);
        SocketLock::take(&socket).unwrap();
    }

    #[tokio::test]
    async fn a_stale_socket_is_taken_over_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("mlxd.sock");
        let lock = SocketLock::take(&socket).unwrap();
        let live = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(matches!(lock.bind(), Err(DaemonError::Locked { .. })));
        drop(live);
        let bound = lock.bind().unwrap();
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(bound);
        assert!(!socket.exists());
    }

    #[tokio::test]
    async fn a_file_that_is_not_a_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("mlxd.sock");
        std::fs::write(&socket, "precious").unwrap();
        let lock = SocketLock::take(&socket).unwrap();
        assert!(matches!(lock.bind(), Err(DaemonError::Socket { .. })));
        assert_eq!(std::fs::read(&socket).unwrap(), b"precious");
    }
}
