//! The token ids that end a sequence.

use serde_json::Value;

use super::Tokenizer;

/// Returns the ids that end a sequence, sorted: those of `generation_config.json`, or where it names none
/// those of `config.json`, and the tokenizer's `eos_token` (mlx-lm's `load_config` and `TokenizerWrapper`).
#[must_use]
pub fn eos_token_ids(config: &Value, generation_config: Option<&Value>, tokenizer: &Tokenizer) -> Vec<u32> {
    let mut ids = generation_config.map(ids_of).unwrap_or_default();
    if ids.is_empty() {
        ids = ids_of(config);
    }
    if ids.is_empty() {
        ids = config.get("text_config").map(ids_of).unwrap_or_default();
    }
    ids.extend(tokenizer.eos_token_id());
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Returns the `eos_token_id` of a config: one id or a list. Values that are not token ids (-1, null) are
/// omitted.
fn ids_of(config: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}
