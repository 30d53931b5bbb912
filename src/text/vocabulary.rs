//! Contents of a tokenizer's files: the encoder, the bytes that each token adds, and the special tokens.
//! Shared by the tokenizer and by every stream that is detokenized.

use std::collections::BTreeSet;

use serde::de::IgnoredAny;

use super::encoder::Encoder;
use super::parting::Parting;
use super::pieces::{Pieces, Stages, Strip};
use super::special::SpecialTokens;
use super::{TextError, TextFiles};

/// The file that defines a tokenizer.
const FILE: &str = "tokenizer.json";

/// A tokenizer's files, parsed.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pub(super) encoder: Encoder,
    stages: Stages,
    pieces: Pieces,
    /// One more than the highest token id.
    pub(super) size: u32,
    pub(super) special: SpecialTokens,
    /// Ids of the tokens that are found in a text before anything else, control tokens among them.
    pub(super) added: BTreeSet<u32>,
    /// Ids of control tokens, which stand for no text.
    pub(super) control: BTreeSet<u32>,
    /// How it parts long texts.
    pub(super) parting: Parting,
}

impl Vocabulary {
    /// Makes the vocabulary of `tokenizer.json`, with the names of special tokens from
    /// `tokenizer_config.json` and `special_tokens_map.json` where they exist.
    ///
    /// # Errors
    /// `tokenizer.json` is missing or damaged, or has a decoder that is not supported.
    pub(super) fn new(files: &TextFiles) -> Result<Self, TextError> {
        let invalid = |why: String| TextError::Invalid { file: FILE, why };
        let bytes = files.tokenizer.as_ref().ok_or_else(|| invalid("is missing".to_owned()))?;
        // The tokenizers crate panics on some malformed files: it only gets well-formed ones.
        serde_json::from_slice::<IgnoredAny>(bytes)
            .map_err(|error| invalid(format!("is not valid JSON: {error}")))?;
        let mut tokenizer =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| invalid(error.to_string()))?;
        // Files saved from training set these; a prompt is never cut or padded.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| invalid(error.to_string()))?;

        let unsupported = |what: String| TextError::Unsupported { file: FILE, what };
        let size = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id.saturating_add(1));
        let stages = Stages::new(&tokenizer).map_err(unsupported)?;
        let pieces = Pieces::new(&stages, size, |id| tokenizer.id_to_token(id)).map_err(unsupported)?;
        let special = SpecialTokens::new(files);
        let tokens = tokenizer.get_added_tokens_decoder();
        let added = tokens.keys().copied().collect();
        let control = tokens.into_iter().filter(|(_, token)| is_control(token)).map(|(id, _)| id).collect();
        let parting = Parting::new(&tokenizer, pieces.longest());
        let encoder = Encoder::new(tokenizer).map_err(invalid)?;
        Ok(Self { encoder, stages, pieces, size, special, added, control, parting })
    }

    /// Returns the bytes that a token adds at the start of a text; `None` for an unknown id.
    pub(super) fn first_piece(&self, id: u32) -> Option<Vec<u8>> {
        self.encoder.tokenizer().id_to_token(id).map(|token| self.stages.first(token))
    }

    /// Returns the bytes that a token adds after the start.
    pub(super) fn piece(&self, id: u32) -> &[u8] {
        self.pieces.get(id)
    }

    pub(super) fn strip(&self) -> Option<Strip> {
        self.stages.strip()
    }
}

/// Returns whether a token is one of markup: a special one, or one that is written like those. Some models
/// declare the tokens between their messages as ordinary ones.
fn is_control(token: &tokenizers::AddedToken) -> bool {
    let text = token.content.as_str();
    let barred = |open: &str, close: &str| text.starts_with(open) && text.ends_with(close);
    token.special || barred("<|", "|>") || barred("<｜", "｜>")
}
