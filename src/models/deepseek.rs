//! DeepSeek-V3 (<https://arxiv.org/abs/2412.19437>), Kimi K2, and GLM-4.7 Flash, which shares its shape: latent attention
//! and many small experts. Defaults for missing keys are mlx-lm's (models/deepseek_v3.py, glm4_moe_lite.py).

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::cuda;
use crate::mlx::kv::{LayerState, TokenState, inverse_root};
use crate::mlx::layers::{
    Gate, Latent, LatentQuery, Matrix, Mixture, Residual, Rope, Router, Scoring, yarn_magnitude,
};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    model_type: String,
    vocab_size: i32,
    hidden_size: i32,
    intermediate_size: i32,
    moe_intermediate_size: i32,
    num_hidden_layers: usize,
    num_attention_heads: i32,
    n_shared_experts: Option<i32>,
    n_routed_experts: Option<i32>,
    #[serde(default = "one")]
    routed_scaling_factor: f32,
    kv_lora_rank: i32,
    q_lora_rank: Option<i32>,
    qk_rope_head_dim: i32,
    qk_nope_head_dim: i32,
    v_head_dim: i32,
    topk_method: Option<String>,
    scoring_func: Option<String>,
    #[serde(default = "config::yes")]
    norm_topk_prob: bool,
    #[serde(default = "first")]
    n_group: i32,
    #[serde(default = "first")]
    topk_group: i32,
    num_experts_per_tok: Option<i32>,
    #[serde(default = "first")]
    moe_layer_freq: i32,
    #[serde(default)]
    first_k_dense_replace: usize,
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    #[serde(default)]
    attention_bias: bool,
    hidden_act: Option<String>,
    #[serde(default)]
    tie_word_embeddings: bool,
}

fn one() -> f32 {
    1.0
}

fn first() -> i32 {
    1
}

struct DeepSeek {
    config: Config,
    /// Experts, and of them those of a token; 0 is none.
    experts: i32,
    chosen: i32,
    state: TokenState,
    rope: Rope,
}

/// Epsilon of the norms of small vectors in DeepSeek's own model, whatever the config says of others.
const LATENT_EPS: f32 = 1e-6;

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    config.check()?;
    if cuda::active() {
        // Scores agreed there and generated tokens did not (one H200): refused until that is understood.
        return Err(ConfigError::Unsupported("latent attention on CUDA".into()));
    }
    let rope_scaling = config.rope_scaling.as_ref().filter(|scaling| !scaling.is_null());
    let theta = config.rope_theta.unwrap_or(if config.is_lite() { 1e6 } else { 1e4 });
    let rope = config::rope(config.qk_rope_head_dim, theta, true, rope_scaling, value)?;
    let query_dim = config.qk_nope_head_dim + config.qk_rope_head_dim;
    let number = |key: &str| rope_scaling.and_then(|scaling| scaling.get(key)).and_then(Value::as_f64);
    let weight = number("mscale_all_dim").unwrap_or(0.0);
    let stretch = if weight == 0.0 { 1.0 } else { yarn_magnitude(number("factor").unwrap_or(1.0), weight) };
    let head_dim = config.qk_rope_head_dim + config.kv_lora_rank;
    let state = TokenState {
        values_from: config.qk_rope_head_dim,
        scale: inverse_root(query_dim) * config::single(stretch * stretch),
        ..TokenState::new(config.num_attention_heads, 1, head_dim)
    };
    let experts = config.n_routed_experts.unwrap_or(0);
    let chosen = config.num_experts_per_tok.unwrap_or(if config.is_lite() { 4 } else { 1 });
    if experts > 0 {
        config::experts(experts, chosen, (config.n_group, config.topk_group))?;
    }
    Ok(loader(DeepSeek { config, experts, chosen, state, rope }, setup))
}

impl Config {
    fn is_lite(&self) -> bool {
        self.model_type == "glm4_moe_lite"
    }

    fn check(&self) -> Result<(), ConfigError> {
        config::sizes(&[
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("vocab_size", self.vocab_size),
            ("kv_lora_rank", self.kv_lora_rank),
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1)),
            ("v_head_dim", self.v_head_dim),
            ("moe_layer_freq", self.moe_layer_freq),
        ])?;
        config::depth(self.num_hidden_layers)?;
        config::heads(self.num_attention_heads, 1, self.kv_lora_rank)?;
        config::heads(self.num_attention_heads, 1, self.qk_rope_head_dim)?;
        config::heads(self.num_attention_heads, 1, self.qk_nope_head_dim)?;
        config::heads(self.num_attention_heads, 1, self.v_head_dim)?;
        config::epsilon(self.rms_norm_eps)?;
        config::activation(self.hidden_act.as_deref(), &["silu"])?;
        config::choice("topk_method", self.topk_method.as_deref(), &["noaux_tc"])?;
        config::choice("scoring_func", self.scoring_func.as_deref(), &["sigmoid"])?;
        match self.n_shared_experts {
            Some(shared) if !(0..=1024).contains(&shared) => {
                config::invalid("n_shared_experts is out of range")
            }
            _ => Ok(()),
        }
    }
}

