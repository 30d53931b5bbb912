//! What can go wrong with a model's files, by what the caller can do about it. `Display` goes to clients, so
//! it names files without their folders; the whole path of an I/O error is in its field, for the log.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::error::Error;
use crate::ids::ModelName;

/// When to try again after too many files were open.
const OPEN_FILES_RETRY: Duration = Duration::from_secs(1);

/// Why a model's files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// No folder of that name under a root, and no such repo in the Hugging Face cache.
    #[error("{}no model named {name:?} under the model roots or in the Hugging Face cache", joined(.problems))]
    NotFound {
        /// The name asked for.
        name: String,
        /// What is wrong with the model roots.
        problems: Vec<String>,
    },
    /// The name cannot be a model's: it is empty, leaves the root, or has odd characters.
    #[error("{name:?} cannot name a model: {why}")]
    InvalidName {
        /// The name asked for.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// A file is missing: one of a repo in the Hugging Face cache can be downloaded.
    #[error("{file}: {why}")]
    Incomplete {
        /// The name of the file, or of the model.
        file: String,
        /// What is missing.
        why: String,
    },
    /// A file is cut short, or contradicts itself.
    #[error("{file}: {why}")]
    Damaged {
        /// The file's name within the model's folder.
        file: String,
        /// What is wrong with it.
        why: String,
    },
    /// A weight file was changed or removed after its header was read.
    #[error("{file}: changed after its header was read")]
    Changed {
        /// The file's name within the model's folder.
        file: String,
    },
    /// The files are whole, but need something that is not implemented.
    #[error("{why}")]
    Unsupported {
        /// What they need.
        why: String,
    },
    /// The operating system refused.
    #[error("{}: {source}", file_name(.path))]
    Io {
        /// The whole path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl HubError {
    /// The same failure as the caller of an RPC sees it. An I/O error counts as damage: asking again will
    /// not help until somebody has looked at the folder. Changed files are read anew by the next call.
    #[must_use]
    pub fn into_error(self, model: &ModelName) -> Error {
        match self {
            Self::NotFound { name, problems } => Error::ModelNotFound { name, problems: joined(&problems) },
            Self::InvalidName { name, why } => Error::field("model", format!("{name:?}: {why}")),
            Self::Changed { .. } => Error::ModelUnloaded(model.clone()),
            Self::Unsupported { why } => Error::ModelUnsupported { model: model.clone(), why },
            Self::Io { source, .. } if is_out_of_files(&source) => Error::TooManyOpen {
                limit: "open files (ulimit -n)",
                value: getrlimit(Resource::Nofile).current.unwrap_or_default(),
                retry_after: OPEN_FILES_RETRY,
            },
            Self::Incomplete { .. } => Error::ModelIncomplete { model: model.clone(), why: self.to_string() },
            Self::Damaged { .. } | Self::Io { .. } => {
                Error::ModelInvalid { model: model.clone(), why: self.to_string() }
            }
        }
    }

    pub(super) fn damaged(path: &Path, why: impl Into<String>) -> Self {
        Self::Damaged { file: file_name(path), why: why.into() }
    }

    pub(super) fn incomplete(path: &Path, why: impl Into<String>) -> Self {
        Self::Incomplete { file: file_name(path), why: why.into() }
    }

    pub(super) fn unsupported(why: impl Into<String>) -> Self {
        Self::Unsupported { why: why.into() }
    }

    /// For `map_err`: the path joins the system's error.
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }
}

/// Returns whether the process, or the system, may not open more files now.
fn is_out_of_files(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// Sentences before another one.
fn joined(problems: &[String]) -> String {
    problems.iter().map(|problem| format!("{problem}; ")).collect()
}

/// The last part of a path, as text that can be shown.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
