//! Qwen1.5-MoE and Qwen2-MoE (<https://arxiv.org/abs/2407.10671>): Qwen2 with many small experts and one that
//! every token goes through. Defaults are mlx-lm's (models/qwen2_moe.py), which does not read `rope_scaling`;
//! here it counts.

use serde::Deserialize;
use serde_json::Value;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::parts::{ExpertSizes, Layer};
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::layers::{Mixture, Scoring};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    num_key_value_heads: Key::Or(None),
    head_dim: Key::Always(None),
    rope_theta: Key::Or(1e6),
    rope_traditional: Key::Or(false),
    tie_word_embeddings: Key::Always(false),
    ..Keys::USUAL
};

#[derive(Clone, Debug, Deserialize)]
struct Config {
    num_experts_per_tok: i32,
    num_experts: i32,
    moe_intermediate_size: i32,
    shared_expert_intermediate_size: i32,
    #[serde(default)]
    norm_topk_prob: bool,
    #[serde(default = "config::or::<1, _>")]
    decoder_sparse_step: usize,
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
}

struct Qwen2Moe {
    common: Common,
    sizes: ExpertSizes,
    shared: i32,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let config: Config = config::parse(value)?;
    let (inner, shared) = (config.moe_intermediate_size, config.shared_expert_intermediate_size);
    let (experts, chosen) = (config.num_experts, config.num_experts_per_tok);
    // No layer is dense.
    let common = Common::rotated(value, &Keys { intermediate_size: Key::Always(inner), ..KEYS })?;
    config::sizes(&[("shared_expert_intermediate_size", shared)])?;
    config::experts(experts, chosen, (1, 1))?;
    if config.norm_topk_prob || config.decoder_sparse_step != 1 || !config.mlp_only_layers.is_empty() {
        return config::unsupported("norm_topk_prob, decoder_sparse_step or mlp_only_layers");
    }
    let sizes = ExpertSizes { experts, chosen, inner };
    Ok(loader(Qwen2Moe { common: Common { qkv_bias: true, ..common }, sizes, shared }, setup))
}

impl Architecture for Qwen2Moe {
    fn common(&self) -> &Common {
        &self.common
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        weights.stack_gated_experts(self.common.layers, self.sizes.experts)
    }

    fn mixture(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Option<Mixture>, Error> {
        let module = layer.name("mlp");
        let scoring = Scoring::Softmax { normed: false };
        let mixture = self.common.mixture(&module, self.sizes, scoring, weights)?;
        self.common.with_shared(mixture, &module, self.shared, weights).map(Some)
    }
}
