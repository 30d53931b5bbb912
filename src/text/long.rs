//! A text on its way to tokens, in pieces: a long one takes seconds and a hundred times its bytes at once.
//! Between two pieces the work can be stopped, and others can be served. The tokens are those of the whole
//! text.

use super::parting::{PIECE_BYTES, floor};
use super::{Rendered, TextError, Tokenizer};

/// Bytes at the start of a prompt by which the tokens around it are found; a token that begins it is shorter.
const START_BYTES: usize = 512;

/// The tokens of a text, as far as they are made.
#[derive(Debug)]
pub struct Encoding {
    tokenizer: Tokenizer,
    text: String,
    /// Bytes of the text that are tokens.
    done: usize,
    /// Bytes of the rest in which the next piece's end is looked for.
    looked_at: usize,
    ids: Vec<u32>,
    /// The tokens around the whole text that come after it.
    closing: Vec<u32>,
    kind: Kind,
}

/// What a text is.
#[derive(Debug)]
enum Kind {
    /// A raw prompt.
    Prompt,
    /// Text that goes on where other text ended.
    More,
    /// What a template wrote, or its end after the token `last`.
    Rendered { mark: Option<char>, last: Option<u32> },
}

impl Encoding {
    /// Begins a raw prompt, with the tokens around it ([`Tokenizer::encode_prompt`]).
    #[must_use]
    pub fn of_prompt(tokenizer: &Tokenizer, text: String) -> Self {
        Self::new(tokenizer, text, Kind::Prompt)
    }

    /// Begins a raw text that goes on where other text ended ([`Tokenizer::encode_more`]).
    #[must_use]
    pub fn of_more(tokenizer: &Tokenizer, text: String) -> Self {
        Self::new(tokenizer, text, Kind::More)
    }

    /// Begins what a template wrote: all of it, or its end after the token `last`
    /// ([`Tokenizer::encode_rendered`]).
    #[must_use]
    pub fn of_rendered(tokenizer: &Tokenizer, rendered: Rendered, last: Option<u32>) -> Self {
        let Rendered { text, mark } = rendered;
        Self::new(tokenizer, text, Kind::Rendered { mark, last })
    }

    fn new(tokenizer: &Tokenizer, text: String, kind: Kind) -> Self {
        let (tokenizer, ids, closing) = (tokenizer.clone(), Vec::new(), Vec::new());
        Self { tokenizer, text, done: 0, looked_at: PIECE_BYTES, ids, closing, kind }
    }

    /// Returns the number of tokens made so far.
    #[must_use]
    pub fn token_count(&self) -> usize {
        self.ids.len()
    }

    /// Returns the bytes that the next step looks at; 0 after the last.
    #[must_use]
    pub fn next_bytes(&self) -> usize {
        let rest = self.text.len() - self.done;
        if self.tokenizer.parts_texts() { rest.min(self.looked_at) } else { rest }
    }

    /// Makes the tokens of the next piece, or finds out that it is longer. Returns whether the text is done.
    ///
    /// # Errors
    /// The tokenizer has no token for a part of the text, or a run of it is too long to be tokenized at once.
    pub fn advance(&mut self) -> Result<bool, TextError> {
        let rest = &self.text[self.done..];
        let Some(end) = self.tokenizer.piece_end(rest, self.mark(), self.looked_at)? else {
            self.looked_at *= 2;
            return Ok(false);
        };
        let piece = &rest[..end];
        let (is_first, is_last) = (self.done == 0, piece.len() == rest.len());
        let mut ids = match self.kind {
            Kind::Rendered { mark, last } if is_first => self.tokenizer.encode_rendered(piece, mark, last)?,
            Kind::Rendered { mark, .. } => self.tokenizer.encode_rendered_more(piece, mark)?,
            Kind::More => self.tokenizer.encode_more(piece)?,
            Kind::Prompt if !is_first => self.tokenizer.encode_more(piece)?,
            Kind::Prompt if is_last => self.tokenizer.encode_prompt(piece)?,
            Kind::Prompt => {
                // What stands around a text depends on its start at most.
                let start = &piece[..floor(piece, START_BYTES)];
                let around = self.tokenizer.encode_prompt(start)?;
                let inner = self.tokenizer.encode(start, false)?;
                let (opening, closing) = around_of(&around, &inner);
                self.closing = closing.to_vec();
                [opening, &self.tokenizer.encode(piece, false)?].concat()
            }
        };
        self.ids.append(&mut ids);
        self.done += piece.len();
        self.looked_at = PIECE_BYTES;
        if is_last {
            self.ids.append(&mut self.closing);
        }
        Ok(is_last)
    }

    /// Returns the character that is dropped before the text is tokenized.
    fn mark(&self) -> Option<char> {
        match self.kind {
            Kind::Rendered { mark, .. } => mark,
            Kind::Prompt | Kind::More => None,
        }
    }

    /// Returns the tokens.
    #[must_use]
    pub fn into_ids(self) -> Vec<u32> {
        self.ids
    }
}

/// Returns what `around` has before and after `inner`.
fn around_of<'a>(around: &'a [u32], inner: &[u32]) -> (&'a [u32], &'a [u32]) {
    let more = around.len().saturating_sub(inner.len());
    let start = (0..=more).find(|start| around[*start..].starts_with(inner)).unwrap_or(0);
    (&around[..start], around.get(start + inner.len()..).unwrap_or_default())
}

#[cfg(test)]
#[path = "long_tests.rs"]
mod tests;
