//! Where the Hugging Face tools keep their files, by the variables and rules of Python's huggingface_hub
//! (constants.py).

use std::path::{Path, PathBuf};

/// Reads a variable of the environment; an empty one counts as unset.
pub type Environment<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// Returns a path whose `~` is the home folder, if there is one.
#[must_use]
pub fn expand_home(text: &str, home: Option<&Path>) -> PathBuf {
    match (text.strip_prefix('~'), home) {
        (Some(""), Some(home)) => home.to_path_buf(),
        (Some(rest), Some(home)) if rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
        _ => text.into(),
    }
}

/// Returns the cache, which holds `models--owner--name`.
#[must_use]
pub fn default_hf_cache(env: &Environment<'_>) -> Option<PathBuf> {
    let given = path(env, "HF_HUB_CACHE").or_else(|| path(env, "HUGGINGFACE_HUB_CACHE"));
    given.or_else(|| Some(hf_home(env)?.join("hub")))
}

/// Returns the file that holds the token.
pub(super) fn token_file(env: &Environment<'_>) -> Option<PathBuf> {
    path(env, "HF_TOKEN_PATH").or_else(|| Some(hf_home(env)?.join("token")))
}

fn hf_home(env: &Environment<'_>) -> Option<PathBuf> {
    let caches = || path(env, "XDG_CACHE_HOME").or_else(|| Some(home(env)?.join(".cache")));
    path(env, "HF_HOME").or_else(|| Some(caches()?.join("huggingface")))
}

fn path(env: &Environment<'_>, name: &str) -> Option<PathBuf> {
    env(name).map(|text| expand_home(&text, home(env).as_deref()))
}

fn home(env: &Environment<'_>) -> Option<PathBuf> {
    env("HOME").map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tilde_at_the_start_is_the_home_folder() {
        let home = Some(Path::new("/home/ada"));
        for (text, expected) in [
            ("~", "/home/ada"),
            ("~/x", "/home/ada/x"),
            ("~//x", "/home/ada/x"),
            ("~bob/x", "~bob/x"),
            ("/a/~/x", "/a/~/x"),
            ("", ""),
        ] {
            assert_eq!(expand_home(text, home), Path::new(expected), "{text}");
        }
        assert_eq!(expand_home("~/x", None), Path::new("~/x"));
    }
}
