//! A model's folder as small as can be: a tokenizer of one token a byte, a chat template, one tensor.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::text_detokenizer::{WORDS, metaspace_first, words_file};

/// The token that begins a message.
pub const START: u32 = 256;
/// The token that ends one, and the output.
pub const END: u32 = 257;
/// Tokens in the vocabulary.
pub const VOCABULARY: u32 = 258;
/// Tokens a sequence may have.
pub const CONTEXT: u32 = 400;

const TEMPLATE: &str = "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}\
<|start|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant:{% endif %}";

/// The ids of a text without special tokens.
pub fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// The ids of a message, as the template writes it.
pub fn message(role: &str, text: &str) -> Vec<u32> {
    [vec![START], ids(&format!("{role}:{text}")), vec![END]].concat()
}

/// The ids that begin the answer.
pub fn answer_start() -> Vec<u32> {
    [vec![START], ids("assistant:")].concat()
}

pub fn write(folder: &Path) {
    write_with(folder, &tokenizer(), VOCABULARY);
}

/// The same with one token a word: a SentencePiece model, which writes the space before a word into its
/// token.
pub fn write_words(folder: &Path) {
    let vocabulary = u32::try_from(WORDS.len() + 1).unwrap();
    write_with(folder, &words_file(&metaspace_first()), vocabulary);
}

/// A model with this tokenizer, whose last token ends the output.
fn write_with(folder: &Path, tokenizer: &Value, vocabulary: u32) {
    fs::create_dir_all(folder).unwrap();
    let put = |name: &str, value: &Value| fs::write(folder.join(name), value.to_string()).unwrap();
    put(
        "config.json",
        &json!({
            "model_type": "llama", "vocab_size": vocabulary, "max_position_embeddings": CONTEXT,
            "eos_token_id": vocabulary - 1,
        }),
    );
    put("tokenizer_config.json", &json!({ "chat_template": TEMPLATE, "eos_token": "<|end|>" }));
    put("tokenizer.json", tokenizer);
    let header = json!({ "w": { "dtype": "F32", "shape": [2], "data_offsets": [0, 8] } }).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 8]].concat();
    fs::write(folder.join("model.safetensors"), file).unwrap();
}

fn tokenizer() -> Value {
    let special = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    };
    let mut vocabulary: Map<String, Value> =
        (0..=255_u8).map(|byte| (byte_letter(byte).to_string(), byte.into())).collect();
    vocabulary.insert("<|start|>".into(), START.into());
    vocabulary.insert("<|end|>".into(), END.into());
    let level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0",
        "added_tokens": [special(START, "<|start|>"), special(END, "<|end|>")],
        "pre_tokenizer": level,
        "decoder": level,
        "model": { "type": "BPE", "vocab": vocabulary, "merges": [] },
    })
}

/// The letter that byte-level tokenizers write for a byte (GPT-2's `bytes_to_unicode`).
fn byte_letter(byte: u8) -> char {
    let is_shown = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if is_shown(byte) {
        return char::from(byte);
    }
    let hidden_before = (0..byte).filter(|byte| !is_shown(*byte)).count();
    char::from_u32(256 + u32::try_from(hidden_before).unwrap()).unwrap()
}
