//! DeepSeek-V3 (<https://arxiv.org/abs/2412.19437>), Kimi K2, and GLM-4.7 Flash, which shares its shape:
//! latent attention and many small experts.

use mlx_rs::error::Exception;
use serde::Deserialize;
use serde_json::Value;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::given::Given;
use super::parts::{ExpertSizes, GroupedExperts, Layer};
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::kv::{TokenState, inverse_root};
use crate::mlx::layers::{Latent, LatentQuery, Matrix, Mixture, Sublayer, yarn_magnitude};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    // The vector that is cached is the key of one head.
    num_key_value_heads: Key::Always(Some(1)),
    attention_bias: Key::Or(false),
    ..Keys::USUAL
};

#[derive(Clone, Debug, Deserialize)]
struct Config {
    model_type: String,
    moe_intermediate_size: i32,
    n_shared_experts: Option<i32>,
    /// None: all layers are dense.
    #[serde(deserialize_with = "config::nullable")]
    n_routed_experts: Option<i32>,
    routed_scaling_factor: f32,
    kv_lora_rank: i32,
    #[serde(deserialize_with = "config::nullable")]
    q_lora_rank: Option<i32>,
    qk_rope_head_dim: i32,
    qk_nope_head_dim: i32,
    v_head_dim: i32,
    topk_method: Option<String>,
    scoring_func: Option<String>,
    #[serde(default = "config::yes")]
    norm_topk_prob: bool,
    n_group: i32,
    topk_group: i32,
    num_experts_per_tok: i32,
    #[serde(default = "config::or::<1, _>")]
    moe_layer_freq: i32,
    first_k_dense_replace: Option<usize>,
    /// Kinds of the layers: "dense" or "sparse".
    mlp_layer_types: Option<Vec<String>>,
    #[serde(default = "config::yes")]
    rope_interleave: bool,
}

struct DeepSeek {
    common: Common,
    config: Config,
    /// Whether each layer has a mixture.
    mixes: Vec<bool>,
    /// None: all layers are dense.
    experts: Option<GroupedExperts>,
}

/// Epsilon of the norms of latent vectors in DeepSeek's own model, where `rms_norm_eps` does not count.
const LATENT_EPS: f32 = 1e-6;

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let config: Config = given.parse()?;
    config.check()?;
    let head_dim = Key::Always(Some(config.qk_rope_head_dim + config.kv_lora_rank));
    let rope_theta = if config.is_lite() { Key::Required } else { Key::Or(1e4) };
    let rope_traditional = Key::Always(config.rope_interleave);
    let keys = Keys { head_dim, rope_theta, rope_traditional, ..KEYS };
    let (mut common, rotation) = Common::read(given, &keys)?;
    let heads = common.attention.heads;
    config::heads(heads, 1, config.qk_nope_head_dim)?;
    config::heads(heads, 1, config.v_head_dim)?;
    if !setup.kernels.serves_latent_attention() {
        return config::unsupported("latent attention on CUDA");
    }
    let rotated = config::rotated_part(config.qk_rope_head_dim, rotation.part.unwrap_or(1.0))?;
    if rotated != config.qk_rope_head_dim {
        return config::unsupported("partial_rotary_factor");
    }
    common.ropes = vec![common.rope(rotated, &rotation, given)?];
    let number = |key: &str| rotation.scaling.get(key).and_then(Value::as_f64);
    let weight = number("mscale_all_dim").filter(|_| !rotation.is_plain()).unwrap_or(0.0);
    let stretch = if weight == 0.0 { 1.0 } else { yarn_magnitude(number("factor").unwrap_or(1.0), weight) };
    let query_dim = config.qk_nope_head_dim + config.qk_rope_head_dim;
    common.attention.values_from = config.qk_rope_head_dim;
    common.attention.scale = inverse_root(query_dim) * config::single(stretch * stretch);
    let experts = config.experts()?;
    let mixes = config.mixes(common.layers)?;
    Ok(loader(DeepSeek { common, config, mixes, experts }, setup))
}

impl Config {
    fn is_lite(&self) -> bool {
        self.model_type == "glm4_moe_lite"
    }

    fn check(&self) -> Result<(), OpenError> {
        config::sizes(&[
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("kv_lora_rank", self.kv_lora_rank),
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1)),
            ("qk_rope_head_dim", self.qk_rope_head_dim),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("moe_layer_freq", self.moe_layer_freq),
        ])?;
        config::choice("topk_method", self.topk_method.as_deref(), "noaux_tc")?;
        config::choice("scoring_func", self.scoring_func.as_deref(), "sigmoid")
    }

    fn experts(&self) -> Result<Option<GroupedExperts>, OpenError> {
        let shared = self.n_shared_experts.unwrap_or(0);
        if !(0..=1024).contains(&shared) {
            return config::invalid(format!("n_shared_experts is {shared}, not between 0 and 1024"));
        }
        let Some(experts) = self.n_routed_experts.filter(|&experts| experts > 0) else { return Ok(None) };
        let chosen = self.num_experts_per_tok;
        config::experts(experts, chosen, (self.n_group, self.topk_group))?;
        let inner = self.moe_intermediate_size;
        let shared = (shared > 0).then(|| inner.saturating_mul(shared));
        config::sizes(&[("moe_intermediate_size * n_shared_experts", shared.unwrap_or(1))])?;
        Ok(Some(GroupedExperts {
            sizes: ExpertSizes { experts, chosen, inner },
            groups: self.n_group,
            groups_kept: self.topk_group,
            normed: self.norm_topk_prob,
            scale: self.routed_scaling_factor,
            shared,
        }))
    }

    /// Returns whether each layer has a mixture.
    fn mixes(&self, layers: usize) -> Result<Vec<bool>, OpenError> {
        let every = usize::try_from(self.moe_layer_freq).unwrap_or(1).max(1);
        let by_rule =
            |first: usize| (0..layers).map(|layer| layer >= first && layer.is_multiple_of(every)).collect();
        let ruled: Option<Vec<bool>> = self.first_k_dense_replace.map(by_rule);
        let Some(kinds) = &self.mlp_layer_types else {
            return ruled.map_or_else(|| config::invalid("first_k_dense_replace is missing"), Ok);
        };
        config::layer_kinds(kinds, layers, &["dense", "sparse"])?;
        let listed: Vec<bool> = kinds.iter().map(|kind| kind == "sparse").collect();
        match ruled.filter(|ruled| *ruled != listed) {
            Some(_) => config::invalid("mlp_layer_types and first_k_dense_replace contradict each other"),
            None => Ok(listed),
        }
    }
}

