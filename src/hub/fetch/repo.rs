//! Names of repos, as the hub and Python's huggingface_hub allow them (utils/_validators.py). They become
//! parts of paths and addresses.

use std::fmt;

use super::FetchError;
use crate::hub::revision::revision_fault;

/// Branch that a name without a revision means.
const MAIN: &str = "main";

/// Bytes of a part of a repo id.
const PART_BYTES_MAX: usize = 96;

/// A repo of models at a revision, written `owner/name` or `owner/name@revision`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RepoName {
    id: String,
    revision: String,
}

impl RepoName {
    /// Reads `owner/name[@revision]`.
    ///
    /// # Errors
    /// `Invalid`, saying why.
    pub fn parse(text: &str) -> Result<Self, FetchError> {
        let (id, revision) = text.split_once('@').unwrap_or((text, MAIN));
        match id_fault(id).or_else(|| revision_fault(revision)) {
            Some(why) => Err(FetchError::Invalid { text: text.to_owned(), why }),
            None => Ok(Self { id: id.to_owned(), revision: revision.to_owned() }),
        }
    }

    /// Returns the repo that a model's name can be. A name of one part is a folder's: the repos that have one
    /// are not models for MLX.
    #[must_use]
    pub fn of_model(name: &str) -> Option<Self> {
        Self::parse(name).ok().filter(|repo| repo.id.contains('/'))
    }

    /// Returns the repo's id, without the revision.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the branch, tag or commit.
    #[must_use]
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// Returns the commit, if the revision is one.
    pub(super) fn commit(&self) -> Option<&str> {
        Some(self.revision.as_str()).filter(|revision| is_hex(revision, 40))
    }

    /// Returns the name of its folder in the cache.
    #[must_use]
    pub fn folder_name(&self) -> String {
        format!("models--{}", self.id.replace('/', "--"))
    }
}

impl fmt::Display for RepoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)?;
        if self.revision == MAIN { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

/// Returns whether a text is a hash of this many hexadecimal digits, as git writes one.
pub(super) fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn id_fault(id: &str) -> Option<&'static str> {
    let parts: Vec<&str> = id.split('/').collect();
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if parts.len() > 2 {
        return Some("it has more than two parts");
    }
    if parts.iter().any(|part| part.is_empty() || part.len() > PART_BYTES_MAX) {
        return Some("each part has 1 to 96 characters");
    }
    if !parts.iter().all(|part| part.chars().all(is_word)) {
        return Some("it has a character other than letters, digits, '-', '_' and '.'");
    }
    if parts.iter().any(|part| part.starts_with(['-', '.']) || part.ends_with(['-', '.'])) {
        return Some("a part starts or ends with '-' or '.'");
    }
    (id.contains("--") || id.contains("..") || id.ends_with(".git"))
        .then_some("it has '--' or '..', or ends with '.git'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_a_repo_and_a_revision() {
        let name = RepoName::parse("owner/name").unwrap();
        assert_eq!(
            (name.id(), name.revision(), name.to_string().as_str()),
            ("owner/name", "main", "owner/name")
        );
        assert_eq!(name.folder_name(), "models--owner--name");
        let pinned = RepoName::parse("gpt2@refs/pr/3").unwrap();
        assert_eq!((pinned.id(), pinned.revision(), pinned.commit()), ("gpt2", "refs/pr/3", None));
        let commit = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(RepoName::parse(&format!("a/b@{commit}")).unwrap().commit(), Some(commit));
    }

    #[test]
    fn names_that_would_lead_elsewhere_are_refused() {
        for text in [
            "",
            "a/b/c",
            "../a",
            "a/..",
            "a/.b",
            "a//b",
            "/a",
            "a/",
            "a b",
            "a/b--c",
            "a/b.git",
            "-a/b",
            "a\\b",
            "a/b@",
            "a/b@..",
            "a/b@../x",
            "a/b@/x",
            "a/b@x/",
            "a/b@x//y",
            "a/b@.x",
            "a/b@x.lock",
            "a/b@x y",
            "a/b@x@y",
            "http://a",
            "a/b?c",
            "a/b%2e",
            "a/b@x?y",
            "ä/b",
        ] {
            assert!(RepoName::parse(text).is_err(), "{text:?}");
        }
        assert!(RepoName::parse(&format!("a/{}", "b".repeat(97))).is_err());
    }
}
