//! Which models calls may have loaded and downloaded: the owner's patterns.

use std::path::Path;

use super::RepoName;

/// What calls may have loaded and downloaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelAccess {
    /// Whether a request loads the model that it names.
    pub auto_load: bool,
    /// Models that calls may load.
    pub loads: Vec<Pattern>,
    /// Repos that calls may download.
    pub downloads: Vec<Pattern>,
}

/// A name in which `*` stands for any text, or a folder, which stands for all models in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl ModelAccess {
    /// Returns whether calls may load a model of this name from this folder, links resolved. Asks the file
    /// system where the pattern is a folder.
    #[must_use]
    pub fn may_load(&self, name: &str, path: &Path) -> bool {
        self.loads.iter().any(|pattern| match pattern.folder() {
            Some(folder) => folder.canonicalize().is_ok_and(|folder| path.starts_with(folder)),
            // A revision counts only for a pattern that has one.
            None if pattern.0.contains('@') => pattern.matches(name),
            None => pattern.matches(without_revision(name)),
        })
    }

    /// Returns whether calls may download a repo, at whatever revision.
    #[must_use]
    pub fn may_download(&self, repo: &RepoName) -> bool {
        self.downloads.iter().any(|pattern| pattern.matches(repo.id()))
    }
}

impl Pattern {
    /// Reads a pattern; an absolute path is a folder.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    fn folder(&self) -> Option<&Path> {
        Some(Path::new(&self.0)).filter(|path| path.is_absolute())
    }

    fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
        let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        for part in parts {
            match rest.split_once(part) {
                Some((_, after)) => rest = after,
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

fn without_revision(name: &str) -> &str {
    name.split_once('@').map_or(name, |(id, _)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        Pattern::new(pattern).matches(name)
    }

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, name) in [
            ("owner/name", "owner/name"),
            ("owner/*", "owner/name"),
            ("*/name", "owner/name"),
            ("*", "owner/name"),
            ("owner/*-4bit", "owner/name-4bit"),
            ("o*/n*-4*", "owner/name-4bit"),
            ("*a*a*", "aa"),
            ("**", ""),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("owner/name", "owner/name2"),
            ("owner/name", "Owner/name"),
            ("owner/*", "owner2/name"),
            ("owner/*", "x/owner/name"),
            ("*a*a*", "a"),
            ("ab*ba", "aba"),
            ("", "a"),
            ("*.b", "axb"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn a_folder_stands_for_the_models_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        let access = |pattern: &str| ModelAccess { loads: vec![Pattern::new(pattern)], ..Default::default() };
        let may_load = |pattern: &str, at: &Path| access(pattern).may_load("owner/name@main", at);
        let root = path.to_str().unwrap();
        assert!(may_load(root, &path.join("model")));
        assert!(!may_load(root, Path::new(&format!("{root}2/model"))));
        assert!(!may_load("/nonexistent", Path::new("/nonexistent/model")));
        // A revision is the same repo's.
        assert!(may_load("owner/name", &path));
        assert!(!may_load("*@v1", &path) && may_load("*@main", &path));
        assert!(!may_load("*main", &path));
        assert!(!ModelAccess::default().may_load("owner/name@main", &path));
    }

    #[test]
    fn downloads_go_by_the_repo_whatever_the_revision() {
        let access = ModelAccess { downloads: vec![Pattern::new("owner/*")], ..Default::default() };
        assert!(access.may_download(&RepoName::parse("owner/name@v1").unwrap()));
        assert!(!access.may_download(&RepoName::parse("other/name").unwrap()));
        // A folder is not a repo.
        let access = ModelAccess { downloads: vec![Pattern::new("/owner/name")], ..Default::default() };
        assert!(!access.may_download(&RepoName::parse("owner/name").unwrap()));
    }
}
