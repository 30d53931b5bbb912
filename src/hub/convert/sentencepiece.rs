//! Tokenizers of the kind that GGUF calls `llama`: SentencePiece vocabularies, whose merges follow from the
//! tokens' scores, as transformers' converter has it (convert_slow_tokenizer.py, `generate_merges` and
//! `LlamaConverter`).

use std::cmp::Reverse;
use std::collections::HashMap;

use serde_json::{Value, json};

use super::super::HubError;
use super::gguf::Gguf;
use super::pretokenizer::{NORMAL, Pre, USER_DEFINED};

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

/// Returns what stands around the merges.
pub(super) fn pre(gguf: &Gguf) -> Result<Pre, HubError> {
    let prefixed = gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let normalizers: Vec<Value> =
        prefixed.then(|| json!({"type": "Prepend", "prepend": SPACE})).into_iter().chain([replace]).collect();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    decoders.extend(prefixed.then(|| json!({"type": "Strip", "content": " ", "start": 1, "stop": 0})));
    Ok(Pre {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        splitter: Value::Null,
        post: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        ignore_merges: false,
        add_bos: true,
    })
}

/// Returns every way to make a token of two others, the best token first; of equal scores longer left parts,
/// then longer right parts, then the order of the vocabulary.
///
/// # Errors
/// `Damaged` if there are not as many scores as tokens, or one is not a number.
pub(super) fn merges(
    gguf: &Gguf,
    (tokens, kinds): (&[String], &[i64]),
    vocab: &HashMap<&str, usize>,
) -> Result<Vec<Value>, HubError> {
    let scores = gguf.floats("tokenizer.ggml.scores")?.unwrap_or_default();
    if scores.len() != tokens.len() || scores.iter().any(|score| score.is_nan()) {
        return Err(gguf.damaged("has not as many scores as tokens"));
    }
    let is_text = |id: usize| matches!(kinds[id], NORMAL | USER_DEFINED);
    let part = |text: &str| vocab.get(text).copied().filter(|&id| is_text(id));
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| is_text(*id)) {
        let borders = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let mut pairs: Vec<_> =
            borders.filter_map(|(left, right)| Some(((part(left)?, part(right)?), left, right))).collect();
        pairs.sort_by_key(|(ids, ..)| *ids);
        merges.extend(pairs.into_iter().map(|(_, left, right)| (scores[id], left, right)));
    }
    merges.sort_by(|(one, left, right), (other, other_left, other_right)| {
        let lengths = |left: &str, right: &str| Reverse((left.chars().count(), right.chars().count()));
        other.total_cmp(one).then_with(|| lengths(left, right).cmp(&lengths(other_left, other_right)))
    });
    Ok(merges.into_iter().map(|(_, left, right)| json!([left, right])).collect())
}
