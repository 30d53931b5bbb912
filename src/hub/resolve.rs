//! From a model's name to its folder. A name is a folder under a configured root (`name` or `owner/name`), or
//! a repo id in the local Hugging Face cache; roots come first, in their order.
//!
//! Names come from clients. What a name leads to, links included, lies under a root or in the cache, or it is
//! not found.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use hf_hub::Cache;
use sha2::{Digest, Sha256};

use super::HubError;
use super::inspect::is_weight_file;

/// Longer than any repo id, which has at most 96 bytes a part.
const NAME_BYTES_MAX: usize = 256;

/// Where models are looked for.
#[derive(Clone, Debug)]
pub struct ModelRoots {
    roots: Vec<PathBuf>,
    hf_cache: Option<PathBuf>,
}

/// A model's folder.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ModelFolder {
    /// The name clients ask for it by.
    pub name: String,
    /// The folder, links resolved.
    pub path: PathBuf,
    /// The commit of a Hugging Face snapshot; otherwise `local-` and a hash of the files' names, sizes and
    /// times, which changes when the files do.
    pub revision: String,
}

impl ModelRoots {
    /// Looks in `roots`, then in the Hugging Face cache (the folder that holds `models--owner--name`).
    /// Folders that do not exist (yet) are allowed.
    #[must_use]
    pub fn new(roots: Vec<PathBuf>, hf_cache: Option<PathBuf>) -> Self {
        Self { roots, hf_cache }
    }

    /// Finds the folder of a model.
    ///
    /// # Errors
    /// `InvalidName` for what cannot be a name, `NotFound`, and `Io` if the folder cannot be read.
    pub fn resolve(&self, name: &str) -> Result<ModelFolder, HubError> {
        check_model_name(name)?;
        for root in &self.roots {
            if let Some(path) = self.contained(&root.join(name))
                && has_model_file(&path)
            {
                let revision = local_revision(&path)?;
                return Ok(ModelFolder { name: name.to_owned(), path, revision });
            }
        }
        if let Some(cached) = self.cached(name) {
            return Ok(cached);
        }
        check_open_files()?;
        Err(HubError::NotFound { name: name.to_owned() })
    }

    /// Every model that can be loaded, sorted by name: those with a `config.json` and safetensors. What
    /// cannot be read is left out.
    #[must_use]
    pub fn list(&self) -> Vec<ModelFolder> {
        let mut found = BTreeMap::new();
        for name in self.candidates() {
            if found.contains_key(&name) {
                continue;
            }
            if let Ok(folder) = self.resolve(&name)
                && folder.path.join("config.json").is_file()
                && file_names(&folder.path).iter().any(|file| is_weight_file(file))
            {
                found.insert(name, folder);
            }
        }
        found.into_values().collect()
    }

    /// Names worth resolving: folders one and two levels below a root, and the cache's repos.
    fn candidates(&self) -> Vec<String> {
        let mut names = Vec::new();
        for root in &self.roots {
            for outer in file_names(root) {
                for inner in file_names(&root.join(&outer)) {
                    names.push(format!("{outer}/{inner}"));
                }
                names.push(outer);
            }
        }
        for folder in self.hf_cache.iter().flat_map(|cache| file_names(cache)) {
            if let Some(repo) = folder.strip_prefix("models--") {
                names.push(repo.replacen("--", "/", 1));
            }
        }
        names
    }

    fn cached(&self, name: &str) -> Option<ModelFolder> {
        let cache = self.hf_cache.as_ref()?;
        // The cache writes `/` as `--`; a name that has one itself would reach another repo's folder.
        if name.contains("--") {
            return None;
        }
        let file = Cache::new(cache.clone()).model(name.to_owned()).get("config.json")?;
        let snapshot = file.parent()?;
        let commit = snapshot.file_name()?.to_str()?;
        // The commit is read from a file and joined to a path; a hash has no dots and no slashes.
        if !commit.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return None;
        }
        let path = self.contained(snapshot)?;
        Some(ModelFolder { name: name.to_owned(), path, revision: commit.to_owned() })
    }

    /// The folder with links resolved, if it and all its files lie in the places we were given.
    fn contained(&self, folder: &Path) -> Option<PathBuf> {
        let places: Vec<PathBuf> =
            self.roots.iter().chain(&self.hf_cache).filter_map(|place| place.canonicalize().ok()).collect();
        let inside = |path: &Path| places.iter().any(|place| path.starts_with(place) && path != place);
        let folder = folder.canonicalize().ok().filter(|path| path.is_dir() && inside(path))?;
        for file in file_names(&folder) {
            // A dangling link leads nowhere; the reader of the file reports that it is missing.
            if let Ok(target) = folder.join(file).canonicalize()
                && !inside(&target)
            {
                return None;
            }
        }
        Some(folder)
    }
}

/// Whether a name can be a model's, wherever one is looked for.
///
/// # Errors
/// `InvalidName`, saying why not.
pub fn check_model_name(name: &str) -> Result<(), HubError> {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.len() > NAME_BYTES_MAX {
        "it is longer than 256 bytes"
    } else if name.chars().any(|c| c == '\\' || c.is_control() || is_invisible(c)) {
        "it has a backslash, a control character or one that does not show"
    } else if name.split('/').count() > 2 {
        "it has more than two parts"
    } else if name.split('/').any(|part| part.is_empty() || part.starts_with('.')) {
        "a part of it is empty or starts with a dot"
    } else {
        return Ok(());
    };
    // The name goes back to the client and into logs: not all of it, if it is absurd.
    let shown = name.chars().take(NAME_BYTES_MAX).collect();
    Err(HubError::InvalidName { name: shown, why: why.to_owned() })
}

/// Characters that turn the text around them, or leave no trace of themselves: with them two names, or a line
/// of the log, can look like another.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// Fails if no file can be opened now: then nothing found does not mean that nothing is there.
fn check_open_files() -> Result<(), HubError> {
    let root = Path::new("/");
    fs::File::open(root).map(drop).map_err(HubError::io(root))
}

/// Tells a model's folder from an owner's. A folder with only one of the two is a broken model: loading it
/// says what is missing.
fn has_model_file(folder: &Path) -> bool {
    file_names(folder).iter().any(|file| file == "config.json" || is_weight_file(file))
}

/// Names of a folder's entries, sorted; hidden ones and those that are not text are left out.
fn file_names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    names
}

fn local_revision(folder: &Path) -> Result<String, HubError> {
    let mut hash = Sha256::new();
    for name in file_names(folder) {
        let path = folder.join(&name);
        let Ok(metadata) = fs::metadata(&path) else {
            continue;
        };
        let modified = metadata.modified().map_err(HubError::io(&path))?;
        let nanos = modified.duration_since(UNIX_EPOCH).map_or(0, |age| age.as_nanos());
        hash.update(name.as_bytes());
        hash.update([0]);
        hash.update(metadata.len().to_le_bytes());
        hash.update(nanos.to_le_bytes());
    }
    let digest = hash.finalize();
    let hex: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("local-{hex}"))
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
