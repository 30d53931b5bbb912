//! Mixtral (<https://arxiv.org/abs/2401.04088>): Mistral with a mixture of experts in each layer. Defaults for missing
//! config keys are mlx-lm's (models/mixtral.py), but `rope_scaling` counts, where mlx-lm passes over it. As there,
//! `sliding_window` is not read: releases have none.

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Gate, Mixture, Residual, Rope, Router, Scoring};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
struct Config {
    vocab_size: i32,
    hidden_size: i32,
    intermediate_size: i32,
    num_hidden_layers: usize,
    num_attention_heads: i32,
    num_experts_per_tok: i32,
    /// As many as queries if null.
    num_key_value_heads: Option<i32>,
    num_local_experts: i32,
    rms_norm_eps: f32,
    rope_theta: f64,
    rope_traditional: bool,
    rope_scaling: Option<Value>,
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 14336,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_experts_per_tok: 2,
            num_key_value_heads: Some(8),
            num_local_experts: 8,
            rms_norm_eps: 1e-5,
            rope_theta: 1e6,
            rope_traditional: false,
            rope_scaling: None,
            tie_word_embeddings: false,
            hidden_act: None,
        }
    }
}

struct Mixtral {
    config: Config,
    state: TokenState,
    rope: Rope,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let heads = config.num_attention_heads;
    let kv_heads = config.num_key_value_heads.unwrap_or(heads);
    let head_dim = config.hidden_size / heads.max(1);
    let (experts, chosen) = (config.num_local_experts, config.num_experts_per_tok);
    config::sizes(&[
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
    ])?;
    config::experts(experts, chosen, (1, 1))?;
    config::depth(config.num_hidden_layers)?;
    config::heads(heads, kv_heads, head_dim)?;
    config::epsilon(config.rms_norm_eps)?;
    config::activation(config.hidden_act.as_deref(), &["silu"])?;
    let (theta, traditional) = (config.rope_theta, config.rope_traditional);
    let rope = config::rope(head_dim, theta, traditional, config.rope_scaling.as_ref(), value)?;
    let state = TokenState::new(heads, kv_heads, head_dim);
    Ok(loader(Mixtral { config, state, rope }, setup))
}

impl Architecture for Mixtral {
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings, .. } = self.config;
        EmbeddingAndHead::new(hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings)
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
        let experts = self.config.num_local_experts;
        for layer in 0..self.layers() {
            let moe = format!("model.layers.{layer}.block_sparse_moe");
            for (part, name) in [("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")] {
                let stack = format!("{moe}.switch_mlp.{name}");
                weights.stack_experts(&format!("{moe}.experts"), part, &stack, experts)?;
            }
        }
        Ok(())
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, intermediate_size: inner, rms_norm_eps: eps, .. } = self.config;
        let Config { num_local_experts: experts, num_experts_per_tok: chosen, .. } = self.config;
        let prefix = format!("model.layers.{index}");
        let (module, moe) = (format!("{prefix}.self_attn"), format!("{prefix}.block_sparse_moe"));
        let attention = Attention::load(weights, &module, (index, &self.state), hidden, (false, false))?;
        let router = Router {
            logits: weights.linear(&format!("{moe}.gate"), experts, hidden, false)?,
            experts,
            chosen,
            scoring: Scoring::SoftmaxOfBest,
            expert_scale: None,
        };
        let switch = format!("{moe}.switch_mlp");
        let experts = weights.gated_experts(&switch, [experts, hidden, inner], Gate::Silu, false)?;
        let mixture = Mixture { router, experts, shared: None, shared_gate: None };
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        Ok(vec![Residual::new(before, attention), Residual::new(after, mixture)])
    }
}
