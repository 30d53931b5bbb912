//! From a model's name to its folder. A name is a folder under a configured root (`name` or `owner/name`),
//! the name of a root that is a model itself, or a repo id in the local Hugging Face cache, with `@` and a
//! revision or without; roots come first, in their order.
//!
//! Names come from clients. What a name leads to, links included, lies under a root or in the cache, unless
//! the owner lets links of a root lead elsewhere. What looks like a model and cannot be used is named for
//! what it is.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use super::HubError;
use super::folder::names;
use super::inspect::{INDEX, is_weight_file};
use super::read::read_text;
use super::revision::{REVISION_BYTES_MAX, revision_fault};
use crate::error::Error;
use crate::ids::ModelName;

/// Longer than any repo id, which has at most 96 bytes a part, and the longest revision.
const NAME_BYTES_MAX: usize = 512;
const _: () = assert!(NAME_BYTES_MAX > 2 * 96 + REVISION_BYTES_MAX);

/// How the revision of a folder that is not a snapshot begins.
const LOCAL: &str = "local-";

/// Limit of `refs/main`; a commit has 40.
const COMMIT_BYTES_MAX: u64 = 256;

/// Where models are looked for.
#[derive(Clone, Debug)]
pub struct ModelRoots {
    roots: Vec<PathBuf>,
    hf_cache: Option<PathBuf>,
    /// Whether links in a root may lead out of it.
    links_anywhere: bool,
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

impl ModelFolder {
    /// Returns whether it is a snapshot in the Hugging Face cache.
    #[must_use]
    pub fn is_snapshot(&self) -> bool {
        !self.revision.starts_with(LOCAL)
    }

    /// Returns an error of its files as the caller of an RPC sees it. No download brings what is missing of a
    /// folder that is not a snapshot.
    pub(super) fn error(&self, error: HubError) -> Error {
        let model = ModelName::from(self.name.as_str());
        match error {
            HubError::Incomplete { file, why } if !self.is_snapshot() => {
                HubError::Damaged { file, why }.into_error(&model)
            }
            error => error.into_error(&model),
        }
    }
}

/// Names of models that could be loaded, each with its folder or with what is wrong.
pub type Listed = BTreeMap<String, Result<ModelFolder, HubError>>;

impl ModelRoots {
    /// Looks in `roots`, then in the Hugging Face cache (the folder that holds `models--owner--name`).
    /// Folders that do not exist (yet) are allowed. `links_anywhere` lets links in a root lead out of it.
    #[must_use]
    pub fn new(roots: Vec<PathBuf>, hf_cache: Option<PathBuf>, links_anywhere: bool) -> Self {
        Self { roots, hf_cache, links_anywhere }
    }

    /// Finds the folder of a model.
    ///
    /// # Errors
    /// `InvalidName` for what cannot be a name, `Damaged` for what cannot be reached, `Incomplete` for what
    /// was not downloaded to its end, `NotFound`, and `Io` if the folder cannot be read.
    pub fn resolve(&self, name: &str) -> Result<ModelFolder, HubError> {
        check_model_name(name)?;
        let mut wrong = None;
        for root in &self.roots {
            match self.under(root, name) {
                Ok(Some(path)) => {
                    let revision = local_revision(&path)?;
                    return Ok(ModelFolder { name: name.to_owned(), path, revision });
                }
                Ok(None) => {}
                Err(error) => wrong = wrong.or(Some(error)),
            }
        }
        let wrong = match self.cached(name) {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => wrong,
            Err(error) => wrong.or(Some(error)),
        };
        check_open_files()?;
        Err(wrong.unwrap_or_else(|| self.not_found(name)))
    }

    /// Every model that looks as if it could be loaded, by name: those with a `config.json` and safetensors,
    /// and those that cannot be reached.
    #[must_use]
    pub fn list(&self) -> Listed {
        let mut found = Listed::new();
        for name in self.candidates() {
            if found.contains_key(&name) {
                continue;
            }
            match self.resolve(&name) {
                Ok(folder) if is_whole(&folder.path) => drop(found.insert(name, Ok(folder))),
                Ok(_) | Err(HubError::NotFound { .. } | HubError::InvalidName { .. }) => {}
                Err(error) => drop(found.insert(name, Err(error))),
            }
        }
        found
    }

