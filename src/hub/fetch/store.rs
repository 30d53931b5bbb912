//! The Hugging Face cache on disk, written as Python's huggingface_hub writes it (file_download.py): blobs by
//! hash, snapshots of links to them, refs, and a lock file by blob. Each step is atomic: a blob, a snapshot
//! and a ref appear whole or not at all, so both may use the cache at the same time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::FetchError;
use super::api::{Digest, Listed};
use super::repo::RepoName;

/// Marks the cache for backup tools (bford.info/cachedir).
const CACHE_TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55\n\
    # This file is a cache directory tag created by huggingface_hub.\n";

/// Access to a lock file, as Python's: several users may share a cache.
const LOCK_MODE: u32 = 0o664;

/// The folder of a repo in the cache.
#[derive(Clone, Debug)]
pub(super) struct RepoFolder {
    pub(super) path: PathBuf,
    locks: PathBuf,
    tag: PathBuf,
}

/// The lock of a blob; released when dropped. The file stays, as Python's does, so that all who wait for it
/// lock the same one.
#[derive(Debug)]
pub(super) struct BlobLock(#[allow(dead_code, reason = "closing it releases the lock")] File);

impl RepoFolder {
    pub(super) fn new(cache: &Path, repo: &RepoName) -> Self {
        let locks = cache.join(".locks").join(repo.folder_name());
        Self { path: cache.join(repo.folder_name()), locks, tag: cache.join("CACHEDIR.TAG") }
    }

    /// Makes the folders that are missing.
    pub(super) fn create(&self) -> Result<(), FetchError> {
        for folder in [&self.path.join("blobs"), &self.locks] {
            fs::create_dir_all(folder).map_err(FetchError::io(folder))?;
        }
        if !self.tag.exists() {
            // For backup tools only.
            _ = fs::write(&self.tag, CACHE_TAG);
        }
        Ok(())
    }

    /// Returns the path of a file's content.
    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.path.join("blobs").join(digest.as_str())
    }

    /// Returns the folder of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.path.join("snapshots").join(commit)
    }

    /// Returns whether a file's content is in the cache. One of another size is not it.
    pub(super) fn has(&self, file: &Listed) -> bool {
        fs::metadata(self.blob(&file.digest)).is_ok_and(|found| found.is_file() && found.len() == file.size)
    }

    /// Takes the lock of a blob; `None` while another process has it.
    pub(super) fn try_lock(&self, digest: &Digest) -> Result<Option<BlobLock>, FetchError> {
        let path = self.locks.join(format!("{}.lock", digest.as_str()));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(LOCK_MODE);
        let file = options.open(&path).map_err(FetchError::io(&path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(BlobLock(file))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            // Some network file systems have no locks. Blobs are renamed into place, so nothing breaks.
            Err(Errno::NOSYS | Errno::OPNOTSUPP | Errno::NOLCK) => Ok(Some(BlobLock(file))),
            Err(error) => Err(FetchError::io(&path)(error.into())),
        }
    }

    /// Returns whether a process holds the lock of one of the repo's blobs.
    pub(super) fn is_locked(&self) -> Result<bool, FetchError> {
        for entry in fs::read_dir(&self.locks).into_iter().flatten().flatten() {
            let path = entry.path();
            let file = File::open(&path).map_err(FetchError::io(&path))?;
            if flock(&file, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes the snapshot of a commit: a link to the blob of each file. A new one appears whole; in one that
    /// is there, `config.json` comes last, without which nothing is a model.
    pub(super) fn publish(&self, commit: &str, files: &[Listed]) -> Result<PathBuf, FetchError> {
        let snapshot = self.snapshot(commit);
        let parent = self.path.join("snapshots");
        fs::create_dir_all(&parent).map_err(FetchError::io(&parent))?;
        if !snapshot.exists() {
            // Beside the snapshots: links from there lead to the same places after the rename.
            let draft = self.path.join("snapshots.mlxd").join(format!("{commit}.{}", std::process::id()));
            self.link(&draft, files)?;
            let renamed = fs::rename(&draft, &snapshot);
            _ = fs::remove_dir_all(&draft);
            _ = fs::remove_dir(self.path.join("snapshots.mlxd"));
            match renamed {
                Ok(()) => return Ok(snapshot),
                // Another process was faster.
                Err(_) if snapshot.exists() => {}
                Err(error) => return Err(FetchError::io(&snapshot)(error)),
            }
        }
        self.link(&snapshot, files)?;
        Ok(snapshot)
    }

    fn link(&self, folder: &Path, files: &[Listed]) -> Result<(), FetchError> {
        let is_last = |file: &&Listed| file.path == "config.json";
        let last = files.iter().filter(is_last);
        for file in files.iter().filter(|file| !is_last(file)).chain(last) {
            let path = folder.join(&file.path);
            let up = "../".repeat(1 + file.path.split('/').count());
            let target = PathBuf::from(format!("{up}blobs/{}", file.digest.as_str()));
            if fs::read_link(&path).is_ok_and(|found| found == target) {
                continue;
            }
            let parent = path.parent().unwrap_or(folder);
            fs::create_dir_all(parent).map_err(FetchError::io(parent))?;
            let draft = parent.join(format!(".{}.{}", file.digest.as_str(), std::process::id()));
            _ = fs::remove_file(&draft);
            symlink(&target, &draft).map_err(FetchError::io(&draft))?;
            fs::rename(&draft, &path).map_err(FetchError::io(&path))?;
        }
        Ok(())
    }

    /// Writes which commit a branch or tag is; readers see the old or the new one.
    pub(super) fn write_ref(&self, repo: &RepoName, commit: &str) -> Result<(), FetchError> {
        if repo.revision() == commit {
            return Ok(());
        }
        let path = self.path.join("refs").join(repo.revision());
        if fs::read_to_string(&path).is_ok_and(|known| known == commit) {
            return Ok(());
        }
        let parent = path.parent().unwrap_or(&self.path);
        fs::create_dir_all(parent).map_err(FetchError::io(parent))?;
        let draft = parent.join(format!("mlxd-{}.tmp", std::process::id()));
        let written = File::create(&draft).and_then(|mut file| {
            file.write_all(commit.as_bytes())?;
            file.sync_all()
        });
        written.and_then(|()| fs::rename(&draft, &path)).map_err(FetchError::io(&path))
    }

    /// Returns the commit that a branch or tag was when it was downloaded last, or the commit itself.
    pub(super) fn known_commit(&self, repo: &RepoName) -> Option<String> {
        let known = || fs::read_to_string(self.path.join("refs").join(repo.revision())).ok();
        repo.commit().map(str::to_owned).or_else(known).map(|commit| commit.trim().to_owned())
    }
}

/// Removes a file that may not be there.
pub(super) fn remove(path: &Path) -> Result<(), FetchError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FetchError::io(path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn world() -> (tempfile::TempDir, RepoFolder, RepoName) {
        let folder = tempfile::tempdir().unwrap();
        let repo = RepoName::parse("owner/name").unwrap();
        let store = RepoFolder::new(folder.path(), &repo);
        store.create().unwrap();
        (folder, store, repo)
    }

    #[test]
    fn a_snapshot_links_to_blobs_by_relative_paths() {
        let (_folder, store, _) = world();
        let files = [Listed::of("config.json", 2), Listed::of("additional_chat_templates/x.jinja", 2)];
        fs::write(store.blob(&files[0].digest), "{}").unwrap();
        let snapshot = store.publish(COMMIT, &files).unwrap();
        for file in &files {
            assert_eq!(fs::read_to_string(snapshot.join(&file.path)).unwrap(), "{}");
        }
        let target = fs::read_link(snapshot.join("config.json")).unwrap();
        assert_eq!(target, Path::new("../../blobs").join("0".repeat(40)));
        assert_eq!(store.publish(COMMIT, &files).unwrap(), snapshot, "again");
        let left: Vec<_> =
            fs::read_dir(&store.path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    #[test]
    fn files_join_a_snapshot_that_is_there() {
        let (_folder, store, _) = world();
        let snapshot = store.snapshot(COMMIT);
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(snapshot.join("README.md"), "x").unwrap();
        store.publish(COMMIT, &[Listed::of("config.json", 2)]).unwrap();
        let names = fs::read_dir(&snapshot).unwrap().count();
        assert_eq!(names, 2);
    }

    #[test]
    fn a_blob_of_another_size_is_not_the_file() {
        let (_folder, store, _) = world();
        let file = Listed::of("config.json", 2);
        assert!(!store.has(&file));
        fs::write(store.blob(&file.digest), "{").unwrap();
        assert!(!store.has(&file));
        fs::write(store.blob(&file.digest), "{}").unwrap();
        assert!(store.has(&file));
    }

    #[test]
    fn a_blob_has_one_lock() {
        let (folder, store, _) = world();
        let digest = Listed::of("x", 1).digest;
        let lock = store.try_lock(&digest).unwrap();
        assert!(lock.is_some());
        assert!(store.try_lock(&digest).unwrap().is_none());
        drop(lock);
        assert!(store.try_lock(&digest).unwrap().is_some());
        let name = format!("{}.lock", "0".repeat(40));
        assert!(folder.path().join(".locks/models--owner--name").join(name).exists());
    }

    #[test]
    fn a_ref_is_the_commit_and_nothing_else() {
        let (_folder, store, repo) = world();
        assert_eq!(store.known_commit(&repo), None);
        store.write_ref(&repo, COMMIT).unwrap();
        assert_eq!(fs::read_to_string(store.path.join("refs/main")).unwrap(), COMMIT);
        assert_eq!(store.known_commit(&repo).as_deref(), Some(COMMIT));
        let nested = RepoName::parse("owner/name@refs/pr/1").unwrap();
        store.write_ref(&nested, COMMIT).unwrap();
        assert_eq!(store.known_commit(&nested).as_deref(), Some(COMMIT));
        let pinned = RepoName::parse(&format!("owner/name@{COMMIT}")).unwrap();
        store.write_ref(&pinned, COMMIT).unwrap();
        assert_eq!(fs::read_dir(store.path.join("refs")).unwrap().count(), 2, "a commit needs no ref");
    }
}
