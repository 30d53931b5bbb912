//! Turns a stream of tokens into text, one per sequence.
//!
//! Keeps true: the results of `push` and `finish`, concatenated, are `Tokenizer::decode` of all ids; each
//! part is whole characters; only an incomplete character and the trailing characters that the decoder may
//! strip are held back. A token costs the length of its own bytes, however long the stream.

use std::sync::Arc;

use super::vocabulary::Vocabulary;

/// The state of one stream.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    /// Whether no known token came yet.
    first: bool,
    /// The bytes of an incomplete character.
    partial: Vec<u8>,
    /// Number of leading characters that may still be stripped.
    strip_start: usize,
    /// Number of trailing characters that are stripped if the stream ends here.
    held: usize,
}

impl Detokenizer {
    pub(super) fn new(vocabulary: Arc<Vocabulary>) -> Self {
        let strip_start = vocabulary.strip().map_or(0, |strip| strip.start);
        Self { vocabulary, first: true, partial: Vec::new(), strip_start, held: 0 }
    }

    /// Takes tokens whose text is known already, but for a character that they leave incomplete.
    pub(super) fn skip(&mut self, ids: &[u32]) {
        for &id in ids {
            self.push(id);
        }
        self.held = 0;
    }

    /// Takes the next token and returns the characters that are certain now, perhaps none.
    pub fn push(&mut self, id: u32) -> String {
        if self.first {
            let Some(piece) = self.vocabulary.first_piece(id) else { return String::new() };
            self.first = false;
            self.partial.extend_from_slice(&piece);
        } else {
            self.partial.extend_from_slice(self.vocabulary.piece(id));
        }
        let text = take_characters(&mut self.partial);
        self.strip(text)
    }

    /// Ends the stream and returns the text held back. An incomplete character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = if self.partial.is_empty() {
            String::new()
        } else {
            self.strip(char::REPLACEMENT_CHARACTER.to_string())
        };
        self.partial.clear();
        // The held characters are trailing ones that the decoder strips.
        self.held = 0;
        text
    }

    /// Strips the start as the decoder does, and holds back the characters that it may strip from the end.
    fn strip(&mut self, text: String) -> String {
        let Some(strip) = self.vocabulary.strip() else { return text };
        let mut out = String::with_capacity(text.len());
        for c in text.chars() {
            if c != strip.content {
                self.strip_start = 0;
                out.extend(std::iter::repeat_n(strip.content, self.held));
                out.push(c);
                self.held = 0;
            } else if self.strip_start > 0 {
                self.strip_start -= 1;
            } else if self.held < strip.stop {
                self.held += 1;
            } else {
                out.push(c);
            }
        }
        out
    }
}

/// Takes the complete characters off the front, as `String::from_utf8_lossy` reads them; bytes that may
/// still become a character stay.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut taken = 0;
    loop {
        match std::str::from_utf8(&bytes[taken..]) {
            Ok(rest) => {
                text.push_str(rest);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let valid = taken + error.valid_up_to();
                text.push_str(std::str::from_utf8(&bytes[taken..valid]).unwrap_or_default());
                let Some(invalid) = error.error_len() else {
                    bytes.drain(..valid);
                    return text;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                taken = valid + invalid;
            }
        }
    }
}
