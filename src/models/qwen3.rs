//! Qwen3 (<https://arxiv.org/abs/2505.09388>), dense and as a mixture of experts: Llama with a norm of each
//! head's queries and keys.

use serde::Deserialize;
use serde_json::Value;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::given::Given;
use super::parts::{ExpertSizes, Layer};
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::layers::{Attention, Mixture, Scoring, Sublayer};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys { attention_bias: Key::Or(false), ..Keys::USUAL };

#[derive(Clone, Debug, Deserialize)]
struct Moe {
    num_experts: i32,
    num_experts_per_tok: i32,
    #[serde(default = "config::or::<1, _>")]
    decoder_sparse_step: usize,
    mlp_only_layers: Option<Vec<usize>>,
    moe_intermediate_size: i32,
    norm_topk_prob: bool,
}

struct Qwen3 {
    common: Common,
    windows: Vec<i32>,
    /// None if all layers are dense.
    moe: Option<Moe>,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let common = Common::rotated(given, &KEYS)?;
    let is_moe = given.get("model_type").and_then(Value::as_str) == Some("qwen3_moe");
    let moe = if is_moe { Moe::read(given)? } else { None };
    let windows = match is_moe && Key::Or(false).read(given, "use_sliding_window")? {
        true => {
            let window = Key::Required.read(given, "sliding_window")?;
            config::windows(given, common.layers, |_| true, Some(window))?
        }
        false => config::qwen_windows(given, common.layers, |layer, first| layer >= first)?,
    };
    Ok(loader(Qwen3 { common, windows, moe }, setup))
}

impl Moe {
    /// Reads what mixtures need; None without experts.
    fn read(given: &Given<'_>) -> Result<Option<Self>, OpenError> {
        let moe: Self = given.parse()?;
        if moe.num_experts <= 0 {
            return Ok(None);
        }
        config::experts(moe.num_experts, moe.num_experts_per_tok, (1, 1))?;
        config::sizes(&[("moe_intermediate_size", moe.moe_intermediate_size)])?;
        if moe.decoder_sparse_step == 0 {
            return config::invalid("decoder_sparse_step is 0");
        }
        Ok(Some(moe))
    }

    fn mixes(&self, layer: usize) -> bool {
        let dense = self.mlp_only_layers.as_ref().is_some_and(|listed| listed.contains(&layer));
        !dense && (layer + 1).is_multiple_of(self.decoder_sparse_step.max(1))
    }

    fn sizes(&self) -> ExpertSizes {
        let Self { num_experts: experts, num_experts_per_tok: chosen, moe_intermediate_size: inner, .. } =
            *self;
        ExpertSizes { experts, chosen, inner }
    }
}

impl Architecture for Qwen3 {
    fn common(&self) -> &Common {
        &self.common
    }

    fn window(&self, layer: usize) -> i32 {
        self.windows[layer]
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        let Some(moe) = &self.moe else { return Ok(()) };
        weights.stack_gated_experts(self.common.layers, moe.num_experts)
    }

    fn mixer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        let norms = self.common.head_norms(layer, weights)?;
        Ok(Box::new(Attention { norms, ..self.common.attention(layer, weights)? }))
    }

    fn mixture(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Option<Mixture>, Error> {
        let Some(moe) = self.moe.as_ref().filter(|moe| moe.mixes(layer.index)) else { return Ok(None) };
        let scoring = Scoring::Softmax { normed: moe.norm_topk_prob };
        self.common.mixture(&layer.name("mlp"), moe.sizes(), scoring, weights).map(Some)
    }
}
