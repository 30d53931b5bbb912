//! Qwen2 and Qwen2.5 (<https://arxiv.org/abs/2407.10671>): Llama with biases at queries, keys and values.

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::given::Given;
use super::{Loading, OpenError, Setup};

const KEYS: Keys = Keys { head_dim: Key::Or(None), rope_traditional: Key::Or(false), ..Keys::USUAL };

struct Qwen2 {
    common: Common,
    windows: Vec<i32>,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let common = Common { qkv_bias: true, ..Common::rotated(given, &KEYS)? };
    let windows = config::qwen_windows(given, common.layers, |layer, first| layer >= first)?;
    Ok(loader(Qwen2 { common, windows }, setup))
}

impl Architecture for Qwen2 {
    fn common(&self) -> &Common {
        &self.common
    }

    fn window(&self, layer: usize) -> i32 {
        self.windows[layer]
    }
}
