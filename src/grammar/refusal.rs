//! Why a grammar is refused.

/// Why a grammar is not compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is malformed, or no text obeys it.
    Invalid(String),
    /// It uses something that is not implemented.
    Unsupported {
        /// Where in the schema, as a JSON pointer; empty for the whole.
        path: String,
        /// The keyword, or what else is meant.
        keyword: String,
        /// What is known about it; empty if its name says all.
        why: String,
    },
    /// It exceeds a limit.
    TooLarge {
        /// The limit's name.
        limit: &'static str,
        /// The limit.
        value: u64,
    },
}

impl Refusal {
    /// Returns that a keyword is not implemented.
    pub(super) fn unsupported(path: &str, keyword: &str, why: &str) -> Self {
        Self::Unsupported { path: path.to_owned(), keyword: keyword.to_owned(), why: why.to_owned() }
    }
}
