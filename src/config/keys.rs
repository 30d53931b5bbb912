//! Every key of the configuration, one row each: name, default, values, and the field that it sets.
//! `deploy/mlxd.example.toml` documents them; a test compares the two.

use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Value;

use super::{Config, LogFormat, models};
use crate::backend::{KernelChoice, KvDtype, WiredLimit};
use crate::store::Durability;

/// The values that a key takes, and the field that it sets. Keys whose value depends on others or on the
/// environment set none here; `Config` reads them.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// Text; empty is unset.
    Text(fn(&mut Config, &str)),
    /// A stay in memory, which is text or a number of seconds; empty is unset. It sets no field: the default
    /// depends on other keys.
    Stay,
    /// One of these words.
    Word(&'static [&'static str], fn(&mut Config, &str)),
    /// A whole number.
    Number(RangeInclusive<i64>, fn(&mut Config, Number)),
    /// true or false.
    Flag(fn(&mut Config, bool)),
    /// A list of text; in the environment separated by this character.
    List(char, fn(&mut Config, Vec<String>)),
}

/// A number within the range of its key, which is within that of its field's type.
#[derive(Clone, Copy, Debug)]
pub(super) struct Number(i64);

/// A key.
#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) default: Value,
    pub(super) kind: Kind,
}

/// Words of `kv_dtype`.
const KV_DTYPES: [&str; 2] = ["compute", "int8"];

/// Words of `wired_limit`.
const WIRED_LIMITS: [&str; 2] = ["never", "auto"];

/// Words of `durability`.
const DURABILITIES: [&str; 2] = ["turn", "second"];

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

/// Default of `log_filter`.
const LOG_FILTER: &str = "info";

/// Keys that take effect on SIGHUP; others take a restart.
pub(super) const LIVE: [&str; 10] = [
    "memory_budget_bytes",
    "model_keep_alive",
    "model_keep_alive_max",
    models::MODEL,
    "model_roots",
    "model_links_anywhere",
    "hf_cache",
    "auto_load",
    "loads_allowed",
    "downloads_allowed",
];

const GIB: i64 = 1 << 30;
const DAY_S: i64 = 24 * 60 * 60;

/// Returns all of them, in the order of the example file.
pub(super) fn keys() -> Vec<Key> {
    [start(), engine(), sessions(), calls(), end()].into_iter().flatten().collect()
}

fn start() -> Vec<Key> {
    vec![
        text("socket", "", |_, _| {}),
        text("listen", "", |_, _| {}),
        text("token_file", "", |_, _| {}),
        list("model_roots", ':', &[], |_, _| {}),
        flag("model_links_anywhere", false, |c, flag| c.model_links_anywhere = flag),
        text("hf_cache", "", |_, _| {}),
        list("models", ',', &[], |c, names| c.models = names),
        flag("auto_load", true, |c, flag| c.access.auto_load = flag),
        // `Config` reads both: it knows the home folder, and checks them.
        list("loads_allowed", ',', &["*"], |_, _| {}),
        list("downloads_allowed", ',', &[], |_, _| {}),
        number("downloads_running_max", 4, 1..=64, |c, n| c.limits.downloads_running_max = n.get()),
    ]
}

