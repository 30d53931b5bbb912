//! The special tokens a model folder names (`bos_token`, `eos_token`, …), and the ids that end a
//! sequence.
//!
//! Names come from `tokenizer_config.json`; those that it lacks come from `special_tokens_map.json`, as in
//! transformers. Each is a string or an object with `content`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::files::read_json;
use super::{TextError, Tokenizer};

/// Special tokens by name, as chat templates see them.
#[derive(Debug, Default)]
pub(super) struct SpecialTokens {
    tokens: BTreeMap<String, String>,
    /// Whether `bos_token` and `eos_token` go around every text; `None` leaves that to `tokenizer.json`.
    /// transformers 5 replaces the file's rule where the config has either flag.
    pub(super) around: Option<(bool, bool)>,
}

impl SpecialTokens {
    pub(super) fn load(folder: &Path) -> Result<Self, TextError> {
        let mut tokens = BTreeMap::new();
        let mut around = None;
        for file in ["special_tokens_map.json", "tokenizer_config.json"] {
            let Some(Value::Object(config)) = read_json(&folder.join(file))? else { continue };
            let flag = |name: &str| config.get(name).map(|flag| flag.as_bool().unwrap_or(false));
            let flags = (flag("add_bos_token"), flag("add_eos_token"));
            if flags.0.or(flags.1).is_some() {
                around = Some((flags.0.unwrap_or(false), flags.1.unwrap_or(false)));
            }
            for (name, value) in
                config.into_iter().filter(|(name, _)| name.ends_with("_token") && !name.starts_with("add_"))
            {
                match content(&value) {
                    Some(text) => tokens.insert(name, text.to_owned()),
                    None => tokens.remove(&name),
                };
            }
        }
        Ok(Self { tokens, around })
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

/// Returns the ids that end a sequence, sorted: those of `generation_config.json`, or if it names none
/// those of `config.json`, and the tokenizer's `eos_token` (mlx-lm's `load_config` and
/// `TokenizerWrapper`). A broken `generation_config.json` is ignored, as in mlx-lm.
///
/// # Errors
/// `config.json` is unreadable or not JSON.
pub fn eos_token_ids(folder: &Path, tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
    let generation = read_json(&folder.join("generation_config.json")).ok().flatten();
    let mut ids = generation.as_ref().map(ids_of).unwrap_or_default();
    if ids.is_empty()
        && let Some(config) = read_json(&folder.join("config.json"))?
    {
        ids = ids_of(&config);
        if ids.is_empty() {
            ids = config.get("text_config").map(ids_of).unwrap_or_default();
        }
    }
    ids.extend(tokenizer.eos_token_id());
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// Returns the `eos_token_id` of a config: one id or a list. Values that are not token ids (-1, null) are
/// skipped.
fn ids_of(config: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}
