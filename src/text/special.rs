//! The special tokens a model folder names (`bos_token`, `eos_token`, …).
//!
//! Names come from `tokenizer_config.json`; those that it lacks come from `special_tokens_map.json`, as in
//! transformers. Each is a string or an object with `content`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::TextFiles;

/// Special tokens by name, as chat templates see them.
#[derive(Debug, Default)]
pub(super) struct SpecialTokens {
    tokens: BTreeMap<String, String>,
    /// Whether `bos_token` goes before every text; `None` leaves that to `tokenizer.json`.
    pub(super) add_bos: Option<bool>,
    /// The same for `eos_token` after it.
    pub(super) add_eos: Option<bool>,
}

impl SpecialTokens {
    pub(super) fn new(files: &TextFiles) -> Self {
        let mut this = Self::default();
        for file in [&files.special_tokens_map, &files.tokenizer_config] {
            let Some(Value::Object(config)) = file else { continue };
            let flag = |name: &str| config.get(name).and_then(Value::as_bool);
            this.add_bos = flag("add_bos_token").or(this.add_bos);
            this.add_eos = flag("add_eos_token").or(this.add_eos);
            for (name, value) in
                config.iter().filter(|(name, _)| name.ends_with("_token") && !name.starts_with("add_"))
            {
                match content(value) {
                    Some(text) => this.tokens.insert(name.clone(), text.to_owned()),
                    None => this.tokens.remove(name),
                };
            }
        }
        this
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
