//! What stands around the merges of a byte-level BPE vocabulary: GGUF keeps only a name for it
//! (`tokenizer.ggml.pre`, the names of llama.cpp's convert_hf_to_gguf.py). Each name's parts are those of the
//! models it was given for: SmolLM2, Qwen2, GPT-2 and Llama 3.

use serde_json::{Value, json};

use super::super::HubError;

/// What text is split by before merges apply, as Qwen2 and Llama 3 write it; they differ in how many digits
/// stay together.
const WORDS_BEFORE_DIGITS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
const WORDS_AFTER_DIGITS: &str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Types of tokens (gguf.md, `tokenizer.ggml.token_type`).
pub(super) const NORMAL: i64 = 1;
pub(super) const CONTROL: i64 = 3;
pub(super) const USER_DEFINED: i64 = 4;
pub(super) const UNUSED: i64 = 5;
pub(super) const BYTE: i64 = 6;

/// What stands around the merges: what `tokenizer.ggml.pre` names, or SentencePiece's way.
pub(super) struct Pre {
    pub(super) normalizer: Value,
    pub(super) splitter: Value,
    pub(super) post: Value,
    pub(super) decoder: Value,
    pub(super) ignore_merges: bool,
    pub(super) add_bos: bool,
}

fn byte_level(add_prefix_space: bool, trim_offsets: bool, use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    })
}

fn split(digits: &str, trim_offsets: bool) -> Value {
    let regex = format!("{WORDS_BEFORE_DIGITS}{digits}{WORDS_AFTER_DIGITS}");
    json!({
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
            byte_level(false, trim_offsets, false),
        ],
    })
}

/// Returns what a name stands for.
///
/// # Errors
/// `Unsupported`, with the names that are known.
pub(super) fn pre(name: &str) -> Result<Pre, HubError> {
    Ok(match name {
        "smollm" => Pre {
            normalizer: Value::Null,
            splitter: json!({
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level(false, true, true)],
            }),
            post: Value::Null,
            decoder: byte_level(true, true, true),
            ignore_merges: false,
            add_bos: false,
        },
        // "default" is what files from before the key have; they hold GPT-2's way of splitting or none known.
        "gpt-2" | "default" => Pre {
            normalizer: Value::Null,
            splitter: byte_level(false, true, true),
            post: byte_level(true, false, true),
            decoder: byte_level(true, true, true),
            ignore_merges: false,
            add_bos: false,
        },
        "qwen2" => Pre {
            normalizer: json!({"type": "NFC"}),
            splitter: split(r"\p{N}", false),
            post: byte_level(false, false, false),
            decoder: byte_level(false, false, false),
            ignore_merges: false,
            add_bos: false,
        },
        "llama-bpe" => Pre {
            normalizer: Value::Null,
            splitter: split(r"\p{N}{1,3}", true),
            post: byte_level(true, false, true),
            decoder: byte_level(true, true, true),
            ignore_merges: true,
            add_bos: true,
        },
        other => {
            let why = format!(
                "the pre-tokenizer {other:?} is unknown; known are smollm, qwen2, gpt-2, default, llama-bpe"
            );
            return Err(HubError::unsupported(why));
        }
    })
}
