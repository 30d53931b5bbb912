//! What can go wrong with a download, by what the caller can do about it. `Display` goes to clients: no
//! token, no signed address and no folder of the owner is in it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;

use super::SPARE_BYTES;
use crate::error::Error;
use crate::hub::error::file_name;
use crate::ids::ModelName;

/// When to ask a hub again that did not answer.
const UNREACHABLE_RETRY: Duration = Duration::from_secs(10);

/// Why a repo was not downloaded.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The text cannot name a repo or a revision.
    #[error("{text:?} cannot name a repo: {why}")]
    Invalid {
        /// The text.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A setting of the environment cannot be used.
    #[error("{variable}: {why}")]
    Setting {
        /// The variable, or the file.
        variable: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` is set.
    #[error("offline mode is set, and {repo} is not whole in the Hugging Face cache")]
    Offline {
        /// The repo.
        repo: String,
    },
    /// The hub has no such repo, revision or file, or does not show it to this caller.
    #[error("the hub has no {what}")]
    NotFound {
        /// The repo, revision or file.
        what: String,
    },
    /// The hub refuses this caller.
    #[error("the hub refuses {repo}: {why}")]
    Denied {
        /// The repo.
        repo: String,
        /// What the hub said, and what the owner can do.
        why: String,
    },
    /// The hub, or the way to it, does not answer or refuses everybody now.
    #[error("the hub is unavailable: {why}{}", again(.retry_after))]
    Unreachable {
        /// What failed.
        why: String,
        /// When to try again, as the hub says.
        retry_after: Option<Duration>,
    },
    /// An answer of the hub contradicts itself or is not what its interface promises.
    #[error("{what}: the hub {why}")]
    BadAnswer {
        /// The file or list.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// The repo has nothing that could be loaded, or not all of it.
    #[error("{repo} {why}")]
    Unsupported {
        /// The repo.
        repo: String,
        /// What it lacks.
        why: String,
    },
    /// The disk of the cache has no room for the files.
    #[error(
        "the download needs {needed_bytes} bytes, of which {SPARE_BYTES} stay free; the disk has {available_bytes}"
    )]
    DiskFull {
        /// Bytes still to write, and those that stay free.
        needed_bytes: u64,
        /// Bytes free.
        available_bytes: u64,
    },
    /// A process downloads into the repo.
    #[error("{repo} is being downloaded")]
    Busy {
        /// The repo.
        repo: String,
    },
    /// The operating system refused.
    #[error("{}: {source}", file_name(.path))]
    Io {
        /// The whole path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody waits for the download any more.
    #[error("the download was stopped; the next one goes on where it ended")]
    Stopped,
}

/// Says when to try again.
fn again(retry_after: &Option<Duration>) -> String {
    let wait = retry_after.filter(|wait| !wait.is_zero());
    wait.map(|wait| format!("; try again in {} s", wait.as_secs())).unwrap_or_default()
}

impl FetchError {
    /// For `map_err`: the path joins the system's error.
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }

    pub(super) fn bad(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::BadAnswer { what: what.into(), why: why.into() }
    }

    pub(super) fn unreachable(why: impl Into<String>) -> Self {
        Self::Unreachable { why: why.into(), retry_after: None }
    }

    /// The same failure as the caller of an RPC sees it. What stays until somebody looks at it is a failed
    /// download; the hub's absence passes.
    #[must_use]
    pub fn into_error(self, model: &ModelName) -> Error {
        let why = self.to_string();
        let model = model.clone();
        match self {
            Self::Invalid { .. } => Error::field("model", why),
            Self::NotFound { .. } | Self::Offline { .. } => {
                Error::ModelNotFound { name: model.to_string(), problems: format!("{why}; ") }
            }
            Self::Denied { .. } => Error::HubDenied { model, why },
            Self::Unreachable { retry_after, .. } => {
                let retry_after = retry_after.unwrap_or(UNREACHABLE_RETRY);
                Error::HubUnavailable { model, why, retry_after }
            }
            Self::Busy { .. } => Error::HubUnavailable { model, why, retry_after: UNREACHABLE_RETRY },
            Self::Unsupported { .. } => Error::ModelUnsupported { model, why },
            Self::DiskFull { needed_bytes, available_bytes } => {
                Error::DiskFull { model, needed_bytes, available_bytes }
            }
            Self::Setting { .. } | Self::BadAnswer { .. } | Self::Io { .. } => {
                Error::DownloadFailed { model, why }
            }
            Self::Stopped => Error::Cancelled(why),
        }
    }

    /// Returns whether the disk ran full while the file was written.
    pub(super) fn is_out_of_space(&self) -> bool {
        matches!(self, Self::Io { source, .. }
            if matches!(Errno::from_io_error(source), Some(Errno::NOSPC | Errno::DQUOT)))
    }
}
