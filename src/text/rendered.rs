//! What a chat template wrote: a prompt's text.

use std::borrow::Cow;

/// A prompt's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text; see `mark`.
    pub text: String,
    /// A character that stands in what looks like a control token but was written by people or tools.
    /// [`super::Tokenizer::encode_rendered`] drops it. None if there is no such place.
    pub mark: Option<char>,
}

impl Rendered {
    /// Returns the text without marks.
    #[must_use]
    pub fn plain(&self) -> Cow<'_, str> {
        self.mark.map_or(Cow::Borrowed(&self.text), |mark| self.text.replace(mark, "").into())
    }
}
