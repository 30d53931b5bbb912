//! The two questions that a download asks the hub's API: which commit a revision is, and which files it has.
//! Answers are checked before anything in them becomes part of a path.

use std::collections::BTreeSet;

use reqwest::Url;
use serde::Deserialize;

use super::FetchError;
use super::client::{Ask, Client};
use super::repo::{RepoName, is_hex};

/// Limit of the answer that names a commit. It lists the names of all files, and the repo's card.
const INFO_BYTES_MAX: usize = 8 << 20;

/// Limit of a page of the list of files: the hub's pages have 1000 entries of about 300 bytes.
const PAGE_BYTES_MAX: usize = 4 << 20;

/// Limit of files of a repo. Models have at most some hundreds.
const FILES_MAX: usize = 20_000;

/// Limit of pages of the list of files. Folders are on them too, and count as no files.
const PAGES_MAX: usize = 200;

/// Largest size that a file may claim: beyond it the sum of `FILES_MAX` could overflow.
const SIZE_MAX: u64 = 1 << 49;

/// Identifies the content of a file, and names its blob in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Digest {
    /// Hash of a large file.
    Sha256(String),
    /// Git's hash of a small file, with its header `blob SIZE\0`.
    Git(String),
}

impl Digest {
    /// Returns the hash, in hexadecimal.
    pub(super) fn as_str(&self) -> &str {
        match self {
            Self::Sha256(hash) | Self::Git(hash) => hash,
        }
    }
}

/// A file of a repo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    /// Path in the repo; no part of it is `..`.
    pub(super) path: String,
    /// Size in bytes.
    pub(super) size: u64,
    /// Its content.
    pub(super) digest: Digest,
}

#[derive(Deserialize)]
struct Info {
    sha: String,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    oid: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

/// Returns the commit that a revision is now.
///
/// # Errors
/// The hub does not answer, refuses, or has no such revision.
pub(super) async fn commit(client: &Client, repo: &RepoName) -> Result<String, FetchError> {
    if let Some(commit) = repo.commit() {
        return Ok(commit.to_owned());
    }
    let url = client.url(&["api", "models"], repo.id(), &["revision", repo.revision()]);
    let ask = Ask { what: format!("repo {repo}"), repo };
    let (info, _): (Info, _) = client.json(&url, &ask, INFO_BYTES_MAX).await?;
    if is_hex(&info.sha, 40) { Ok(info.sha) } else { Err(FetchError::bad(ask.what, "names no commit")) }
}

/// Returns the files of a commit.
///
/// # Errors
/// The hub does not answer, refuses, or lists what cannot be a file.
pub(super) async fn files(client: &Client, repo: &RepoName, commit: &str) -> Result<Vec<Listed>, FetchError> {
    let mut url = client.url(&["api", "models"], repo.id(), &["tree", commit]);
    url.query_pairs_mut().append_pair("recursive", "true").append_pair("expand", "false");
    let ask = Ask { what: format!("list of files of {}", repo.id()), repo };
    let (mut files, mut pages) = (Vec::new(), BTreeSet::new());
    let mut next = Some(url);
    while let Some(page) = next {
        if !pages.insert(page.to_string()) {
            return Err(FetchError::bad(ask.what, "lists a page twice"));
        }
        if pages.len() > PAGES_MAX {
            return Err(FetchError::bad(ask.what, format!("lists more than {PAGES_MAX} pages of files")));
        }
        let (entries, link): (Vec<Entry>, Option<Url>) = client.json(&page, &ask, PAGE_BYTES_MAX).await?;
        for entry in entries.into_iter().filter(|entry| entry.kind == "file") {
            files.push(listed(entry)?);
        }
        if files.len() > FILES_MAX {
            return Err(FetchError::bad(ask.what, format!("lists more than {FILES_MAX} files")));
        }
        next = link;
    }
    Ok(files)
}

fn listed(entry: Entry) -> Result<Listed, FetchError> {
    let Entry { path, size, oid, lfs, .. } = entry;
    if !is_path(&path) {
        return Err(FetchError::bad(format!("{path:?}"), "lists a file whose name leads elsewhere"));
    }
    let (size, digest) = match lfs {
        Some(lfs) => (lfs.size, Some(Digest::Sha256(lfs.oid)).filter(|digest| is_hex(digest.as_str(), 64))),
        None => (size, Some(Digest::Git(oid)).filter(|digest| is_hex(digest.as_str(), 40))),
    };
    match digest {
        Some(digest) if size <= SIZE_MAX => Ok(Listed { path, size, digest }),
        Some(_) => Err(FetchError::bad(path, format!("says that it has {size} bytes"))),
        None => Err(FetchError::bad(path, "lists no hash of it")),
    }
}

/// Whether a path stays within its folder, and is written in one way only.
fn is_path(path: &str) -> bool {
    let is_part = |part: &str| !part.is_empty() && part != "." && part != ".." && part.len() <= 255;
    path.split('/').all(is_part) && !path.chars().any(|c| c == '\\' || c.is_control())
}

impl Listed {
    #[cfg(test)]
    pub(super) fn of(path: &str, size: u64) -> Self {
        Self { path: path.to_owned(), size, digest: Digest::Git("0".repeat(40)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Listed, FetchError> {
        listed(serde_json::from_str(json).unwrap())
    }

    #[test]
    fn large_files_are_known_by_sha256_and_small_ones_by_gits_hash() {
        let (git, sha) = ("1".repeat(40), "2".repeat(64));
        let small = read(&format!(r#"{{"type":"file","oid":"{git}","size":3,"path":"a.json"}}"#)).unwrap();
        assert_eq!((small.size, small.digest), (3, Digest::Git(git.clone())));
        let lfs = format!(r#"{{"oid":"{sha}","size":9,"pointerSize":130}}"#);
        let large =
            format!(r#"{{"type":"file","oid":"{git}","size":9,"path":"m","lfs":{lfs},"xetHash":"3"}}"#);
        assert_eq!(read(&large).unwrap().digest, Digest::Sha256(sha));
    }

    #[test]
    fn the_sizes_of_all_files_together_cannot_overflow() {
        assert!(SIZE_MAX.checked_mul(FILES_MAX as u64).is_some());
    }

    #[test]
    fn a_list_that_leads_elsewhere_is_refused() {
        let git = "1".repeat(40);
        for path in ["../x", "a/../x", "/x", "a//x", "a/", "", ".", "a\\\\x", "a\\u0000", "a\\nb"] {
            let json = format!(r#"{{"type":"file","oid":"{git}","size":3,"path":"{path}"}}"#);
            assert!(matches!(read(&json), Err(FetchError::BadAnswer { .. })), "{path}");
        }
        for oid in ["", "../x", "12", &"G".repeat(40)] {
            let json = format!(r#"{{"type":"file","oid":"{oid}","size":3,"path":"x"}}"#);
            assert!(matches!(read(&json), Err(FetchError::BadAnswer { .. })), "{oid}");
        }
        let huge = format!(r#"{{"type":"file","oid":"{git}","size":18446744073709551615,"path":"x"}}"#);
        assert!(read(&huge).is_err());
    }
}
