//! The special tokens a model folder names (`bos_token`, `eos_token`, …), and the ids that end a
//! sequence.
//!
//! Names come from `tokenizer_config.json`; those that it lacks come from `special_tokens_map.json`, as in
//! transformers. Each is a string or an object with `content`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{TextFiles, Tokenizer};

/// Special tokens by name, as chat templates see them.
#[derive(Debug, Default)]
pub(super) struct SpecialTokens {
    tokens: BTreeMap<String, String>,
    /// Whether `bos_token` and `eos_token` go around every text; `None` leaves that to `tokenizer.json`.
    /// transformers 5 replaces the file's rule where the config has either flag.
    pub(super) around: Option<(bool, bool)>,
}

impl SpecialTokens {
    pub(super) fn new(files: &TextFiles) -> Self {
        let mut tokens = BTreeMap::new();
        let mut around = None;
        for file in [&files.special_tokens_map, &files.tokenizer_config] {
            let Some(Value::Object(config)) = file else { continue };
            let flag = |name: &str| config.get(name).map(|flag| flag.as_bool().unwrap_or(false));
            let flags = (flag("add_bos_token"), flag("add_eos_token"));
            if flags.0.or(flags.1).is_some() {
                around = Some((flags.0.unwrap_or(false), flags.1.unwrap_or(false)));
            }
            for (name, value) in
                config.iter().filter(|(name, _)| name.ends_with("_token") && !name.starts_with("add_"))
            {
                match content(value) {
                    Some(text) => tokens.insert(name.clone(), text.to_owned()),
                    None => tokens.remove(name),
                };
            }
        }
        Self { tokens, around }
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.tokens.get(name).map(String::as_str)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.tokens.iter().map(|(name, text)| (name.as_str(), text.as_str()))
    }
}

fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

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