    /// What is wrong with the roots themselves, for people.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let problem = |root: &PathBuf| match fs::read_dir(root) {
            Ok(_) => None,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Some(format!("the model root {} does not exist", shown(root)))
            }
            Err(error) => Some(format!("the model root {} cannot be read: {error}", shown(root))),
        };
        self.roots.iter().filter_map(problem).collect()
    }

    /// Returns the Hugging Face cache.
    #[must_use]
    pub fn hf_cache(&self) -> Option<&Path> {
        self.hf_cache.as_deref()
    }

    fn not_found(&self, name: &str) -> HubError {
        HubError::NotFound { name: name.to_owned(), problems: self.problems() }
    }

    /// Names worth resolving: folders one and two levels below a root, a root that is a model, and the repos
    /// of the cache.
    fn candidates(&self) -> Vec<String> {
        let mut names = Vec::new();
        for root in &self.roots {
            names.extend(own_name(root).map(str::to_owned));
            for outer in file_names(root) {
                let folder = root.join(&outer);
                let is_model = has_model_file(&folder);
                let inner = file_names(&folder).into_iter();
                // The files of a model are none.
                let inner = inner.filter(|inner| !is_model || folder.join(inner).is_dir());
                names.extend(inner.map(|inner| format!("{outer}/{inner}")));
                names.push(outer);
            }
        }
        if let Some(cache) = &self.hf_cache {
            let repos = file_names(cache).into_iter().filter(|repo| has_weights(&cache.join(repo)));
            names
                .extend(repos.filter_map(|repo| Some(repo.strip_prefix("models--")?.replacen("--", "/", 1))));
        }
        names
    }

    /// Finds a model's folder under a root; None if nothing of that name looks like a model.
    fn under(&self, root: &Path, name: &str) -> Result<Option<PathBuf>, HubError> {
        // Deeper than a model's folder lies only the revision of a repo in the cache.
        if name.split('/').count() > 2 {
            return Ok(None);
        }
        let path = root.join(name);
        let Ok(entry) = fs::symlink_metadata(&path) else {
            let own = own_name(root).filter(|own| *own == name).and_then(|_| root.canonicalize().ok());
            return own.map(|root| self.check_links(&root, name).map(|()| root)).transpose();
        };
        let Ok(real) = path.canonicalize() else {
            let why = if entry.is_symlink() { "is a link that leads nowhere" } else { "cannot be reached" };
            return Err(HubError::damaged(Path::new(name), why));
        };
        if !real.is_dir() || !has_model_file(&real) {
            return Ok(None);
        }
        if !self.allows(&real) {
            return Err(leads_out(name));
        }
        self.check_links(&real, name)?;
        Ok(Some(real))
    }

    /// Finds a repo in the cache; None if it is not there.
    fn cached(&self, name: &str) -> Result<Option<ModelFolder>, HubError> {
        let Some(cache) = &self.hf_cache else { return Ok(None) };
        let (id, revision) = name.split_once('@').map_or((name, None), |(id, after)| (id, Some(after)));
        // The cache writes `/` as `--`; a name that has one itself would reach another repo's folder.
        if id.contains("--") {
            return Ok(None);
        }
        let repo = cache.join(format!("models--{}", id.replace('/', "--")));
        if !repo.is_dir() {
            return Ok(None);
        }
        let commit = match revision {
            None => commit_of(&repo, name)?,
            Some(revision) => match pinned(&repo, revision)? {
                Some(commit) => commit,
                None => return Ok(None),
            },
        };
        let snapshot = repo.join("snapshots").join(&commit);
        let Ok(path) = snapshot.canonicalize() else {
            let why = format!("its snapshot {commit} is not in the Hugging Face cache");
            return Err(HubError::incomplete(Path::new(name), why));
        };
        if let Some(why) = incomplete(&path) {
            let why = format!("its snapshot {commit} is incomplete: {why}");
            return Err(HubError::incomplete(Path::new(name), why));
        }
        if !self.is_inside(&path) {
            return Err(leads_out(name));
        }
        self.check_links(&path, name)?;
        Ok(Some(ModelFolder { name: name.to_owned(), path, revision: commit }))
    }

    /// Checks that no file of a folder is a link out of the places we were given, unless that is allowed.
    fn check_links(&self, folder: &Path, name: &str) -> Result<(), HubError> {
        for file in file_names(folder) {
            // A dangling link leads nowhere; the reader of the file reports it.
            if let Ok(target) = folder.join(&file).canonicalize()
                && !self.allows(&target)
            {
                return Err(leads_out(&format!("{name}/{file}")));
            }
        }
        Ok(())
    }

    fn allows(&self, path: &Path) -> bool {
        self.links_anywhere || self.is_inside(path)
    }

    /// Whether a path, links resolved, lies in a root or in the cache.
    fn is_inside(&self, path: &Path) -> bool {
        let places = self.roots.iter().chain(&self.hf_cache).filter_map(|place| place.canonicalize().ok());
        places.into_iter().any(|place| path.starts_with(&place) && path != place)
    }
}

fn leads_out(name: &str) -> HubError {
    HubError::Damaged {
        file: name.to_owned(),
        why: "is a link out of the model roots, which `model_links_anywhere` would allow".into(),
    }
}

