//! Mixtral (<https://arxiv.org/abs/2401.04088>): Mistral with a mixture of experts in each layer. Defaults
//! for missing config keys are mlx-lm's (models/mixtral.py), but `rope_scaling` counts, where mlx-lm does not
//! read it. As there, `sliding_window` is not read: releases have none.

use serde_json::Value;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
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
    head_dim: Key::Always(None),
    rms_norm_eps: Key::Or(1e-5),
    vocab_size: Key::Or(32000),
    rope_theta: Key::Or(1e6),
    rope_traditional: Key::Or(false),
    tie_word_embeddings: Key::Or(false),
    ..Keys::USUAL
};

struct Mixtral {
    common: Common,
    sizes: ExpertSizes,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let common = Common::rotated(value, &KEYS)?;
    let experts = Key::Or(8).read(value, "num_local_experts")?;
    let chosen = Key::Or(2).read(value, "num_experts_per_tok")?;
    config::experts(experts, chosen, (1, 1))?;
    let sizes = ExpertSizes { experts, chosen, inner: common.inner };
    Ok(loader(Mixtral { common, sizes }, setup))
}

impl Architecture for Mixtral {
    fn common(&self) -> &Common {
        &self.common
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
