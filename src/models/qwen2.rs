//! Qwen2 and Qwen2.5 (<https://arxiv.org/abs/2407.10671>): Llama with biases at queries, keys and values.
//! Defaults for missing config keys are mlx-lm's (models/qwen2.py). As there, `use_sliding_window` is not
//! read: every layer attends to all positions, and releases leave it off.

use serde_json::Value;

use super::config::{Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::{Loading, OpenError, Setup};

const KEYS: Keys = Keys {
    head_dim: Key::Always(None),
    rope_theta: Key::Or(1e6),
    rope_traditional: Key::Or(false),
    tie_word_embeddings: Key::Or(true),
    ..Keys::USUAL
};

struct Qwen2(Common);

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let common = Common::rotated(value, &KEYS)?;
    Ok(loader(Qwen2(Common { qkv_bias: true, ..common }), setup))
}

impl Architecture for Qwen2 {
    fn common(&self) -> &Common {
        &self.0
    }
}
