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
