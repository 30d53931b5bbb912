//! The unix socket and its lock. One daemon per socket: the lock file beside it holds the owner's process id.
//! A socket left behind by a dead daemon is replaced, that of a live one is not, and no other file is
//! removed or written.

use std::fs::{DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::process::umask;
use tokio::net::UnixListener;

use super::DaemonError;
use crate::lock::{LockError, lock};

/// A socket path that this process has locked.
#[derive(Debug)]
pub(super) struct SocketLock {
    socket: PathBuf,
    /// Locked while it is open.
    _lock: File,
}

/// A listening socket and the guard of its file.
#[derive(Debug)]
pub(super) struct BoundSocket {
    pub(super) listener: UnixListener,
    pub(super) file: SocketFile,
}

/// Removes the socket's file on drop, unless another has taken its place.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: FileIdentity,
}

/// What tells a file from a later one of the same name, which may have the same number.
type FileIdentity = (u64, u64, i64, i64);

impl SocketLock {
    /// Locks the path for this process; creates its folder if it is missing.
    pub(super) fn take(socket: &Path) -> Result<Self, DaemonError> {
        let fault = |source| DaemonError::Socket { socket: socket.to_owned(), source };
        if let Some(folder) = socket.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(fault)?;
        }
        let mut name = socket.as_os_str().to_owned();
        name.push(".lock");
        let lock = lock(Path::new(&name)).map_err(|error| match error {
            LockError::Held { pid } => DaemonError::Locked { socket: socket.to_owned(), pid },
            LockError::Io(source) => fault(source),
        })?;
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
        let listener = bound.map_err(fault)?;
        let identity = identity(&std::fs::symlink_metadata(socket).map_err(fault)?);
        Ok(BoundSocket { listener, file: SocketFile { path: socket.clone(), identity } })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // The file may have been removed already, and another daemon may have bound the path since.
        let found = std::fs::symlink_metadata(&self.path);
        if found.is_ok_and(|found| identity(&found) == self.identity) {
            drop(std::fs::remove_file(&self.path));
        }
    }
}

fn identity(metadata: &Metadata) -> FileIdentity {
    (metadata.dev(), metadata.ino(), metadata.mtime(), metadata.mtime_nsec())
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

    #[test]
    fn a_lock_that_is_a_link_or_another_file_is_neither_taken_nor_written() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, lock) = (folder.path().join("mlxd.sock"), folder.path().join("mlxd.sock.lock"));
        let precious = folder.path().join("precious");
        std::fs::write(&precious, "1234").unwrap();
        let refused = |word: &str| {
            let error = SocketLock::take(&socket).unwrap_err().to_string();
            assert!(error.contains("mlxd.sock.lock") && error.contains(word), "{error}");
            assert_eq!(std::fs::read(&precious).unwrap(), b"1234");
            std::fs::remove_file(&lock).unwrap();
        };
        std::os::unix::fs::symlink(&precious, &lock).unwrap();
        refused("link");
        std::os::unix::fs::symlink(folder.path().join("missing"), &lock).unwrap();
        refused("link");
        std::fs::write(&lock, "dear diary").unwrap();
        refused("not a daemon's lock");
        std::fs::write(&lock, "1".repeat(30)).unwrap();
        refused("not a daemon's lock");
        SocketLock::take(&socket).unwrap();
    }

    #[tokio::test]
    async fn the_socket_of_a_second_daemon_survives_the_end_of_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("mlxd.sock");
        let first = SocketLock::take(&socket).unwrap().bind().unwrap();
        std::fs::remove_file(&socket).unwrap();
        std::fs::remove_file(folder.path().join("mlxd.sock.lock")).unwrap();
        drop(first.listener);
        let second = SocketLock::take(&socket).unwrap().bind().unwrap();
        drop(first.file);
        assert!(UnixStream::connect(&socket).is_ok());
        drop(second);
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
