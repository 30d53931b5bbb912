//! The folder in which the daemon keeps its sessions.

use std::path::PathBuf;

/// The value of the key that keeps nothing.
const OFF: &str = "off";

/// Returns the folder: the given one, or the user's; None if it is off, or if nothing names the user's.
pub(super) fn folder(given: Option<PathBuf>, env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    match given {
        Some(given) if given.as_os_str() == OFF => None,
        Some(given) => Some(given),
        None => default(env),
    }
}

/// Returns the user's folder, where the system keeps what programs remember between runs.
fn default(env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let folder = |name| env(name).map(PathBuf::from).filter(|folder| folder.is_absolute());
    let home = || folder("HOME");
    let user = if cfg!(target_os = "macos") {
        home()?.join("Library/Application Support")
    } else {
        folder("XDG_STATE_HOME").or_else(|| Some(home()?.join(".local/state")))?
    };
    Some(user.join("mlxd"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_the_given_one_or_the_users_or_none() {
        let home = |name: &str| (name == "HOME").then(|| "/home/me".to_owned());
        let nowhere = |_: &str| None;
        assert_eq!(folder(Some("/s".into()), &nowhere), Some("/s".into()));
        assert_eq!(folder(Some("off".into()), &home), None);
        assert_eq!(folder(None, &nowhere), None);
        let users = folder(None, &home).unwrap();
        if cfg!(target_os = "macos") {
            assert_eq!(users, PathBuf::from("/home/me/Library/Application Support/mlxd"));
        } else {
            assert_eq!(users, PathBuf::from("/home/me/.local/state/mlxd"));
            let state = |name: &str| (name == "XDG_STATE_HOME").then(|| "/state".to_owned());
            assert_eq!(folder(None, &state), Some("/state/mlxd".into()));
        }
    }
}
