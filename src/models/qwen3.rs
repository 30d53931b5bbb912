//! Qwen3 (<https://arxiv.org/abs/2505.09388>), dense and as a mixture of experts: Llama with a norm of each head's
//! queries and keys. What a config must say and where is mlx-lm's reading (models/qwen3.py, qwen3_moe.py), but
//! `rope_scaling` counts for mixtures too, where mlx-lm passes over it.

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Gate, HeadNorms, Mixture, Residual, Rope, Router, Scoring};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    model_type: String,
    hidden_size: i32,
    num_hidden_layers: usize,
    intermediate_size: i32,
    num_attention_heads: i32,
    rms_norm_eps: f32,
    vocab_size: i32,
    num_key_value_heads: i32,
    head_dim: i32,
    tie_word_embeddings: bool,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    /// Where transformers 5 writes theta and scaling.
    rope_parameters: Option<Value>,
    hidden_act: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct Moe {
    num_experts: i32,
    num_experts_per_tok: i32,
    decoder_sparse_step: usize,
    mlp_only_layers: Vec<usize>,
    moe_intermediate_size: i32,
    norm_topk_prob: bool,
}

struct Qwen3 {
    config: Config,
    /// None if all layers are dense.
    moe: Option<Moe>,
    state: TokenState,
    rope: Rope,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let Config { num_attention_heads: heads, num_key_value_heads: kv_heads, head_dim, .. } = config;
    config::sizes(&[
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
    ])?;
    config::depth(config.num_hidden_layers)?;
    config::heads(heads, kv_heads, head_dim)?;
    config::epsilon(config.rms_norm_eps)?;
    config::activation(config.hidden_act.as_deref(), &["silu"])?;
    let moe = if config.model_type == "qwen3_moe" { Moe::read(value)? } else { None };
    let nested = config.rope_parameters.as_ref();
    let nested_theta = nested.and_then(|nested| nested.get("rope_theta")).and_then(Value::as_f64);
    let Some(theta) = config.rope_theta.or(nested_theta) else {
        return config::invalid("rope_theta is missing");
    };
    let rope = config::rope(head_dim, theta, false, config.rope_scaling.as_ref().or(nested), value)?;
    let state = TokenState::new(heads, kv_heads, head_dim);
    Ok(loader(Qwen3 { config, moe, state, rope }, setup))
}

impl Moe {
    /// None without experts.
    fn read(value: &Value) -> Result<Option<Self>, ConfigError> {
        let moe: Self = config::parse(value)?;
        if moe.num_experts <= 0 {
            return Ok(None);
        }
        let (experts, chosen) = (moe.num_experts, moe.num_experts_per_tok);
        config::experts(experts, chosen, (1, 1))?;
        config::sizes(&[("moe_intermediate_size", moe.moe_intermediate_size)])?;
        if moe.decoder_sparse_step == 0 {
            return config::invalid("decoder_sparse_step is 0");
        }
        Ok(Some(moe))
    }

    fn mixes(&self, layer: usize) -> bool {
        !self.mlp_only_layers.contains(&layer) && (layer + 1).is_multiple_of(self.decoder_sparse_step.max(1))
    }

    fn mixture(&self, prefix: &str, hidden: i32, weights: &mut TensorCursor) -> Result<Mixture, Error> {
        let (experts, inner) = (self.num_experts, self.moe_intermediate_size);
        let router = Router {
            logits: weights.linear(&format!("{prefix}.gate"), experts, hidden, false)?,
            experts,
            chosen: self.num_experts_per_tok,
            scoring: Scoring::Softmax { normed: self.norm_topk_prob },
            expert_scale: None,
        };
        let switch = format!("{prefix}.switch_mlp");
        let experts = weights.gated_experts(&switch, [experts, hidden, inner], Gate::Silu, false)?;
        Ok(Mixture { router, experts, shared: None, shared_gate: None })
    }
}

impl Architecture for Qwen3 {
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
        self.moe.as_ref().map_or(Ok(()), |moe| weights.stack_gated_experts(self.layers(), moe.num_experts))
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, intermediate_size: inner, rms_norm_eps: eps, .. } = self.config;
        let prefix = format!("model.layers.{index}");
        let (module, mlp) = (format!("{prefix}.self_attn"), format!("{prefix}.mlp"));
        let attention = Attention {
            norms: HeadNorms::load(weights, &module, ("q_norm", "k_norm"), self.state.head_dim, eps)?,
            ..Attention::load(weights, &module, (index, &self.state), hidden, (false, false))?
        };
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        let feed = match self.moe.as_ref().filter(|moe| moe.mixes(index)) {
            Some(moe) => Residual::new(after, moe.mixture(&mlp, hidden, weights)?),
            None => Residual::new(after, weights.gated_mlp(&mlp, (hidden, inner), Gate::Silu, false)?),
        };
        Ok(vec![Residual::new(before, attention), feed])
    }
}
