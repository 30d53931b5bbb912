//! A model's tokenizer: text to token ids and back.
//!
//! Encoding is done by the tokenizers crate, in steps (`encoder`). Decoding is our own (`pieces`,
//! `detokenizer`), so that tokens give the same text in a stream and as a whole. Cheap to clone, shared by
//! all threads.

use std::sync::Arc;

use super::encoder::Before;
use super::parting::Places;
use super::vocabulary::Vocabulary;
use super::{Detokenizer, TextError, TextFiles};

/// A loaded tokenizer.
#[derive(Clone, Debug)]
pub struct Tokenizer(Arc<Vocabulary>);

impl Tokenizer {
    /// Makes the tokenizer of `tokenizer.json`, with the names of special tokens from `tokenizer_config.json`
    /// and `special_tokens_map.json` where they exist.
    ///
    /// # Errors
    /// `tokenizer.json` is missing or damaged, or has a decoder that is not supported.
    pub fn new(files: &TextFiles) -> Result<Self, TextError> {
        Ok(Self(Arc::new(Vocabulary::new(files)?)))
    }

    /// Returns whether a token stands for no text, such as the beginning or end of a message.
    #[must_use]
    pub fn is_control(&self, id: u32) -> bool {
        self.0.control.contains(&id)
    }

    /// Returns the token ids of a text that stands alone. Special tokens written in the text become those
    /// tokens; `add_special_tokens` also adds the ones that the tokenizer puts around every text: those of
    /// `tokenizer.json`, unless `tokenizer_config.json` says yes or no to one.
    ///
    /// # Errors
    /// The tokenizer has neither a token for a part of the text nor an unknown token.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let mut ids = self.0.encoder.encode(text, Before::Nothing, None)?;
        if add_special_tokens {
            let (before, after) = self.0.encoder.around();
            let special = &self.0.special;
            ids.splice(0..0, self.wanted(special.add_bos, "bos_token", before));
            ids.extend(self.wanted(special.add_eos, "eos_token", after));
        }
        Ok(ids)
    }

    /// Returns the ids that go to one end of a text: those of the file, with or without the named token where
    /// a config says so.
    fn wanted(&self, wanted: Option<bool>, name: &str, file: &[u32]) -> Vec<u32> {
        let named = self.0.special.get(name).and_then(|token| self.token_id(token));
        match (wanted, named) {
            (Some(false), Some(named)) => file.iter().copied().filter(|id| *id != named).collect(),
            (Some(true), Some(named)) if file.is_empty() => vec![named],
            _ => file.to_vec(),
        }
    }

    /// Returns the token ids of a text that goes on where other text ended: it gets none of the space that
    /// some tokenizers put before a text, so that both texts together are what their tokens stand for.
    ///
    /// # Errors
    /// As `encode`.
    pub fn encode_more(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.0.encoder.encode(text, Before::Text, None)
    }

    /// Returns the token ids of a text that a chat template wrote, or of its end after the token `last`.
    /// Special tokens in it become those tokens, except what `mark` keeps apart; see [`super::Rendered`].
    ///
    /// # Errors
    /// As `encode`.
    pub fn encode_rendered(
        &self,
        text: &str,
        mark: Option<char>,
        last: Option<u32>,
    ) -> Result<Vec<u32>, TextError> {
        let before = match last {
            None => Before::Nothing,
            Some(id) if self.0.added.contains(&id) => Before::Token,
            Some(_) => Before::Text,
        };
        self.0.encoder.encode(text, before, mark)
    }

    /// Returns the token ids of a text that goes on within what a chat template wrote.
    ///
    /// # Errors
    /// As `encode`.
    pub(super) fn encode_rendered_more(&self, text: &str, mark: Option<char>) -> Result<Vec<u32>, TextError> {
        self.0.encoder.encode(text, Before::Text, mark)
    }

    /// Returns the token ids of a raw prompt: special tokens are added unless the text starts with the
    /// beginning-of-sequence token (mlx-lm's `stream_generate`).
    ///
    /// # Errors
    /// As `encode`.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let has_bos = self.bos_token().is_some_and(|bos| text.starts_with(bos));
        self.encode(text, !has_bos)
    }

    /// Returns the highest token id plus 1. Lower ids may be unused.
    #[must_use]
    pub fn vocabulary_size(&self) -> u32 {
        self.0.size
    }

    /// Returns the bytes that a token adds after the start of a text; none for an unknown id. A special token
    /// adds its name. The bytes of one token need not be UTF-8.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.piece(id).to_vec()
    }

    /// Returns the same bytes in place.
    #[must_use]
    pub fn piece(&self, id: u32) -> &[u8] {
        self.0.piece(id)
    }

    /// Returns the text of a whole sequence, with special tokens and without unknown ids. Bytes that are not
    /// UTF-8 become U+FFFD, one for each maximal part of a character.
    ///
    /// # Errors
    /// None: every sequence of ids has a text.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        let mut detokenizer = self.detokenizer();
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        text.push_str(&detokenizer.finish());
        Ok(text)
    }

    /// Returns the text of the beginning-of-sequence token.
    #[must_use]
    pub fn bos_token(&self) -> Option<&str> {
        self.0.special.get("bos_token")
    }

    /// Returns the id of the tokenizer's end-of-sequence token. `eos_token_ids` returns all that end a
    /// sequence.
    #[must_use]
    pub fn eos_token_id(&self) -> Option<u32> {
        self.token_id(self.0.special.get("eos_token")?)
    }

    /// Returns the id of the token with this text.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.0.encoder.tokenizer().token_to_id(token)
    }

    /// Starts a stream of tokens.
    #[must_use]
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.0))
    }

    /// Starts a stream of tokens that goes on after others: the text of both together is their whole text.
    #[must_use]
    pub fn detokenizer_after(&self, ids: &[u32]) -> Detokenizer {
        let mut detokenizer = self.detokenizer();
        detokenizer.skip(ids);
        detokenizer
    }

    /// Returns the control tokens: their texts and ids.
    pub(super) fn control_tokens(&self) -> impl Iterator<Item = (String, u32)> {
        let tokenizer = self.0.encoder.tokenizer();
        self.0.control.iter().filter_map(|&id| Some((tokenizer.id_to_token(id)?, id)))
    }

    /// Returns the most bytes of text that a token stands for; none where there is no such limit.
    #[must_use]
    pub fn token_bytes_max(&self) -> Option<usize> {
        self.0.parting.token_bytes_max
    }

    /// Returns whether it takes long texts piece by piece.
    pub(super) fn parts_texts(&self) -> bool {
        self.0.parting.places != Places::None
    }

    /// Returns the end of a text's first piece, in bytes, if its first `bytes` have one.
    ///
    /// # Errors
    /// The text is too long, and cannot be parted.
    pub(super) fn piece_end(
        &self,
        text: &str,
        mark: Option<char>,
        bytes: usize,
    ) -> Result<Option<usize>, TextError> {
        self.0.parting.piece_end(self.0.encoder.tokenizer(), text, mark, bytes)
    }

    /// Returns the names and texts of special tokens.
    pub(super) fn special_tokens(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.special.iter()
    }
}
