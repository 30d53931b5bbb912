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

    /// Takes tokens whose text is known already, but for a character that they leave incomplete. Only the
    /// first ones matter, of which the start may be stripped, and the last ones.
    pub(super) fn skip(&mut self, ids: &[u32]) {
        /// Bytes of the longest character: where it begins is among the last ones.
        const CHARACTER_BYTES_MAX: usize = 4;
        let mut rest = ids;
        while let [id, after @ ..] = rest
            && (self.first || self.strip_start > 0)
        {
            self.push(*id);
            rest = after;
        }
        let mut bytes = 0;
        let last = rest.iter().rposition(|&id| {
            bytes += self.vocabulary.piece(id).len();
            bytes >= CHARACTER_BYTES_MAX
        });
        if let Some(last) = last {
            self.partial.clear();
            rest = &rest[last..];
        }
        for &id in rest {
            self.push(id);
        }
        self.held = 0;
    }

    /// Takes the next token and returns the characters that are certain now, perhaps none.
    pub fn push(&mut self, id: u32) -> String {
        #[cfg(test)]
        tests::PUSHED.with(|pushed| pushed.set(pushed.get() + 1));
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::text::{TextFiles, Tokenizer};

    thread_local! {
        /// Number of tokens that were taken one by one on this thread.
        pub(super) static PUSHED: Cell<usize> = const { Cell::new(0) };
    }

    /// Letters, spaces, and the bytes of a character of four; ids from 8 on are unknown.
    const TOKENS: [&str; 8] = ["?", "a", "ð", "Ł", "ĺ", "Ģ", "Ġ", "ĠaðŁ"];

    fn tokenizer(decoder: &Value) -> Tokenizer {
        let vocabulary: serde_json::Map<String, Value> =
            TOKENS.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), id.into())).collect();
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "decoder": decoder,
            "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "?" },
        });
        let tokenizer = Some(tokenizer.to_string().into_bytes());
        Tokenizer::new(&TextFiles { tokenizer, ..TextFiles::default() }).unwrap()
    }

    fn byte_level() -> Value {
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false })
    }

    fn stripping(start: usize, stop: usize) -> Value {
        let strip = json!({ "type": "Strip", "content": " ", "start": start, "stop": stop });
        json!({ "type": "Sequence", "decoders": [byte_level(), { "type": "Fuse" }, strip] })
    }

    proptest! {
        #[test]
        fn what_is_skipped_leaves_what_its_tokens_would(
            ids in prop::collection::vec(0..10_u32, 0..40),
            cut in 0..40_usize,
        ) {
            for decoder in [byte_level(), stripping(1, 0), stripping(3, 2)] {
                let tokenizer = tokenizer(&decoder);
                let (mut read, mut skipped) = (tokenizer.detokenizer(), tokenizer.detokenizer());
                let (first, second) = ids.split_at(cut.min(ids.len()));
                for ids in [first, second] {
                    ids.iter().for_each(|&id| drop(read.push(id)));
                    read.held = 0;
                    skipped.skip(ids);
                    let state = |of: &Detokenizer| (of.first, of.partial.clone(), of.strip_start, of.held);
                    prop_assert_eq!(state(&skipped), state(&read), "{}", decoder);
                }
            }
        }
    }

    #[test]
    fn a_long_prompt_costs_its_ends() {
        let tokenizer = tokenizer(&stripping(1, 0));
        let ids: Vec<u32> = (0..30_000).map(|place| place % 8).collect();
        PUSHED.set(0);
        drop(tokenizer.detokenizer_after(&ids));
        assert!(PUSHED.get() < 10, "{}", PUSHED.get());
    }
}
