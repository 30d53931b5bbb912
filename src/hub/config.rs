//! Makes one flat config of the forms in which `config.json` is published: models of several parts, rotations
//! as transformers 5 writes them, numbers that JSON cannot write.

use serde_json::{Map, Value};

/// Values that mlx-lm supplies for configs of several parts that leave them out (models/gemma3.py,
/// gemma4.py); the context of Gemma 3 is that of its release.
const TEXT_DEFAULTS: &[(&str, &str, u64)] = &[
    ("gemma3", "vocab_size", 262_208),
    ("gemma3", "num_attention_heads", 8),
    ("gemma3", "num_key_value_heads", 4),
    ("gemma3", "max_position_embeddings", 131_072),
    ("gemma4", "vocab_size", 262_144),
    ("gemma4", "num_attention_heads", 8),
    ("gemma4", "num_key_value_heads", 1),
];

/// Returns the config of the text model: for a model of several parts `text_config`, completed from the keys
/// beside it. `model_type` is the whole model's, `text_model_type` that of its text part.
#[must_use]
pub fn text_part(config: &Value) -> Value {
    let mut part = match (config.as_object(), config.get("text_config").and_then(Value::as_object)) {
        (Some(whole), Some(text)) => joined(whole, text),
        (Some(whole), None) => whole.clone(),
        (None, _) => return config.clone(),
    };
    spread_rope(&mut part);
    Value::Object(part)
}

fn joined(whole: &Map<String, Value>, text: &Map<String, Value>) -> Map<String, Value> {
    let mut part = text.clone();
    if let Some(own) = part.remove("model_type") {
        part.insert("text_model_type".into(), own);
    }
    for (key, value) in whole.iter().filter(|(key, _)| *key != "text_config") {
        // The whole model's vocabulary takes precedence.
        if key == "vocab_size" || !part.contains_key(key) {
            part.insert(key.clone(), value.clone());
        }
    }
    let kind = whole.get("model_type").and_then(Value::as_str).unwrap_or_default();
    if kind == "mistral3" {
        part.entry("tie_word_embeddings").or_insert(Value::Bool(false));
    }
    for (_, key, value) in TEXT_DEFAULTS.iter().filter(|(known, ..)| *known == kind) {
        part.entry(*key).or_insert_with(|| (*value).into());
    }
    part
}

/// Fills in the separate keys of rotations from `rope_parameters`, where transformers 5 writes them (for
/// Gemma 3 by kind of layer), unless they are there.
fn spread_rope(part: &mut Map<String, Value>) {
    let Some(nested) = part.get("rope_parameters").cloned() else { return };
    let of = |kind: &str| nested.get(kind).filter(|of| of.is_object()).cloned();
    let (full, sliding) = (of("full_attention").unwrap_or_else(|| nested.clone()), of("sliding_attention"));
    let theta = |of: &Value| of.get("rope_theta").filter(|theta| theta.is_number()).cloned();
    let mut fill = |key: &str, value: Option<Value>| {
        if let Some(value) = value.filter(|_| part.get(key).is_none_or(Value::is_null)) {
            part.insert(key.into(), value);
        }
    };
    fill("rope_theta", theta(&full));
    fill("rope_local_base_freq", sliding.as_ref().and_then(theta));
    let kind = full.get("rope_type").or_else(|| full.get("type")).and_then(Value::as_str);
    fill("rope_scaling", kind.filter(|kind| *kind != "default").map(|_| full.clone()));
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
        assert_eq!(text["vocab_size"], 262_208);
        assert_eq!(text_part(&text), text);
    }

    #[test]
    fn rotations_are_found_where_transformers_5_writes_them() {
        let yarn = serde_json::json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 5.0 });
        let text = text_part(&serde_json::json!({ "rope_parameters": yarn }));
        assert_eq!((&text["rope_theta"], &text["rope_scaling"]), (&5.0.into(), &yarn));
        let plain = serde_json::json!({ "rope_type": "default", "rope_theta": 5.0 });
        let kinds = serde_json::json!({ "full_attention": yarn, "sliding_attention": plain });
        let text = text_part(&serde_json::json!({ "rope_theta": 7.0, "rope_parameters": kinds }));
        assert_eq!((&text["rope_theta"], &text["rope_local_base_freq"]), (&7.0.into(), &5.0.into()));
        assert!(text_part(&serde_json::json!({ "rope_parameters": plain }))["rope_scaling"].is_null());
    }
}
