//! GLM-4.5 and GLM-4.6 (<https://arxiv.org/abs/2508.06471>): partial rotation, some dense layers, then
//! mixtures of experts with shared ones, routed as in DeepSeek-V3.

use serde::Deserialize;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::given::Given;
use super::parts::{ExpertSizes, GroupedExperts, Layer};
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::layers::{Attention, HeadNorms, Mixture, Sublayer};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys { attention_bias: Key::Required, ..Keys::USUAL };

#[derive(Clone, Debug, Deserialize)]
struct Config {
    moe_intermediate_size: i32,
    norm_topk_prob: bool,
    n_group: i32,
    topk_group: i32,
    n_shared_experts: Option<i32>,
    /// None: all layers are dense.
    #[serde(deserialize_with = "config::nullable")]
    n_routed_experts: Option<i32>,
    routed_scaling_factor: f32,
    num_experts_per_tok: i32,
    first_k_dense_replace: usize,
    use_qk_norm: bool,
    scoring_func: Option<String>,
    topk_method: Option<String>,
}

struct Glm4Moe {
    common: Common,
    config: Config,
    experts: Option<GroupedExperts>,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let (mut common, rotation) = Common::read(given, &KEYS)?;
    let config: Config = given.parse()?;
    let part = Key::Required.or(rotation.part, "partial_rotary_factor")?;
    let dims = config::rotated_part(common.attention.head_dim, part)?;
    common.ropes = vec![common.rope(dims, &rotation, given)?];
    common.output_bias = false;
    let experts = config.experts()?;
    Ok(loader(Glm4Moe { common, config, experts }, setup))
}

impl Config {
    fn experts(&self) -> Result<Option<GroupedExperts>, OpenError> {
        let Some(experts) = self.n_routed_experts else { return Ok(None) };
        let (inner, groups, chosen) = (self.moe_intermediate_size, self.n_group, self.num_experts_per_tok);
        config::experts(experts, chosen, (groups, self.topk_group))?;
        config::sizes(&[("moe_intermediate_size", inner)])?;
        config::positive(&[("routed_scaling_factor", self.routed_scaling_factor.into())])?;
        config::choice("scoring_func", self.scoring_func.as_deref(), "sigmoid")?;
        config::choice("topk_method", self.topk_method.as_deref(), "noaux_tc")?;
        let shared = self.n_shared_experts.map(|count| inner.saturating_mul(count));
        config::sizes(&[("moe_intermediate_size * n_shared_experts", shared.unwrap_or(1))])?;
        Ok(Some(GroupedExperts {
            sizes: ExpertSizes { experts, chosen, inner },
            groups,
            groups_kept: self.topk_group,
            normed: self.norm_topk_prob,
            scale: self.routed_scaling_factor,
            shared,
        }))
    }
}

impl Architecture for Glm4Moe {
    fn common(&self) -> &Common {
        &self.common
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        weights.discard_predictors("model.layers.", self.common.layers);
        let Some(experts) = self.config.n_routed_experts else { return Ok(()) };
        weights.stack_gated_experts(self.common.layers, experts)
    }

    fn mixer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        let norms = match self.config.use_qk_norm {
            true => self.common.head_norms(layer, weights)?,
            false => HeadNorms::None,
        };
        Ok(Box::new(Attention { norms, ..self.common.attention(layer, weights)? }))
    }

    fn mixture(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Option<Mixture>, Error> {
        let experts = self.experts.filter(|_| layer.index >= self.config.first_k_dense_replace);
        experts.map(|experts| experts.load(&self.common, layer, weights)).transpose()
    }
}
