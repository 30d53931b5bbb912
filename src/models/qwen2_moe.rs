//! Qwen1.5-MoE and Qwen2-MoE (<https://arxiv.org/abs/2407.10671>): Qwen2 with many small experts and one that
//! every token goes through.

use serde::Deserialize;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::given::Given;
use super::parts::{ExpertSizes, Layer};
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::layers::{Mixture, Scoring};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys { head_dim: Key::Or(None), rope_traditional: Key::Or(false), ..Keys::USUAL };

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
    mlp_only_layers: Option<Vec<usize>>,
    #[serde(default = "config::yes")]
    qkv_bias: bool,
}

struct Qwen2Moe {
    common: Common,
    windows: Vec<i32>,
    sizes: ExpertSizes,
    shared: i32,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let config: Config = given.parse()?;
    let (inner, shared) = (config.moe_intermediate_size, config.shared_expert_intermediate_size);
    let (experts, chosen) = (config.num_experts, config.num_experts_per_tok);
    // No layer is dense.
    let _: i32 = Key::Or(inner).read(given, "intermediate_size")?;
    let common = Common::rotated(given, &Keys { intermediate_size: Key::Always(inner), ..KEYS })?;
    config::sizes(&[("shared_expert_intermediate_size", shared)])?;
    config::experts(experts, chosen, (1, 1))?;
    if config.norm_topk_prob
        || config.decoder_sparse_step != 1
        || config.mlp_only_layers.is_some_and(|listed| !listed.is_empty())
    {
        return config::unsupported("norm_topk_prob, decoder_sparse_step or mlp_only_layers");
    }
    let slides = |layer: usize, first| layer.is_multiple_of(2) && layer < first;
    let windows = config::qwen_windows(given, common.layers, slides)?;
    let sizes = ExpertSizes { experts, chosen, inner };
    let common = Common { qkv_bias: config.qkv_bias, ..common };
    Ok(loader(Qwen2Moe { common, windows, sizes, shared }, setup))
}

impl Architecture for Qwen2Moe {
    fn common(&self) -> &Common {
        &self.common
    }

    fn window(&self, layer: usize) -> i32 {
        self.windows[layer]
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
