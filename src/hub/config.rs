//! Makes one flat config of the forms in which `config.json` is published: models of several parts, numbers
//! that JSON cannot write.

use serde_json::{Map, Value};

/// Sizes that configs of several parts may leave out, as releases of Gemma 3 do.
const TEXT_DEFAULTS: [(&str, &str, u32); 3] = [
    ("gemma3", "vocab_size", 262_208),
    ("gemma3", "max_position_embeddings", 131_072),
    ("gemma4", "vocab_size", 262_144),
];

/// Returns the size that a model of this type has where its config does not say.
#[must_use]
pub fn text_default(model_type: &str, key: &str) -> Option<u32> {
    let known = TEXT_DEFAULTS.iter().find(|(kind, name, _)| (*kind, *name) == (model_type, key));
    known.map(|(.., size)| *size)
}

/// Returns the config of the text model: for a model of several parts `text_config`, completed from the keys
/// beside it. `model_type` is the whole model's, `text_model_type` that of its text part.
#[must_use]
pub fn text_part(config: &Value) -> Value {
    match (config.as_object(), config.get("text_config").and_then(Value::as_object)) {
        (Some(whole), Some(text)) => Value::Object(joined(whole, text)),
        (Some(_), None) | (None, _) => config.clone(),
    }
}

fn joined(whole: &Map<String, Value>, text: &Map<String, Value>) -> Map<String, Value> {
    let mut part = text.clone();
    if let Some(own) = part.remove("model_type") {
        part.insert("text_model_type".into(), own);
    }
    for (key, value) in whole.iter().filter(|(key, _)| *key != "text_config") {
        if !part.contains_key(key) {
            part.insert(key.clone(), value.clone());
        }
    }
    // Written beside the text part or in it, and in one of both as a default: where they differ, the files
    // decide.
    let key = "tie_word_embeddings";
    if let (Some(Value::Bool(outer)), Some(Value::Bool(inner))) = (whole.get(key), text.get(key))
        && outer != inner
    {
        part.remove(key);
    }
    part
}

/// Returns a number of a config, plain or tagged; `None` for anything else.
#[must_use]
pub fn config_f64(value: &Value) -> Option<f64> {
    if let Some(number) = value.as_f64() {
        return Some(number);
    }
    match value.as_object()?.get("__float__")?.as_str()? {
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        "NaN" => Some(f64::NAN),
        other => other.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tagged_floats_are_numbers() {
        let value: Value = serde_json::from_str(
            r#"{"a": {"__float__": "Infinity"}, "b": {"__float__": "-Infinity"}, "c": 2, "d": "2", "e": {}}"#,
        )
        .unwrap();
        assert_eq!(config_f64(&value["a"]), Some(f64::INFINITY));
        assert_eq!(config_f64(&value["b"]), Some(f64::NEG_INFINITY));
        assert_eq!(config_f64(&value["c"]), Some(2.0));
        assert_eq!(config_f64(&value["d"]), None);
        assert_eq!(config_f64(&value["e"]), None);
    }

    #[test]
    fn the_text_part_of_a_config_is_filled_from_what_stands_beside_it() {
        let config = serde_json::json!({
            "model_type": "gemma3", "eos_token_id": 1, "hidden_size": 9,
            "text_config": { "model_type": "gemma3_text", "hidden_size": 8 },
        });
        let text = text_part(&config);
        assert_eq!(
            (&text["model_type"], &text["text_model_type"]),
            (&"gemma3".into(), &"gemma3_text".into())
        );
        assert_eq!((&text["hidden_size"], &text["eos_token_id"]), (&8.into(), &1.into()));
        assert_eq!(text_default("gemma3", "vocab_size"), Some(262_208));
        assert_eq!(text_part(&text), text);
    }

    #[test]
    fn parts_that_contradict_each_other_leave_it_to_the_files_whether_the_head_is_tied() {
        let tied = |outer: Value, inner: Value| {
            let config = serde_json::json!({
                "model_type": "mistral3", "tie_word_embeddings": outer,
                "text_config": { "model_type": "mistral", "tie_word_embeddings": inner },
            });
            text_part(&config).get("tie_word_embeddings").cloned()
        };
        assert_eq!(tied(true.into(), true.into()), Some(Value::Bool(true)));
        assert_eq!(tied(true.into(), false.into()), None);
    }
}
