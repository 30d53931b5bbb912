//! Where a long text may be parted so that the tokens of its pieces are those of the whole: where the
//! tokenizer parts it anyway, if that depends only on what follows; or between words, if no token has the end
//! of one and the space after it. Found out once for each tokenizer.

use serde_json::Value;
use tokenizers::{Model as _, ModelWrapper, OffsetReferential, OffsetType, PreTokenizer as _};
use tokenizers::{PreTokenizedString, Tokenizer as Encoder};

use super::TextError;

/// Bytes of a piece: some tenths of a second.
pub(super) const PIECE_BYTES: usize = 64 << 10;

/// Limit of what cannot be parted: a run without the end of a word, or a text for a tokenizer to which every
/// text is one word. It is half of a million tokens in plain language.
pub(super) const UNPARTED_BYTES_MAX: usize = 2 << 20;

/// A piece ends at least this much before the end of what was looked at: an added token, or the end of a
/// word, may depend on what follows.
const MARGIN_BYTES: usize = 512;

/// What SentencePiece writes for a space.
const SPACE: char = '▁';

/// What is known of a tokenizer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Parting {
    pub(super) places: Places,
    /// Most bytes of text that one token stands for; none where there is no such limit.
    pub(super) token_bytes_max: Option<usize>,
}

/// Where texts may be parted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Places {
    /// Nowhere.
    #[default]
    None,
    /// Where the pre-tokenizer parts them, which depends only on what follows.
    Stages,
    /// Between a word and the space after it: they are never in one token.
    Words,
}

impl Parting {
    /// Finds out about a tokenizer; `token_bytes_max` are the bytes of its longest token.
    pub(super) fn new(encoder: &Encoder, token_bytes_max: usize) -> Self {
        let added = encoder.get_added_tokens_decoder();
        let plain = added.values().all(|token| !token.single_word && token.content.len() < MARGIN_BYTES / 2);
        let stages = flat(serde_json::to_value(encoder.get_pre_tokenizer()).ok(), "pretokenizers");
        let local = stages.iter().all(is_local_stage);
        // Every byte has a token then.
        let bytes = stages.iter().any(|stage| stage["type"] == "ByteLevel");
        let normalizers = flat(serde_json::to_value(encoder.get_normalizer()).ok(), "normalizers");
        let composes = normalizers.iter().all(|stage| {
            ["NFC", "NFD", "NFKC", "NFKD", "Lowercase"].iter().any(|name| stage["type"] == *name)
        });
        let places = if plain && local && bytes && composes {
            Places::Stages
        } else if plain && writes_spaces(&normalizers, &stages) && has_words_apart(encoder) {
            Places::Words
        } else {
            Places::None
        };
        let shrinks = match places {
            // What stands for a space may be written in the text itself.
            Places::Words => SPACE.len_utf8(),
            Places::None | Places::Stages if normalizers.is_empty() => 1,
            // Composition makes a character of up to three others.
            Places::None | Places::Stages => 4,
        };
        let swallows = added.values().any(|token| token.lstrip || token.rstrip);
        let is_bounded = places != Places::None && !swallows;
        Self { places, token_bytes_max: is_bounded.then_some(token_bytes_max.max(1) * shrinks) }
    }

    /// Returns the end of a text's first piece, in bytes, if its first `bytes` have one; they are to be
    /// doubled otherwise. `mark` is not part of what is tokenized.
    ///
    /// # Errors
    /// The text is too long, and there is no such place.
    pub(super) fn piece_end(
        self,
        encoder: &Encoder,
        text: &str,
        mark: Option<char>,
        bytes: usize,
    ) -> Result<Option<usize>, TextError> {
        let too_long = || {
            let why = format!("more than {UNPARTED_BYTES_MAX} bytes without a place to part them");
            Err(TextError::Encode(why))
        };
        // A text of one piece and a bit is not worth parting.
        if self.places == Places::None || text.len() <= bytes + bytes / 2 {
            return if text.len() <= UNPARTED_BYTES_MAX { Ok(Some(text.len())) } else { too_long() };
        }
        let looked_at = &text[..floor(text, bytes)];
        let end = match self.places {
            Places::Stages => last_end(encoder, looked_at, mark)?,
            Places::Words | Places::None => last_word_end(encoder, looked_at, mark),
        };
        if end.is_none() && bytes >= UNPARTED_BYTES_MAX { too_long() } else { Ok(end) }
    }
}

/// Returns the last place where a text is parted whatever follows it; none if there is no such place. Beside
/// `mark`, which is dropped before a text is tokenized, there is none.
fn last_end(encoder: &Encoder, text: &str, mark: Option<char>) -> Result<Option<usize>, TextError> {
    let mut parts = sections(encoder, text);
    if let Some(stages) = encoder.get_pre_tokenizer() {
        stages.pre_tokenize(&mut parts).map_err(|error| TextError::Encode(error.to_string()))?;
    }
    let splits = parts.get_splits(OffsetReferential::Original, OffsetType::Byte);
    let end_max = text.len().saturating_sub(MARGIN_BYTES);
    let before = |end: usize| text.get(..end).and_then(|start| start.chars().next_back());
    let after = |end: usize| text.get(end..).and_then(|rest| rest.chars().next());
    let is_marked = |end: usize| mark.is_some() && (before(end) == mark || after(end) == mark);
    let mut ends = splits.iter().rev().map(|(_, (_, end), _)| *end).filter(|end| *end <= end_max);
    Ok(ends.find(|end| before(*end).is_some_and(is_ink) && !is_marked(*end)))
}

