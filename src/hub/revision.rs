//! What can be a branch, tag or commit, as the hub and git (git-check-ref-format) allow. It becomes part of
//! paths and addresses.

/// Bytes of a revision: what a file name may have.
pub(super) const REVISION_BYTES_MAX: usize = 255;

/// Says why a text cannot be a branch, tag or commit; nothing if it can. One that can has no part that leads
/// elsewhere or is hidden.
pub(super) fn revision_fault(revision: &str) -> Option<&'static str> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '/');
    let is_part = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.ends_with(".lock");
    if revision.is_empty() || revision.len() > REVISION_BYTES_MAX {
        return Some("the revision has 1 to 255 characters");
    }
    if !revision.chars().all(is_word) {
        return Some("the revision has a character other than letters, digits and -_.+/");
    }
    (revision.contains("..") || !revision.split('/').all(is_part))
        .then_some("the revision cannot be a branch, tag or commit")
}
