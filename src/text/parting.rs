//! Where a long text may be parted so that the tokens of its pieces are those of the whole: where the
//! tokenizer parts it anyway, if that depends only on what follows. Found out once for each tokenizer.

use serde_json::Value;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizer as _, Tokenizer as Encoder};

use super::TextError;

/// Bytes of a piece: some tenths of a second.
pub(super) const PIECE_BYTES: usize = 64 << 10;

/// Limit of what cannot be parted: a run without the end of a word, or a text for a tokenizer to which every
/// text is one word. It is half of a million tokens in plain language.
pub(super) const UNPARTED_BYTES_MAX: usize = 2 << 20;

/// A piece ends at least this much before the end of what was looked at: an added token, or the end of a
/// word, may depend on what follows.
const MARGIN_BYTES: usize = 512;

/// What is known of a tokenizer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Parting {
    /// Whether the places where it parts a text depend only on what follows them.
    pub(super) is_local: bool,
    /// Most bytes of text that one token stands for; none where there is no such limit.
    pub(super) token_bytes_max: Option<usize>,
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
        let is_local = plain && local && bytes && composes;
        // Composition makes a character of up to three others.
        let shrinks = if normalizers.is_empty() { 1 } else { 4 };
        let token_bytes_max = (is_local && added.values().all(|token| !token.lstrip && !token.rstrip))
            .then_some(token_bytes_max.max(1) * shrinks);
        Self { is_local, token_bytes_max }
    }

    /// Returns the end of a text's first piece, in bytes; `mark` is not part of what is tokenized.
    ///
    /// # Errors
    /// The text is too long, and there is no such place.
    pub(super) fn piece_end(
        self,
        encoder: &Encoder,
        text: &str,
        mark: Option<char>,
    ) -> Result<usize, TextError> {
        let mut bytes = PIECE_BYTES;
        // A text of one piece and a bit is not worth parting.
        while self.is_local && text.len() > bytes + bytes / 2 && bytes <= UNPARTED_BYTES_MAX {
            if let Some(end) = last_end(encoder, &text[..floor(text, bytes)], mark)? {
                return Ok(end);
            }
            bytes *= 2;
        }
        if text.len() <= UNPARTED_BYTES_MAX {
            return Ok(text.len());
        }
        Err(TextError::Encode(format!("more than {UNPARTED_BYTES_MAX} bytes without a place to part them")))
    }
}

/// Returns the last place where a text is parted whatever follows it; none if there is no such place. Beside
/// `mark`, which is dropped before a text is tokenized, there is none.
fn last_end(encoder: &Encoder, text: &str, mark: Option<char>) -> Result<Option<usize>, TextError> {
    let mut parts = encoder.get_added_vocabulary().extract_and_normalize(encoder.get_normalizer(), text);
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

/// White space may be part of what follows it.
fn is_ink(character: char) -> bool {
    !character.is_whitespace()
}

fn floor(text: &str, mut bytes: usize) -> usize {
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