fn engine() -> Vec<Key> {
    vec![
        stay("model_keep_alive"),
        stay("model_keep_alive_max"),
        // 0 leaves it to the engine, which knows the device.
        number("memory_budget_bytes", 0, 0..=i64::MAX, |c, n| {
            c.residency.memory_budget_bytes = n.unless_zero();
        }),
        word("wired_limit", &WIRED_LIMITS, |c, word| {
            c.wired_limit = if word == WIRED_LIMITS[1] { WiredLimit::Auto } else { WiredLimit::Never };
        }),
        number("kv_idle_bytes_max", 0, 0..=i64::MAX, |c, n| c.engine.kv_idle_bytes_max = n.unless_zero()),
        // Each is two buffers a layer or more, of which Metal has some 499,000 in all.
        number("kv_idle_caches_max", 1024, 1..=65_536, |c, n| c.engine.kv_idle_caches_max = n.get()),
        word("kv_dtype", &KV_DTYPES, |c, word| {
            c.engine.kv_dtype = if word == KV_DTYPES[1] { KvDtype::Int8 } else { KvDtype::Compute };
        }),
        word("kernels", &KERNELS, |c, word| {
            let choice = KernelChoice::ALL.into_iter().find(|choice| choice.as_str() == word);
            c.kernels = choice.unwrap_or_default();
        }),
        number("prefill_chunk_tokens", 512, 1..=65_536, |c, n| c.engine.prefill_chunk_tokens = n.get()),
        number("prefill_step_ms", 500, 1..=60_000, |c, n| c.engine.prefill_step = n.milliseconds()),
        number("prefill_stretch_percent", 230, 101..=100_000, |c, n| {
            c.engine.prefill_stretch_percent = n.get();
        }),
        number("running_sequences_max", 32, 1..=1024, |c, n| c.engine.running_sequences_max = n.get()),
        number("queue_length_max", 256, 1..=65_536, |c, n| c.engine.queue_length_max = n.get()),
        number("queue_length_per_client_max", 64, 1..=65_536, |c, n| {
            c.engine.queue_length_per_client_max = n.get();
        }),
        number("priority_ageing_s", 10, 1..=DAY_S, |c, n| c.engine.priority_ageing = n.seconds()),
        number("slow_reader_s", 60, 1..=DAY_S, |c, n| c.engine.slow_reader = n.seconds()),
        // 0 leaves it to the number of processors.
        number("mask_threads", 0, 0..=256, |c, n| {
            c.engine.mask_threads = if n.0 > 0 { n.get() } else { mask_threads() };
        }),
        number("mask_ms_max", 1000, 1..=60_000, |c, n| c.engine.mask_max = n.milliseconds()),
    ]
}

/// Returns the number of threads that compute masks: a step has the other cores.
fn mask_threads() -> u32 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(processors / 4).unwrap_or(1).clamp(1, 4)
}

fn sessions() -> Vec<Key> {
    vec![
        number("sessions_max", 1024, 1..=1_000_000, |c, n| c.limits.sessions_max = n.get()),
        number("sessions_pinned_max", 16, 0..=1_000_000, |c, n| c.limits.sessions_pinned_max = n.get()),
        number("session_labels_max", 32, 0..=1024, |c, n| c.limits.session_labels_max = n.get()),
        number("session_bytes_max", 64 << 20, 65_536..=16 * GIB, |c, n| c.limits.session_bytes_max = n.get()),
        number("sessions_bytes_max", 512 << 20, 65_536..=256 * GIB, |c, n| {
            c.limits.sessions_bytes_max = n.get();
        }),
        number("sessions_disk_bytes_max", 4 * GIB, 65_536..=1024 * GIB, |c, n| {
            c.limits.sessions_disk_bytes_max = n.get();
        }),
        number("session_watches_max", 16, 0..=65_536, |c, n| c.limits.session_watches_max = n.get()),
        number("session_saves_max", 64, 1..=65_536, |c, n| c.limits.session_saves_max = n.get()),
        number("session_ttl_s", DAY_S, 1..=3650 * DAY_S, |c, n| c.limits.session_ttl = n.seconds()),
        number("session_ttl_max_s", 30 * DAY_S, 1..=3650 * DAY_S, |c, n| {
            c.limits.session_ttl_max = n.seconds();
        }),
        // `Config` reads it: it knows the home folder.
        text("state_dir", "", |_, _| {}),
        word("durability", &DURABILITIES, |c, word| {
            c.durability = if word == DURABILITIES[1] { Durability::Second } else { Durability::Turn };
        }),
        flag("snapshots", true, |c, flag| c.snapshots = flag),
        number("snapshot_disk_bytes_max", 8 * GIB, 1 << 20..=1 << 50, |c, n| {
            c.snapshot_disk_bytes_max = n.get();
        }),
        number("snapshot_queue_bytes_max", 4 * GIB, 1 << 20..=1 << 50, |c, n| {
            c.snapshot_queue_bytes_max = n.get();
        }),
    ]
}