/// Returns the name of a root that is a model itself.
fn own_name(root: &Path) -> Option<&str> {
    let files = file_names(root);
    let is_model =
        files.iter().any(|file| file == "config.json") && files.iter().any(|file| is_weight_file(file));
    root.file_name().and_then(|name| name.to_str()).filter(|_| is_model)
}

/// Returns the commit of a repo: the one that `refs/main` names, else that of its only complete snapshot.
fn commit_of(repo: &Path, name: &str) -> Result<String, HubError> {
    let damaged = |why: &str| HubError::damaged(Path::new(name), why);
    let incomplete_repo = |why: &str| HubError::incomplete(Path::new(name), why);
    if let Some(main) = read_text(&repo.join("refs/main"), COMMIT_BYTES_MAX)? {
        // The commit is joined to a path; a hash has no dots and no slashes.
        let commit = main.trim();
        let is_hash = !commit.is_empty() && commit.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let why = || damaged("refs/main names no commit in the Hugging Face cache");
        return if is_hash { Ok(commit.to_owned()) } else { Err(why()) };
    }
    let snapshots = file_names(&repo.join("snapshots"));
    let complete = |commit: &&String| incomplete(&repo.join("snapshots").join(commit)).is_none();
    let mut whole = snapshots.iter().filter(complete);
    match (whole.next(), whole.next(), snapshots.first()) {
        (Some(only), None, _) => Ok(only.clone()),
        (Some(_), Some(_), _) => {
            Err(damaged("has several snapshots in the Hugging Face cache, and no refs/main to choose one"))
        }
        // What is wrong with it is said where it is opened.
        (None, _, Some(first)) => Ok(first.clone()),
        (None, _, None) if has_begun(repo) => {
            Err(incomplete_repo("was not downloaded completely: `mlxd pull` continues it"))
        }
        (None, _, None) => Err(incomplete_repo("has no snapshot in the Hugging Face cache")),
    }
}

/// Returns the commit of a branch or tag when it was downloaded, or the commit itself if it is in the cache.
fn pinned(repo: &Path, revision: &str) -> Result<Option<String>, HubError> {
    // It is joined to a path.
    if revision_fault(revision).is_some() {
        return Ok(None);
    }
    let is_hash = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if is_hash(revision) && repo.join("snapshots").join(revision).is_dir() {
        return Ok(Some(revision.to_owned()));
    }
    let commit = read_text(&repo.join("refs").join(revision), COMMIT_BYTES_MAX)?;
    Ok(commit.map(|commit| commit.trim().to_owned()).filter(|commit| is_hash(commit)))
}

/// Whether a download into a repo began and did not end.
fn has_begun(repo: &Path) -> bool {
    file_names(&repo.join("blobs")).iter().any(|blob| blob.ends_with(".incomplete"))
}

/// Whether a repo in the cache has, or began to have, weights that could be loaded.
fn has_weights(repo: &Path) -> bool {
    let snapshots = repo.join("snapshots");
    let files = file_names(&snapshots).into_iter().flat_map(|commit| file_names(&snapshots.join(commit)));
    files.into_iter().any(|file| file.ends_with(".safetensors") || file == INDEX)
}

/// Says what a snapshot lacks; nothing if it can be a whole model.
pub(super) fn incomplete(snapshot: &Path) -> Option<String> {
    let files = file_names(snapshot);
    if let Some(file) = files.iter().find(|file| !snapshot.join(file).exists()) {
        return Some(format!("{file} is a link that leads nowhere"));
    }
    if !files.iter().any(|file| file == "config.json") {
        return Some("it has no config.json".into());
    }
    let has_weights = files.iter().any(|file| file.ends_with(".safetensors"));
    (!has_weights).then(|| "it has no weight file".into())
}

/// Whether a name can be a model's, wherever one is looked for.
///
/// # Errors
/// `InvalidName`, saying why not.
pub fn check_model_name(name: &str) -> Result<(), HubError> {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.len() > NAME_BYTES_MAX {
        "it is longer than 512 bytes"
    } else if name.chars().any(|c| c == '\\' || c.is_control() || is_invisible(c)) {
        "it has a backslash, a control character or one that does not show"
    } else if name.split('@').next().is_some_and(|id| id.split('/').count() > 2) {
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

/// Whether a folder has what every model has.
fn is_whole(folder: &Path) -> bool {
    let files = file_names(folder);
    files.iter().any(|file| file == "config.json") && files.iter().any(|file| file.ends_with(".safetensors"))
}

/// The last part of a root's path: clients need not know where it lies.
fn shown(root: &Path) -> String {
    format!("{:?}", super::error::file_name(root))
}

/// Names of a folder's entries; none if it cannot be read.
fn file_names(folder: &Path) -> Vec<String> {
    names(folder).unwrap_or_default()
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
    Ok(format!("{LOCAL}{hex}"))
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
