//! Mixtral (<https://arxiv.org/abs/2401.04088>): Mistral with a mixture of experts in each layer.

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::given::Given;
use super::parts::{ExpertSizes, Layer};
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::layers::{Mixture, Scoring};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    hidden_size: Key::Or(4096),
    num_hidden_layers: Key::Or(32),
    intermediate_size: Key::Or(14336),
    num_attention_heads: Key::Or(32),
    num_key_value_heads: Key::Or(Some(8)),
    head_dim: Key::Or(None),
    rms_norm_eps: Key::Or(1e-5),
    vocab_size: Key::Or(32000),
    rope_theta: Key::Or(1e6),
    rope_traditional: Key::Or(false),
    ..Keys::USUAL
};

struct Mixtral {
    common: Common,
    windows: Vec<i32>,
    sizes: ExpertSizes,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let common = Common::rotated(given, &KEYS)?;
    let window = Key::Or(None).read(given, "sliding_window")?;
    let windows = config::windows(given, common.layers, |_| window.is_some(), window)?;
    let experts = Key::Or(8).read(given, "num_local_experts")?;
    let chosen = Key::Or(2).read(given, "num_experts_per_tok")?;
    config::experts(experts, chosen, (1, 1))?;
    let sizes = ExpertSizes { experts, chosen, inner: common.inner };
    Ok(loader(Mixtral { common, windows, sizes }, setup))
}

impl Architecture for Mixtral {
    fn common(&self) -> &Common {
        &self.common
    }

    fn window(&self, layer: usize) -> i32 {
        self.windows[layer]
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        for layer in 0..self.common.layers {
            let moe = format!("model.layers.{layer}.block_sparse_moe");
            for (part, name) in [("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")] {
                let stack = format!("{moe}.switch_mlp.{name}");
                weights.stack_experts(&format!("{moe}.experts"), part, &stack, self.sizes.experts)?;
            }
        }
        Ok(())
    }

    fn mixture(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Option<Mixture>, Error> {
        let module = layer.name("block_sparse_moe");
        self.common.mixture(&module, self.sizes, Scoring::SoftmaxOfBest, weights).map(Some)
    }
}
