//! What can go wrong with text. Each variant names the file or the input that is at fault.

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
        /// What the system said.
        source: io::Error,
    },
    /// A file is not the JSON it should be.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why parsing stopped.
        source: serde_json::Error,
    },
    /// A file is well-formed but wrong.
    #[error("{}: {why}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file asks for something that is not implemented.
    #[error("{}: {what} is not supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it asks for.
        what: String,
    },
    /// A text could not be turned into tokens.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
    /// The chat template refused the conversation, or failed on it.
    #[error("{0}")]
    Render(String),
}
