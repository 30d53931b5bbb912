//! What a model is given: tokens, and where in them media stands. Shared, never copied: a session, its turn
//! and the engine hold the same tokens. No architecture reads media yet, so `media` is empty.

use std::sync::Arc;

/// A model's input: token ids, and the media whose embeddings replace some of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// Token ids, in order.
    pub tokens: Arc<[u32]>,
    /// Media spans, in the order of `at`; they do not overlap.
    pub media: Arc<[MediaSpan]>,
}

/// A run of placeholder tokens that stands for one image or sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MediaSpan {
    /// Index of its first token.
    pub at: u32,
    /// Number of its tokens.
    pub len: u32,
    /// SHA-256 of the media's bytes as the model sees them.
    pub hash: [u8; 32],
}

impl Prompt {
    /// Returns whether there is no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Returns the number of tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }
}

impl From<Arc<[u32]>> for Prompt {
    /// Wraps shared tokens without media.
    fn from(tokens: Arc<[u32]>) -> Self {
        Self { tokens, media: Arc::default() }
    }
}

impl From<Vec<u32>> for Prompt {
    /// Wraps tokens without media.
    fn from(tokens: Vec<u32>) -> Self {
        Self { tokens: tokens.into(), media: Arc::default() }
    }
}
