//! Qwen1.5-MoE and Qwen2-MoE (<https://arxiv.org/abs/2407.10671>): Qwen2 with many small experts and one that every token
//! goes through. Defaults are mlx-lm's (models/qwen2_moe.py), which passes over `rope_scaling`; here it counts.

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Gate, Mixture, Residual, Rope, Router, Scoring};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    hidden_size: i32,
    num_hidden_layers: usize,
    num_attention_heads: i32,
    num_experts_per_tok: i32,
    num_experts: i32,
    moe_intermediate_size: i32,
    shared_expert_intermediate_size: i32,
    rms_norm_eps: f32,
    vocab_size: i32,
    num_key_value_heads: Option<i32>,
    #[serde(default = "million")]
    rope_theta: f64,
    #[serde(default)]
    rope_traditional: bool,
    rope_scaling: Option<Value>,
    #[serde(default)]
    norm_topk_prob: bool,
    #[serde(default = "every")]
    decoder_sparse_step: usize,
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
    hidden_act: Option<String>,
}

fn million() -> f64 {
    1e6
}

fn every() -> usize {
    1
}

struct Qwen2Moe {
    config: Config,
    state: TokenState,
    rope: Rope,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let heads = config.num_attention_heads;
    let (kv_heads, head_dim) =
        (config.num_key_value_heads.unwrap_or(heads), config.hidden_size / heads.max(1));
    config::sizes(&[
        ("hidden_size", config.hidden_size),
        ("moe_intermediate_size", config.moe_intermediate_size),
        ("shared_expert_intermediate_size", config.shared_expert_intermediate_size),
        ("vocab_size", config.vocab_size),
    ])?;
    config::depth(config.num_hidden_layers)?;
    config::heads(heads, kv_heads, head_dim)?;
    config::epsilon(config.rms_norm_eps)?;
    config::experts(config.num_experts, config.num_experts_per_tok, (1, 1))?;
    config::activation(config.hidden_act.as_deref(), &["silu"])?;
    if config.norm_topk_prob || config.decoder_sparse_step != 1 || !config.mlp_only_layers.is_empty() {
        let options = "norm_topk_prob, decoder_sparse_step or mlp_only_layers";
        return Err(ConfigError::Unsupported(options.into()));
    }
    let (theta, scaling) = (config.rope_theta, config.rope_scaling.as_ref());
    let rope = config::rope(head_dim, theta, config.rope_traditional, scaling, value)?;
    let state = TokenState::new(heads, kv_heads, head_dim);
    Ok(loader(Qwen2Moe { config, state, rope }, setup))
}

impl Architecture for Qwen2Moe {
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, rms_norm_eps, .. } = self.config;
        EmbeddingAndHead::new(hidden_size, vocab_size, rms_norm_eps, false)
    }

    fn states(&self) -> Vec<LayerState> {
        vec![LayerState::Tokens(self.state); self.layers()]
    }

    fn layers(&self) -> usize {
        self.config.num_hidden_layers
    }

    fn ropes(&self) -> Vec<Rope> {
        vec![self.rope.clone()]
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        weights.stack_gated_experts(self.layers(), self.config.num_experts)
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, num_experts: experts, rms_norm_eps: eps, .. } = self.config;
        let Config { moe_intermediate_size: inner, shared_expert_intermediate_size: shared, .. } =
            self.config;
        let prefix = format!("model.layers.{index}");
        let (module, mlp) = (format!("{prefix}.self_attn"), format!("{prefix}.mlp"));
        let attention = Attention::load(weights, &module, (index, &self.state), hidden, (true, false))?;
        let mixture = Mixture {
            router: Router {
                logits: weights.linear(&format!("{mlp}.gate"), experts, hidden, false)?,
                experts,
                chosen: self.config.num_experts_per_tok,
                scoring: Scoring::Softmax { normed: false },
                expert_scale: None,
            },
            experts: {
                let switch = format!("{mlp}.switch_mlp");
                weights.gated_experts(&switch, [experts, hidden, inner], Gate::Silu, false)?
            },
            shared: {
                let sizes = (hidden, shared);
                Some(weights.gated_mlp(&format!("{mlp}.shared_expert"), sizes, Gate::Silu, false)?)
            },
            shared_gate: Some(weights.linear(&format!("{mlp}.shared_expert_gate"), 1, hidden, false)?),
        };
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        Ok(vec![Residual::new(before, attention), Residual::new(after, mixture)])
    }
}