impl DeepSeek {
    fn attention(&self, index: usize, prefix: &str, weights: &mut TensorCursor) -> Result<Latent, Error> {
        let config = &self.config;
        let (hidden, heads, rank) = (config.hidden_size, config.num_attention_heads, config.kv_lora_rank);
        let (plain, turned, value) = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim);
        let eps = if config.is_lite() { config.rms_norm_eps } else { LATENT_EPS };
        let queries = heads * (plain + turned);
        let kept = ("kv_a_proj_with_mqa", rank + turned);
        let (down, query) = match config.q_lora_rank {
            None => (
                weights.fused(prefix, &[kept], hidden, config.attention_bias)?,
                LatentQuery::Direct(weights.linear(&format!("{prefix}.q_proj"), queries, hidden, false)?),
            ),
            Some(low) => (
                weights.fused(prefix, &[("q_a_proj", low), kept], hidden, config.attention_bias)?,
                LatentQuery::Low {
                    norm: weights.rms_norm(&format!("{prefix}.q_a_layernorm"), low, eps)?,
                    up: weights.linear(&format!("{prefix}.q_b_proj"), queries, low, false)?,
                },
            ),
        };
        let (to_latent, from_latent) = self.latent(prefix, weights)?;
        let columns = heads * value;
        Ok(Latent {
            layer: index,
            down,
            query,
            norm: weights.rms_norm(&format!("{prefix}.kv_a_layernorm"), rank, eps)?,
            to_latent,
            from_latent,
            heads,
            plain,
            turned,
            rank,
            output: weights.linear(&format!("{prefix}.o_proj"), hidden, columns, config.attention_bias)?,
        })
    }

    /// The products around the kept vector: as mlx-lm stores them, or from one matrix as DeepSeek does.
    fn latent(&self, prefix: &str, weights: &mut TensorCursor) -> Result<(Matrix, Matrix), Error> {
        let Config { num_attention_heads: heads, kv_lora_rank: rank, .. } = self.config;
        let Config { qk_nope_head_dim: plain, v_head_dim: value, .. } = self.config;
        if !weights.has(&format!("{prefix}.kv_b_proj.weight")) {
            let to = weights.matrices(&format!("{prefix}.embed_q"), &[heads, rank, plain])?;
            return Ok((to, weights.matrices(&format!("{prefix}.unembed_out"), &[heads, value, rank])?));
        }
        let both = weights.matrix(&format!("{prefix}.kv_b_proj"), heads * (plain + value), rank)?;
        let both = both.dense()?.reshape(&[heads, plain + value, rank])?;
        let parts = both.split_at_indices(&[plain], 1)?;
        Ok((Matrix::Dense(parts[0].swap_axes(-1, -2)?), Matrix::Dense(parts[1].clone())))
    }

    fn mixture(&self, prefix: &str, weights: &mut TensorCursor) -> Result<Mixture, Error> {
        let Config { hidden_size: hidden, moe_intermediate_size: inner, .. } = self.config;
        let Config { n_group: groups, topk_group: groups_kept, norm_topk_prob: normed, .. } = self.config;
        let scale = self.config.routed_scaling_factor;
        let bias = weights.single(&format!("{prefix}.gate.e_score_correction_bias"), &[self.experts])?;
        let shared = match self.config.n_shared_experts.filter(|&shared| shared > 0) {
            Some(shared) => {
                let sizes = (hidden, inner * shared);
                Some(weights.gated_mlp(&format!("{prefix}.shared_experts"), sizes, Gate::Silu, false)?)
            }
            None => None,
        };
        let stack = format!("{prefix}.switch_mlp");
        Ok(Mixture {
            router: Router {
                logits: weights.linear(&format!("{prefix}.gate"), self.experts, hidden, false)?,
                experts: self.experts,
                chosen: self.chosen,
                scoring: Scoring::Sigmoid { bias, groups, groups_kept, normed, scale },
                expert_scale: None,
            },
            experts: weights.gated_experts(&stack, [self.experts, hidden, inner], Gate::Silu, false)?,
            shared,
            shared_gate: None,
        })
    }
}

impl Architecture for DeepSeek {
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings, .. } = self.config;
        EmbeddingAndHead::new(
            hidden_size,
            vocab_size,
            rms_norm_eps,
            tie_word_embeddings && self.config.is_lite(),
        )
    }

    fn states(&self) -> Vec<LayerState> {
        vec![LayerState::Tokens(self.state); self.config.num_hidden_layers]
    }

    fn layers(&self) -> usize {
        self.config.num_hidden_layers
    }

    fn ropes(&self) -> Vec<Rope> {
        vec![self.rope.clone()]
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        // Layers past the last one predict several tokens at once.
        weights.discard_layers("model.layers.", self.config.num_hidden_layers);
        weights.stack_gated_experts(self.config.num_hidden_layers, self.experts)
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, intermediate_size: inner, rms_norm_eps: eps, .. } = self.config;
        let prefix = format!("model.layers.{index}");
        let attention = self.attention(index, &format!("{prefix}.self_attn"), weights)?;
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        let every = usize::try_from(self.config.moe_layer_freq).unwrap_or(1).max(1);
        let mixes =
            self.experts > 0 && index >= self.config.first_k_dense_replace && index.is_multiple_of(every);
        let mlp = format!("{prefix}.mlp");
        let second = if mixes {
            Residual::new(after, self.mixture(&mlp, weights)?)
        } else {
            Residual::new(after, weights.gated_mlp(&mlp, (hidden, inner), Gate::Silu, false)?)
        };
        Ok(vec![Residual::new(before, attention), second])
    }
}
