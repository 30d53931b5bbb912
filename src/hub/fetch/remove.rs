//! Removes a repo from the cache: at once for everybody who looks, then its files.

use std::fs;
use std::io;
use std::path::Path;

use super::FetchError;
use super::repo::RepoName;
use super::store::RepoFolder;

/// Removes every revision of a repo from the cache and returns the bytes freed.
///
/// # Errors
/// `NotFound` if it is not there, `Busy` while a process downloads into it, `Io`.
pub fn remove(cache: &Path, repo: &RepoName) -> Result<u64, FetchError> {
    let store = RepoFolder::new(cache, repo);
    let path = &store.path;
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => {
            let why = io::Error::other("is a link or a file, which is not the cache's to remove");
            return Err(FetchError::io(path)(why));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(FetchError::NotFound { what: format!("{} in the Hugging Face cache", repo.id()) });
        }
        Err(error) => return Err(FetchError::io(path)(error)),
    }
    if store.is_locked()? {
        return Err(FetchError::Busy { repo: repo.id().to_owned() });
    }
    let bytes = bytes(&path.join("blobs"));
    // Nobody sees half of it.
    let gone = cache.join(format!(".mlxd-removed-{}", std::process::id()));
    fs::rename(path, &gone).map_err(FetchError::io(path))?;
    fs::remove_dir_all(&gone).map_err(FetchError::io(&gone))?;
    Ok(bytes)
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
    fn a_link_in_the_place_of_a_repo_is_left() {
        let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(elsewhere.path(), folder.path().join("models--owner--name")).unwrap();
        assert!(remove(folder.path(), &RepoName::parse("owner/name").unwrap()).is_err());
        assert!(elsewhere.path().exists());
    }
}
