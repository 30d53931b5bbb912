//! The errors of text. Each variant names the file or the input at fault.

use std::io;
use std::path::PathBuf;

/// Why a tokenizer, a template or a text cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file is missing or unreadable.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// A file is not JSON.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The place and reason of the parse error.
        source: serde_json::Error,
    },
    /// A file is well-formed but wrong.
    #[error("{}: {why}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The reason.
        why: String,
    },
    /// A file asks for a feature that is not implemented.
    #[error("{}: {what} is not supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The feature.
        what: String,
    },
    /// A text cannot be tokenized.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
    /// The chat template refused the conversation, or failed on it.
    #[error("{0}")]
    Render(String),
}