fn calls() -> Vec<Key> {
    vec![
        // A context of a million tokens is about 4 MB of text.
        number("message_bytes_max", 16 << 20, 1024..=GIB, |c, n| c.limits.message_bytes_max = n.get()),
        // What a gRPC client takes if it is not told otherwise.
        number("answer_bytes_max", 4 << 20, 65_536..=GIB, |c, n| c.limits.answer_bytes_max = n.get()),
        number("text_bytes_max", 16 << 20, 1024..=GIB, |c, n| c.limits.text_bytes_max = n.get()),
        number("connections_max", 256, 1..=65_536, |c, n| c.limits.connections_max = n.get()),
        // As many as may come at once after a restart.
        number("connections_unproven_max", 256, 1..=65_536, |c, n| {
            c.limits.connections_unproven_max = n.get();
        }),
        number("first_call_s", 20, 1..=DAY_S, |c, n| c.limits.first_call = n.seconds()),
        number("streams_per_connection_max", 256, 1..=65_536, |c, n| {
            c.limits.streams_per_connection_max = n.get();
        }),
        number("connection_keep_alive_s", 20, 1..=DAY_S, |c, n| c.limits.keep_alive = n.seconds()),
        number("max_tokens_default", 4096, 1..=i64::from(u32::MAX), |c, n| {
            c.limits.max_tokens_default = n.get();
        }),
        // On the engine's thread, for each token: some microseconds.
        number("dry_context_max", 4096, 1..=1 << 20, |c, n| c.limits.dry_context_max = n.get()),
        number("choices_max", 16, 1..=1024, |c, n| c.limits.choices_max = n.get()),
        number("score_tokens_max", 8192, 1..=1 << 20, |c, n| c.limits.score_tokens_max = n.get()),
        // The contract allows no more than 20.
        number("top_logprobs_max", 20, 0..=20, |c, n| c.limits.top_logprobs_max = n.get()),
        number("stop_strings_max", 16, 0..=1024, |c, n| c.limits.stop_strings_max = n.get()),
        number("stop_string_bytes_max", 1024, 1..=65_536, |c, n| c.limits.stop_string_bytes_max = n.get()),
        number("stop_token_ids_max", 64, 0..=65_536, |c, n| c.limits.stop_token_ids_max = n.get()),
        number("logit_bias_max", 1024, 0..=65_536, |c, n| c.limits.logit_bias_max = n.get()),
        number("receive_bytes_max", 256 << 20, 1024..=16 * GIB, |c, n| c.limits.receive_bytes_max = n.get()),
        number("receive_bytes_per_connection_max", 32 << 20, 1024..=16 * GIB, |c, n| {
            c.limits.receive_bytes_per_connection_max = n.get();
        }),
        number("receive_s", 10, 1..=DAY_S, |c, n| c.limits.receive = n.seconds()),
        // The codec counts three parts and more for each, of all that a message has.
        number("chat_parts_max", 16_384, 1..=65_536, |c, n| c.limits.chat_parts_max = n.get()),
        number("tools_max", 1024, 0..=16_384, |c, n| c.limits.tools_max = n.get()),
        number("preparations_max", 0, 0..=1024, |c, n| c.limits.preparations_max = n.unless_zero()),
        number("grammar_bytes_max", 512 << 10, 1..=64 << 20, |c, n| c.limits.grammar_bytes_max = n.get()),
        // What parses JSON goes no deeper than 128.
        number("grammar_depth_max", 100, 1..=120, |c, n| c.limits.grammar_depth_max = n.get()),
        number("grammar_work_max", 1_000_000, 1000..=1_000_000_000, |c, n| {
            c.limits.grammar_work_max = n.get();
        }),
        number("grammar_compile_ms_max", 2000, 1..=600_000, |c, n| {
            c.limits.grammar_compile = n.milliseconds();
        }),
        number("grammar_cache_bytes_max", 128 << 20, 0..=64 * GIB, |c, n| {
            c.limits.grammar_cache_bytes_max = n.get();
        }),
    ]
}

fn end() -> Vec<Key> {
    vec![
        number("drain_s", 30, 0..=DAY_S, |c, n| c.drain = n.seconds()),
        number("engine_stall_s", 120, 1..=DAY_S, |c, n| c.engine_stall = n.seconds()),
        word("log_format", &LogFormat::WORDS, |c, word| c.log_format = LogFormat::from_word(word)),
        text("log_filter", LOG_FILTER, |c, filter| {
            c.log_filter = if filter.is_empty() { LOG_FILTER } else { filter }.to_owned();
        }),
    ]
}

