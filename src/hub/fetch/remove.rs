//! Removes a repo from the cache: at once for everybody who looks, then its files.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{Access, access};

use super::FetchError;
use super::repo::RepoName;
use super::store::RepoFolder;

/// How the hidden name begins that a repo has while it is removed; the repo's own and the process follow.
const REMOVED: &str = ".mlxd-removed-";

/// Removes every revision of a repo from the cache, and what an earlier removal left of any repo. Returns the
/// bytes freed.
///
/// # Errors
/// `NotFound` if there is nothing of it, `Busy` while a process downloads into it, `Io`; with the kind
/// `PermissionDenied` before anything is removed, if not all may be.
pub fn remove(cache: &Path, repo: &RepoName) -> Result<u64, FetchError> {
    let (left, of_repo) = remove_leftovers(cache, repo);
    let store = RepoFolder::new(cache, repo);
    let path = &store.path;
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => {
            let why = io::Error::other("is a link or a file, which is not the cache's to remove");
            return Err(FetchError::io(path)(why));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && of_repo => return Ok(left),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(FetchError::NotFound { what: format!("{} in the Hugging Face cache", repo.id()) });
        }
        Err(error) => return Err(FetchError::io(path)(error)),
    }
    if store.is_locked()? {
        return Err(FetchError::Busy { repo: repo.id().to_owned() });
    }
    check_removable(path)?;
    let bytes = bytes(&path.join("blobs"));
    // Nobody sees half of it.
    let gone = cache.join(format!("{REMOVED}{}-{}", repo.folder_name(), std::process::id()));
    fs::rename(path, &gone).map_err(FetchError::io(path))?;
    match fs::remove_dir_all(&gone) {
        // Another process removes leftovers.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FetchError::io(&gone)(error)),
        Ok(()) | Err(_) => Ok(left + bytes),
    }
}

/// Removes what earlier removals left, as far as that is possible. Returns the bytes, and whether `repo` was
/// among it.
fn remove_leftovers(cache: &Path, repo: &RepoName) -> (u64, bool) {
    let (mut freed, mut of_repo) = (0, false);
    let own = format!("{REMOVED}{}-", repo.folder_name());
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let (name, path) = (entry.file_name(), entry.path());
        let name = name.to_string_lossy();
        if !name.starts_with(REMOVED) {
            continue;
        }
        let bytes = bytes(&path.join("blobs"));
        if fs::remove_dir_all(&path).is_ok() {
            freed += bytes;
            of_repo |= name.starts_with(&own);
        }
    }
    (freed, of_repo)
}

/// Fails if a folder has a folder that this user may not remove files from. Links are not followed.
fn check_removable(folder: &Path) -> Result<(), FetchError> {
    access(folder, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|error| FetchError::io(folder)(error.into()))?;
    for entry in fs::read_dir(folder).map_err(FetchError::io(folder))? {
        let entry = entry.map_err(FetchError::io(folder))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            check_removable(&entry.path())?;
        }
    }
    Ok(())
}

/// Returns the bytes of a folder's own files.
fn bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.metadata().ok())
        .filter(fs::Metadata::is_file)
        .map(|file| file.len())
        .sum()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;

    use super::super::api::Listed;
    use super::*;

    #[test]
    fn a_repo_is_removed_whole_unless_somebody_downloads_it() {
        let folder = tempfile::tempdir().unwrap();
        let repo = RepoName::parse("owner/name").unwrap();
        let store = RepoFolder::new(folder.path(), &repo);
        assert!(matches!(remove(folder.path(), &repo), Err(FetchError::NotFound { .. })));
        store.create().unwrap();
        let file = Listed::of("config.json", 2);
        fs::write(store.blob(&file.digest), "{}").unwrap();
        let lock = store.try_lock(&file.digest).unwrap();
        assert!(matches!(remove(folder.path(), &repo), Err(FetchError::Busy { .. })));
        drop(lock);
        assert_eq!(remove(folder.path(), &repo).unwrap(), 2);
        assert!(!store.path.exists());
    }

    #[test]
    fn what_an_interrupted_removal_left_is_removed_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let leave = |name: &str| {
            let blobs = folder.path().join(name).join("blobs");
            fs::create_dir_all(&blobs).unwrap();
            fs::write(blobs.join("1"), "12345").unwrap();
        };
        let repo = RepoName::parse("owner/name").unwrap();
        leave(".mlxd-removed-models--owner--name-7");
        assert_eq!(remove(folder.path(), &repo).unwrap(), 5, "the repo itself is gone already");
        leave(".mlxd-removed-7");
        assert!(matches!(remove(folder.path(), &repo), Err(FetchError::NotFound { .. })));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        leave(".mlxd-removed-models--owner--name-too-7");
        RepoFolder::new(folder.path(), &repo).create().unwrap();
        assert_eq!(remove(folder.path(), &repo).unwrap(), 5);
        assert!(!folder.path().join(".mlxd-removed-models--owner--name-too-7").exists());
    }

    /// Makes a repo with a blob; returns the repo and the blob's path.
    fn repo_with_a_blob(cache: &Path) -> (RepoName, PathBuf) {
        let repo = RepoName::parse("owner/name").unwrap();
        let store = RepoFolder::new(cache, &repo);
        store.create().unwrap();
        let blob = store.path.join("blobs/1");
        fs::write(&blob, "{}").unwrap();
        (repo, blob)
    }

    #[test]
    fn a_repo_that_may_not_be_removed_whole_stays_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (repo, blob) = repo_with_a_blob(folder.path());
        let blobs = blob.parent().unwrap();
        fs::set_permissions(blobs, fs::Permissions::from_mode(0o555)).unwrap();
        let removed = remove(folder.path(), &repo);
        // Root may remove everything, whatever the permissions.
        let is_root = rustix::process::getuid().is_root();
        assert_eq!(matches!(removed, Err(FetchError::Io { .. })), !is_root);
        assert_eq!((blob.exists(), removed.ok()), (!is_root, is_root.then_some(2)));
    }

    #[test]
    fn a_repo_that_cannot_be_hidden_stays_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (repo, blob) = repo_with_a_blob(folder.path());
        // A file has the hidden name: that of a folder is not given to it.
        let hidden = format!("{REMOVED}{}-{}", repo.folder_name(), std::process::id());
        fs::write(folder.path().join(&hidden), "").unwrap();
        assert!(matches!(remove(folder.path(), &repo), Err(FetchError::Io { .. })));
        assert_eq!(fs::read_to_string(&blob).unwrap(), "{}");
        fs::remove_file(folder.path().join(hidden)).unwrap();
        assert_eq!(remove(folder.path(), &repo).unwrap(), 2);
    }

    #[test]
    fn a_link_in_the_place_of_a_repo_is_left() {
        let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(elsewhere.path(), folder.path().join("models--owner--name")).unwrap();
        assert!(remove(folder.path(), &RepoName::parse("owner/name").unwrap()).is_err());
        assert!(elsewhere.path().exists());
    }
}