impl DeepSeek {
    fn attention(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Latent, Error> {
        let Self { common, config, .. } = self;
        let prefix = &layer.name("self_attn");
        let (hidden, bias) = (common.hidden, common.output_bias);
        let (heads, rank) = (common.attention.heads, config.kv_lora_rank);
        let (plain, turned, value) = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim);
        let eps = if config.is_lite() { common.eps } else { LATENT_EPS };
        let queries = heads * (plain + turned);
        let cached = ("kv_a_proj_with_mqa", rank + turned);
        let (down, query) = match config.q_lora_rank {
            None => (
                weights.fused(prefix, &[cached], hidden, bias)?,
                LatentQuery::Direct(weights.linear(&format!("{prefix}.q_proj"), queries, hidden, false)?),
            ),
            Some(low) => (
                weights.fused(prefix, &[("q_a_proj", low), cached], hidden, bias)?,
                LatentQuery::Low {
                    norm: weights.rms_norm(&format!("{prefix}.q_a_layernorm"), low, eps)?,
                    up: weights.linear(&format!("{prefix}.q_b_proj"), queries, low, false)?,
                },
            ),
        };
        let (to_latent, from_latent) = self.latent(prefix, weights)?;
        let columns = heads * value;
        Ok(Latent {
            layer: layer.index,
            down,
            query,
            norm: weights.rms_norm(&format!("{prefix}.kv_a_layernorm"), rank, eps)?,
            to_latent,
            from_latent,
            heads,
            plain,
            turned,
            rank,
            output: weights.linear(&format!("{prefix}.o_proj"), hidden, columns, bias)?,
        })
    }

    /// Splits the matrix that DeepSeek has around the cached vector into the two that mlx-lm stores.
    fn split_latent(&self, prefix: &str, weights: &mut TensorCursor) -> Result<(), Error> {
        let both = format!("{prefix}.kv_b_proj");
        if weights.has(&format!("{both}.scales")) {
            return Ok(());
        }
        let TokenState { heads, .. } = self.common.attention;
        let Config { kv_lora_rank: rank, qk_nope_head_dim: plain, v_head_dim: value, .. } = self.config;
        let names = ["embed_q", "unembed_out"].map(|part| format!("{prefix}.{part}.weight"));
        let expected = [heads * (plain + value), rank];
        weights.replace(&format!("{both}.weight"), names, |both| {
            if both.shape() != expected {
                return Err(Exception::custom(format!("has shape {:?}, not {expected:?}", both.shape())));
            }
            let both = both.reshape(&[heads, plain + value, rank])?;
            let parts = both.split_at_indices(&[plain], 1)?;
            Ok([parts[0].swap_axes(-1, -2)?, parts[1].clone()])
        })
    }

    /// Takes the matrices around the cached vector: as mlx-lm stores them, or from one quantized matrix.
    fn latent(&self, prefix: &str, weights: &mut TensorCursor) -> Result<(Matrix, Matrix), Error> {
        let TokenState { heads, .. } = self.common.attention;
        let Config { kv_lora_rank: rank, qk_nope_head_dim: plain, v_head_dim: value, .. } = self.config;
        if !weights.has(&format!("{prefix}.kv_b_proj.weight")) {
            let to = weights.matrices(&format!("{prefix}.embed_q"), &[heads, rank, plain])?;
            return Ok((to, weights.matrices(&format!("{prefix}.unembed_out"), &[heads, value, rank])?));
        }
        let both = weights.matrix(&format!("{prefix}.kv_b_proj"), heads * (plain + value), rank)?;
        let both = both.dense()?.reshape(&[heads, plain + value, rank])?;
        let parts = both.split_at_indices(&[plain], 1)?;
        Ok((Matrix::Dense(parts[0].swap_axes(-1, -2)?), Matrix::Dense(parts[1].clone())))
    }
}

impl Architecture for DeepSeek {
    fn common(&self) -> &Common {
        &self.common
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        weights.discard_predictors("model.layers.", self.common.layers);
        for layer in 0..self.common.layers {
            self.split_latent(&Layer::new(layer).name("self_attn"), weights)?;
        }
        weights.stack_gated_experts(self.common.layers, self.config.n_routed_experts.unwrap_or(0))
    }

    fn mixer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        Ok(Box::new(self.attention(layer, weights)?))
    }

    fn mixture(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Option<Mixture>, Error> {
        let experts = self.experts.filter(|_| self.mixes[layer.index]);
        experts.map(|experts| experts.load(&self.common, layer, weights)).transpose()
    }
}
