//! Reads the small JSON files of a model's folder, within a size limit.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::HubError;

/// Real ones have a few kilobytes; the longest known, with a per-module quantization table, half a megabyte.
const JSON_BYTES_MAX: u64 = 8 << 20;

/// Reads `config.json`: always an object. Numbers that JSON cannot write stay as mlx-lm tags them
/// (`{"__float__": "Infinity"}`); [`config_f64`] reads both forms.
///
/// # Errors
/// `Damaged` if the file is missing, too large, not UTF-8, not JSON or not an object; `Io`.
pub fn read_config(folder: &Path) -> Result<Value, HubError> {
    read_object(&folder.join("config.json"), JSON_BYTES_MAX)
}

/// Values that mlx-lm supplies for configs of several parts that leave them out (models/gemma3.py, gemma4.py); the
/// context of Gemma 3 is that of its release.
const TEXT_DEFAULTS: &[(&str, &str, u64)] = &[
    ("gemma3", "vocab_size", 262_208),
    ("gemma3", "num_attention_heads", 8),
    ("gemma3", "num_key_value_heads", 4),
    ("gemma3", "max_position_embeddings", 131_072),
    ("gemma4", "vocab_size", 262_144),
    ("gemma4", "num_attention_heads", 8),
    ("gemma4", "num_key_value_heads", 1),
];

/// What a config says of the text model: of a model with several parts, `text_config`, with what stands beside it
/// where that is silent. `model_type` is the whole model's, and `text_model_type` that of its text part.
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
        // A vocabulary that is named for the whole is the one that counts.
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

/// transformers 5 writes what rotations need into `rope_parameters`, of Gemma 3 by kind of layer; before, they had keys
/// of their own, which are filled in where they are missing.
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

/// Reads `generation_config.json`. Missing or broken is `None`, as in mlx-lm (utils.py, `load_config`): it
/// holds defaults only, and a model serves without them.
#[must_use]
pub fn read_generation_config(folder: &Path) -> Option<Value> {
    read_object(&folder.join("generation_config.json"), JSON_BYTES_MAX).ok()
}

/// A number of a config, plain or tagged. `None` if it is neither.
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

/// Reads a file that must hold one JSON object of at most `bytes_max` bytes.
pub(super) fn read_object(path: &Path, bytes_max: u64) -> Result<Value, HubError> {
    let text = read_text(path, bytes_max)?;
    let value: Value = serde_json::from_str(&tagged(&text))
        .map_err(|error| HubError::damaged(path, format!("is not valid JSON: {error}")))?;
    if value.is_object() { Ok(value) } else { Err(HubError::damaged(path, "is not a JSON object")) }
}

/// Python writes numbers that JSON does not have; they are tagged as mlx-lm tags them.
fn tagged(text: &str) -> Cow<'_, str> {
    const NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !NUMBERS.iter().any(|number| text.contains(number)) {
        return Cow::Borrowed(text);
    }
    let (mut out, mut rest, mut quoted) = (String::with_capacity(text.len()), text, false);
    while let Some(next) = rest.chars().next() {
        let number = NUMBERS.iter().find(|number| !quoted && rest.starts_with(**number));
        let taken = match (number, next) {
            (Some(number), _) => {
                out.push_str(&format!("{{\"__float__\": \"{number}\"}}"));
                number.len()
            }
            // An escaped character, a quote above all.
            (None, '\\') if quoted => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, '"') => {
                quoted = !quoted;
                1
            }
            (None, other) => other.len_utf8(),
        };
        if number.is_none() {
            out.push_str(&rest[..taken]);
        }
        rest = &rest[taken..];
    }
    Cow::Owned(out)
}

fn read_text(path: &Path, bytes_max: u64) -> Result<String, HubError> {
    let file = open_regular(path)?.0;
    let mut bytes = Vec::new();
    // The limit holds for what is read, whatever the size said: the file may grow meanwhile.
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(HubError::io(path))?;
    if bytes.len() as u64 > bytes_max {
        return Err(HubError::damaged(path, format!("is larger than {bytes_max} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| HubError::damaged(path, "is not UTF-8"))
}

/// Opens a file and gives its size. Only a regular one: opening a named pipe would wait for ever.
pub(super) fn open_regular(path: &Path) -> Result<(File, u64), HubError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => {
            let file = File::open(path).map_err(HubError::io(path))?;
            Ok((file, metadata.len()))
        }
        Ok(_) => Err(HubError::damaged(path, "is not a regular file")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(HubError::damaged(path, "is missing"))
        }
        Err(error) => Err(HubError::io(path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(content: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), content).unwrap();
        match read_config(folder.path()) {
            Ok(value) => panic!("read {value}"),
            Err(HubError::Damaged { file, why }) => {
                assert_eq!(file, "config.json");
                why
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn broken_configs_say_what_is_wrong() {
        assert_eq!(why(b"{\"a\": \"\xff\"}"), "is not UTF-8");
        assert_eq!(why(b"[1]"), "is not a JSON object");
        assert!(why(b"{").contains("not valid JSON"));
        assert!(why(b"").contains("not valid JSON"));
        assert!(why("[".repeat(100_000).as_bytes()).contains("recursion"));
        let limit = usize::try_from(JSON_BYTES_MAX).unwrap();
        assert!(why(&vec![b' '; limit + 1]).contains("larger than"));
        assert!(matches!(read_config(Path::new("/nonexistent")), Err(HubError::Damaged { .. })));
    }

    #[test]
    fn a_folder_in_place_of_the_file_is_damage() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("config.json")).unwrap();
        assert!(matches!(read_config(folder.path()), Err(HubError::Damaged { .. })));
    }

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
    fn numbers_as_python_writes_them_are_read() {
        let text = r#"{"a": [0.0, Infinity], "b": "\"Infinity", "c": -Infinity, "NaN": NaN}"#;
        let value: Value = serde_json::from_str(&tagged(text)).unwrap();
        assert_eq!(config_f64(&value["a"][1]), Some(f64::INFINITY));
        assert_eq!(value["b"], "\"Infinity");
        assert_eq!(config_f64(&value["c"]), Some(f64::NEG_INFINITY));
        assert!(config_f64(&value["NaN"]).is_some_and(f64::is_nan));
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

    #[test]
    fn a_broken_generation_config_is_no_generation_config() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read_generation_config(folder.path()).is_none());
        fs::write(folder.path().join("generation_config.json"), "{,").unwrap();
        assert!(read_generation_config(folder.path()).is_none());
        fs::write(folder.path().join("generation_config.json"), "{\"top_p\": 0.9}").unwrap();
        assert!(read_generation_config(folder.path()).is_some());
    }
}