fn text(name: &'static str, default: &str, set: fn(&mut Config, &str)) -> Key {
    Key { name, default: Value::String(default.into()), kind: Kind::Text(set) }
}

fn stay(name: &'static str) -> Key {
    Key { name, default: Value::String(String::new()), kind: Kind::Stay }
}

fn word(name: &'static str, words: &'static [&'static str], set: fn(&mut Config, &str)) -> Key {
    Key { name, default: Value::String(words[0].into()), kind: Kind::Word(words, set) }
}

fn number(name: &'static str, default: i64, range: RangeInclusive<i64>, set: fn(&mut Config, Number)) -> Key {
    Key { name, default: Value::Integer(default), kind: Kind::Number(range, set) }
}

fn flag(name: &'static str, default: bool, set: fn(&mut Config, bool)) -> Key {
    Key { name, default: Value::Boolean(default), kind: Kind::Flag(set) }
}

fn list(name: &'static str, separator: char, default: &[&str], set: fn(&mut Config, Vec<String>)) -> Key {
    let default = default.iter().map(|&text| Value::String(text.into())).collect();
    Key { name, default: Value::Array(default), kind: Kind::List(separator, set) }
}

impl Number {
    fn get<T: TryFrom<i64> + Default>(self) -> T {
        self.0.try_into().unwrap_or_default()
    }

    fn unless_zero(self) -> Option<u64> {
        Some(self.get()).filter(|number| *number > 0)
    }

    fn seconds(self) -> Duration {
        Duration::from_secs(self.get())
    }

    fn milliseconds(self) -> Duration {
        Duration::from_millis(self.get())
    }
}

impl Kind {
    /// Returns why `value` is not of this kind, if so.
    pub(super) fn refuses(&self, value: &Value) -> Option<String> {
        match (self, value) {
            (Self::Text(_), Value::String(_)) | (Self::Flag(_), Value::Boolean(_)) => None,
            (Self::Stay, Value::String(text)) if text.is_empty() => None,
            (Self::Stay, value) => models::keep_alive(value).err(),
            (Self::Word(words, _), Value::String(word)) if words.contains(&word.as_str()) => None,
            (Self::Number(range, _), Value::Integer(number)) if range.contains(number) => None,
            (Self::List(..), Value::Array(items)) if items.iter().all(Value::is_str) => None,
            (Self::Text(_), _) => Some("must be text".into()),
            (Self::Flag(_), _) => Some("must be true or false".into()),
            (Self::Word(words, _), _) => Some(format!("must be one of {}", words.join(", "))),
            (Self::Number(range, _), _) => {
                Some(format!("must be a whole number from {} to {}", range.start(), range.end()))
            }
            (Self::List(..), _) => Some("must be a list of texts".into()),
        }
    }

    /// Returns the value that an environment variable holds. A malformed one stays text, which is refused.
    pub(super) fn read(&self, text: &str) -> Value {
        let unread = || Value::String(text.to_owned());
        match self {
            Self::Text(_) | Self::Stay | Self::Word(..) => unread(),
            Self::Number(..) => text.parse().map_or_else(|_| unread(), Value::Integer),
            Self::Flag(_) => text.parse().map_or_else(|_| unread(), Value::Boolean),
            Self::List(separator, _) => {
                let items = text.split(*separator).filter(|item| !item.is_empty());
                Value::Array(items.map(|item| Value::String(item.to_owned())).collect())
            }
        }
    }

    /// Sets the key's field to a value that is not refused.
    pub(super) fn set(&self, config: &mut Config, value: &Value) {
        match (self, value) {
            (Self::Text(set) | Self::Word(_, set), Value::String(text)) => set(config, text),
            (Self::Number(_, set), Value::Integer(number)) => set(config, Number(*number)),
            (Self::Flag(set), Value::Boolean(flag)) => set(config, *flag),
            (Self::List(_, set), Value::Array(items)) => {
                set(config, items.iter().filter_map(Value::as_str).map(str::to_owned).collect());
            }
            (
                Self::Text(_)
                | Self::Stay
                | Self::Word(..)
                | Self::Number(..)
                | Self::Flag(_)
                | Self::List(..),
                _,
            ) => {}
        }
    }
}
