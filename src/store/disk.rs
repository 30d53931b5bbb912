//! The folder that holds the store's files: a real one, and in tests one that fails and loses what was not
//! synced.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// Files by name. What is written survives a power failure once the file is synced, a new or changed name
/// once the names are.
pub(super) trait Disk: Send + Sync {
    /// Returns the names of all files.
    fn names(&self) -> io::Result<Vec<String>>;

    /// Returns a file's size in bytes.
    fn size(&self, name: &str) -> io::Result<u64>;

    /// Returns bytes of a file from `at` on; fewer than `bytes` at its end.
    fn read(&self, name: &str, at: u64, bytes: usize) -> io::Result<Vec<u8>>;

    /// Makes the file's content end with `bytes` at `at`; makes the file if it is missing.
    fn write(&self, name: &str, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes a file's content durable.
    fn sync(&self, name: &str) -> io::Result<()>;

    /// Gives a file another name, whose file it replaces.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file; one that is missing is removed already.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes the names durable.
    fn sync_names(&self) -> io::Result<()>;

    /// Returns how much room there is.
    fn room(&self) -> io::Result<Room>;
}

/// The room of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// Bytes that this user may still write.
    pub(super) free_bytes: u64,
    /// Bytes of all of it.
    pub(super) total_bytes: u64,
}

/// A folder of the file system, for this user only.
#[derive(Debug)]
pub(super) struct Folder(PathBuf);

impl Folder {
    /// Opens a folder; makes it, and those above it, if it is missing. A folder that was made is there after
    /// a power failure too.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        for parent in make(path)? {
            File::open(parent)?.sync_all()?;
        }
        Ok(Self(path.to_owned()))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

/// Makes a folder and those above it that are missing; returns the folders that got a new name in them.
pub(super) fn make(path: &Path) -> io::Result<Vec<PathBuf>> {
    let missing = path.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists());
    let parents = missing.map(|folder| match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        Some(_) | None => PathBuf::from("."),
    });
    let parents = parents.collect();
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    Ok(parents)
}

/// Returns options that follow no link and wait for nobody: what is not a plain file is not ours.
fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    // Bits of the system's own flags, which fit its own type of them.
    options.custom_flags(OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits().cast_signed());
    options
}

impl Disk for Folder {
    fn names(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.0)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        // Names of other tools, which need not be text, are not ours.
        names.filter_map(Result::transpose).collect()
    }

    fn size(&self, name: &str) -> io::Result<u64> {
        let found = fs::symlink_metadata(self.file(name))?;
        if found.is_file() { Ok(found.len()) } else { Err(io::Error::other("it is not a file")) }
    }

    fn read(&self, name: &str, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let file = options().read(true).open(self.file(name))?;
        let mut read = vec![0; bytes];
        let mut done = 0;
        while done < bytes {
            match file.read_at(&mut read[done..], at + done as u64) {
                Ok(0) => break,
                Ok(more) => done += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        read.truncate(done);
        Ok(read)
    }

    fn write(&self, name: &str, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut options = options();
        let file = options.write(true).create(true).truncate(false).mode(0o600).open(self.file(name))?;
        if file.metadata()?.len() != at {
            file.set_len(at)?;
        }
        file.write_all_at(bytes, at)
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        options().read(true).open(self.file(name))?.sync_data()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.file(from), self.file(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.file(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            // A folder of this name was made by somebody else, and has no file of ours.
            Err(_) if fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir()) => Ok(()),
            removed => removed,
        }
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }

    fn room(&self) -> io::Result<Room> {
        let disk = rustix::fs::statvfs(&self.0)?;
        let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize);
        Ok(Room { free_bytes: bytes(disk.f_bavail), total_bytes: bytes(disk.f_blocks) })
    }
}

/// End of the name of a file that is being written.
pub(super) const NEW: &str = ".new";

/// Writes a whole file and gives it its name, which is not durable yet: after a power failure there is the
/// old file or the new one. A file that could not be written leaves nothing behind: its bytes may be what
/// lacks.
pub(super) fn put(disk: &dyn Disk, name: &str, bytes: &[u8]) -> io::Result<()> {
    let new = format!("{name}{NEW}");
    let written = disk.write(&new, 0, bytes).and_then(|()| disk.sync(&new));
    let named = written.and_then(|()| disk.rename(&new, name));
    if named.is_err() {
        // The next start removes it if this fails too.
        drop(disk.remove(&new));
    }
    named
}

/// Replaces a whole file, durably.
pub(super) fn replace(disk: &dyn Disk, name: &str, bytes: &[u8]) -> io::Result<()> {
    put(disk, name, bytes)?;
    disk.sync_names()
}
