//! The token ids that end a sequence.

use serde_json::Value;

use super::Tokenizer;

/// Returns the ids that end a sequence, sorted: all that `generation_config.json`, `config.json` and its text
/// part, the tokenizer's `eos_token` and the chat template (`end_of_turn`) name. Files often know only some.
#[must_use]
pub fn eos_token_ids(
    config: &Value,
    generation_config: Option<&Value>,
    tokenizer: &Tokenizer,
    end_of_turn: Option<u32>,
) -> Vec<u32> {
    let configs = [generation_config, Some(config), config.get("text_config")];
    let mut ids: Vec<u32> = configs.into_iter().flatten().flat_map(ids_of).collect();
    ids.extend(tokenizer.eos_token_id());
    ids.extend(end_of_turn);
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
