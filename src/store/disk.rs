//! The folder that holds the store's files: a real one, and in tests one that fails and loses what was not
//! synced.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

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
}

/// A folder of the file system, for this user only.
#[derive(Debug)]
pub(super) struct Folder(PathBuf);

impl Folder {
    /// Opens a folder; makes it, and those above it, if it is missing.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        Ok(Self(path.to_owned()))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Disk for Folder {
    fn names(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.0)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        // Names of other tools, which need not be text, are not ours.
        names.filter_map(Result::transpose).collect()
    }

    fn size(&self, name: &str) -> io::Result<u64> {
        Ok(fs::metadata(self.file(name))?.len())
    }

    fn read(&self, name: &str, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let file = File::open(self.file(name))?;
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
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o600).open(self.file(name))?;
        if file.metadata()?.len() != at {
            file.set_len(at)?;
        }
        file.write_all_at(bytes, at)
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        File::open(self.file(name))?.sync_data()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.file(from), self.file(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.file(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }
}

/// End of the name of a file that is being written.
pub(super) const NEW: &str = ".new";

/// Replaces a whole file, so that after a power failure there is the old one or the new one.
pub(super) fn replace(disk: &dyn Disk, name: &str, bytes: &[u8]) -> io::Result<()> {
    let new = format!("{name}{NEW}");
    disk.write(&new, 0, bytes)?;
    disk.sync(&new)?;
    disk.rename(&new, name)?;
    disk.sync_names()
}