/// Returns the last end of a word with a space after it, where no added token is; none if there is no such
/// place.
fn last_word_end(encoder: &Encoder, text: &str, mark: Option<char>) -> Option<usize> {
    let parts = sections(encoder, text);
    let end_max = floor(text, text.len().saturating_sub(MARGIN_BYTES));
    let ends_word = |end: usize| {
        let last = text.get(..end).and_then(|start| start.chars().next_back());
        last.is_some_and(|last| is_ink(last) && last != SPACE && Some(last) != mark)
    };
    let splits = parts.get_splits(OffsetReferential::Original, OffsetType::Byte);
    splits.iter().rev().filter(|(_, _, token)| token.is_none()).find_map(|(_, (start, end), _)| {
        let section = text.get(*start..end_max.min(*end))?;
        let mut spaces = section.rmatch_indices(' ').map(|(at, _)| start + at);
        spaces.find(|end| end > start && ends_word(*end))
    })
}

/// Returns the added tokens of a text, and the normalized sections between them.
fn sections(encoder: &Encoder, text: &str) -> PreTokenizedString {
    encoder.get_added_vocabulary().extract_and_normalize(encoder.get_normalizer(), text)
}

/// White space may be part of what follows it.
fn is_ink(character: char) -> bool {
    !character.is_whitespace()
}

/// Returns the most bytes of a text, up to `bytes`, that end at a character.
pub(super) fn floor(text: &str, mut bytes: usize) -> usize {
    while !text.is_char_boundary(bytes) {
        bytes -= 1;
    }
    bytes
}

/// Returns the stages of a sequence, or the only one.
fn flat(stage: Option<Value>, list: &str) -> Vec<Value> {
    match stage {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Object(mut sequence)) if sequence.contains_key(list) => {
            let stages = sequence.remove(list).and_then(|stages| stages.as_array().cloned());
            stages.unwrap_or_default().into_iter().flat_map(|stage| flat(Some(stage), list)).collect()
        }
        Some(stage) => vec![stage],
    }
}

/// Returns whether these stages do nothing but write spaces as SentencePiece does, and part texts at them.
fn writes_spaces(normalizers: &[Value], stages: &[Value]) -> bool {
    let space = SPACE.to_string();
    let replaces = |stage: &Value| {
        stage["type"] == "Replace" && stage["pattern"]["String"] == " " && stage["content"] == *space
    };
    let prepends = |stage: &Value| stage["type"] == "Prepend" && stage["prepend"] == *space;
    let parts = |stage: &Value| stage["type"] == "Metaspace" && stage["replacement"] == *space;
    let has_no_effect = |stage: &Value| stage["type"] == "Split" && stage["pattern"]["String"] == " ";
    let are_replaced = normalizers.iter().any(&replaces);
    normalizers.iter().all(|stage| replaces(stage) || prepends(stage))
        && stages.iter().all(|stage| parts(stage) || (are_replaced && has_no_effect(stage)))
        && (are_replaced || stages.iter().any(&parts))
}

/// Returns whether the tokens of a word do not depend on the space after it, nor the other way round: the
/// model merges pairs into tokens, and no token has both.
fn has_words_apart(encoder: &Encoder) -> bool {
    let ModelWrapper::BPE(model) = encoder.get_model() else { return false };
    let only_merges = model.dropout.is_none()
        && !model.ignore_merges
        && model.continuing_subword_prefix.is_none()
        && model.end_of_word_suffix.is_none();
    // Neighbours without a token would become one unknown token.
    let knows_bytes = || {
        model.byte_fallback
            && (0..=u8::MAX).all(|byte| model.token_to_id(&format!("<0x{byte:02X}>")).is_some())
    };
    let joins = |token: &String| {
        let next = token.chars().skip(1);
        token.chars().zip(next).any(|(one, next)| next == SPACE && one != SPACE && is_ink(one))
    };
    only_merges && knows_bytes() && !model.get_vocab().keys().any(joins)
}

/// Returns whether a stage parts a text from left to right, without looking back.
fn is_local_stage(stage: &Value) -> bool {
    const BACK: [&str; 7] = ["(?<=", "(?<!", "\\b", "\\B", "\\A", "\\G", "\\K"];
    match stage["type"].as_str() {
        Some("Digits") => true,
        Some("ByteLevel") => stage["add_prefix_space"] == false,
        Some("Split") => {
            let regex = stage["pattern"]["Regex"].as_str();
            let looks_back =
                |regex: &str| regex.starts_with('^') || BACK.iter().any(|sign| regex.contains(sign));
            stage["behavior"] == "Isolated" && regex.is_some_and(|regex| !looks_back(regex))
        }
        _ => false,
    }
}
