//! Every key of the configuration: its default, what values it takes, and how it is read from the
//! environment. `deploy/mlxd.example.toml` documents them; a test compares the two.

use std::ops::RangeInclusive;

use toml::Value;

use crate::backend::KernelChoice;

/// What values a key takes.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// Text; empty is unset.
    Text,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A whole number.
    Number(RangeInclusive<i64>),
    /// true or false.
    Flag,
    /// A list of text; in the environment separated by this character.
    List(char),
}

/// A key.
#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) default: Value,
    pub(super) kind: Kind,
}

/// Words of `kv_dtype`.
pub(super) const KV_DTYPES: [&str; 2] = ["compute", "int8"];

/// Words of `kernels`.
const KERNELS: [&str; KernelChoice::ALL.len()] = {
    let mut words = [""; KernelChoice::ALL.len()];
    let mut index = 0;
    while index < words.len() {
        words[index] = KernelChoice::ALL[index].as_str();
        index += 1;
    }
    words
};

const GIB: i64 = 1 << 30;
const DAY_S: i64 = 24 * 60 * 60;

/// All of them, in the order of the example file.
pub(super) fn keys() -> Vec<Key> {
    vec![
        text("socket", ""),
        text("listen", ""),
        text("token_file", ""),
        list("model_roots", ':'),
        text("hf_cache", ""),
        list("models", ','),
        flag("auto_load", true),
        // 0 leaves it to the engine, which knows the device.
        number("memory_budget_bytes", 0, 0..=i64::MAX),
        number("kv_idle_bytes_max", 0, 0..=i64::MAX),
        word("kv_dtype", &KV_DTYPES),
        word("kernels", &KERNELS),
        number("prefill_chunk_tokens", 512, 1..=65_536),
        number("prefill_step_ms", 500, 1..=60_000),
        number("prefill_stretch_percent", 250, 101..=100_000),
        number("running_sequences_max", 32, 1..=1024),
        number("queue_length_max", 256, 1..=65_536),
        number("queue_length_per_client_max", 64, 1..=65_536),
        number("priority_ageing_s", 10, 1..=DAY_S),
        number("slow_reader_s", 60, 1..=DAY_S),
        number("sessions_max", 1024, 1..=1_000_000),
        number("session_ttl_s", DAY_S, 1..=3650 * DAY_S),
        number("session_ttl_max_s", 30 * DAY_S, 1..=3650 * DAY_S),
        // A context of a million tokens is about 4 MB of text.
        number("message_bytes_max", 16 << 20, 1024..=GIB),
        number("text_bytes_max", 16 << 20, 1024..=GIB),
        number("connections_max", 256, 1..=65_536),
        number("streams_per_connection_max", 256, 1..=65_536),
        number("keep_alive_s", 20, 1..=DAY_S),
        number("max_tokens_default", 4096, 1..=i64::from(u32::MAX)),
        number("score_tokens_max", 8192, 1..=1 << 20),
        // The contract allows no more than 20.
        number("top_logprobs_max", 20, 0..=20),
        number("stop_strings_max", 16, 0..=1024),
        number("stop_string_bytes_max", 1024, 1..=65_536),
        number("stop_token_ids_max", 64, 0..=65_536),
        number("logit_bias_max", 1024, 0..=65_536),
        number("drain_s", 30, 0..=DAY_S),
        word("log_format", &["text", "json"]),
        text("log_filter", "info"),
    ]
}

fn text(name: &'static str, default: &str) -> Key {
    Key { name, default: Value::String(default.into()), kind: Kind::Text }
}

fn word(name: &'static str, words: &'static [&'static str]) -> Key {
    Key { name, default: Value::String(words[0].into()), kind: Kind::Word(words) }
}

fn number(name: &'static str, default: i64, range: RangeInclusive<i64>) -> Key {
    Key { name, default: Value::Integer(default), kind: Kind::Number(range) }
}

fn flag(name: &'static str, default: bool) -> Key {
    Key { name, default: Value::Boolean(default), kind: Kind::Flag }
}

fn list(name: &'static str, separator: char) -> Key {
    Key { name, default: Value::Array(Vec::new()), kind: Kind::List(separator) }
}

impl Kind {
    /// Why `value` is none of this kind, if so.
    pub(super) fn refuses(&self, value: &Value) -> Option<String> {
        match (self, value) {
            (Self::Text, Value::String(_)) | (Self::Flag, Value::Boolean(_)) => None,
            (Self::Word(words), Value::String(word)) if words.contains(&word.as_str()) => None,
            (Self::Number(range), Value::Integer(number)) if range.contains(number) => None,
            (Self::List(_), Value::Array(items)) if items.iter().all(Value::is_str) => None,
            (Self::Text, _) => Some("must be text".into()),
            (Self::Flag, _) => Some("must be true or false".into()),
            (Self::Word(words), _) => Some(format!("must be one of {}", words.join(", "))),
            (Self::Number(range), _) => {
                Some(format!("must be a whole number from {} to {}", range.start(), range.end()))
            }
            (Self::List(_), _) => Some("must be a list of texts".into()),
        }
    }

    /// The value that an environment variable holds. What is malformed stays text, which is refused.
    pub(super) fn read(&self, text: &str) -> Value {
        let unread = || Value::String(text.to_owned());
        match self {
            Self::Text | Self::Word(_) => unread(),
            Self::Number(_) => text.parse().map_or_else(|_| unread(), Value::Integer),
            Self::Flag => text.parse().map_or_else(|_| unread(), Value::Boolean),
            Self::List(separator) => {
                let items = text.split(*separator).filter(|item| !item.is_empty());
                Value::Array(items.map(|item| Value::String(item.to_owned())).collect())
            }
        }
    }
}
