//! What is asked of folders as such: the names in one, and the room on its disk.

use std::fs;
use std::io;
use std::path::Path;

/// Returns the names of a folder's entries, sorted; hidden ones and those that are not text are left out.
pub(super) fn names(folder: &Path) -> io::Result<Vec<String>> {
    let names = fs::read_dir(folder)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    Ok(names)
}

/// Returns the bytes that this user may still write to the disk of a folder.
pub(super) fn free_bytes(folder: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(folder)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_of_a_folder_has_room() {
        let folder = tempfile::tempdir().unwrap();
        assert!(free_bytes(folder.path()).unwrap() > 0);
        assert!(free_bytes(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn hidden_names_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b", "a", ".c"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(names(folder.path()).unwrap(), ["a", "b"]);
        assert!(names(&folder.path().join("a")).is_err());
    }
}
