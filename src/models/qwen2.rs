//! Qwen2 and Qwen2.5 (<https://arxiv.org/abs/2407.10671>): Llama with biases at queries, keys and values. Defaults for
//! missing config keys are mlx-lm's (models/qwen2.py). As there, `use_sliding_window` is not read: every layer sees all
//! positions, and releases leave it off.

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Gate, Residual, Rope};
use crate::mlx::tensors::TensorCursor;

fn million() -> f64 {
    1_000_000.0
}

#[derive(Clone, Debug, Deserialize)]
struct Config {
    hidden_size: i32,
    num_hidden_layers: usize,
    intermediate_size: i32,
    num_attention_heads: i32,
    rms_norm_eps: f32,
    vocab_size: i32,
    num_key_value_heads: i32,
    #[serde(default = "million")]
    rope_theta: f64,
    #[serde(default)]
    rope_traditional: bool,
    rope_scaling: Option<Value>,
    #[serde(default = "config::yes")]
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
}

struct Qwen2 {
    config: Config,
    state: TokenState,
    rope: Rope,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let head_dim = config.hidden_size / heads.max(1);
    config::sizes(&[
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
    ])?;
    config::depth(config.num_hidden_layers)?;
    config::heads(heads, kv_heads, head_dim)?;
    config::epsilon(config.rms_norm_eps)?;
    config::activation(config.hidden_act.as_deref(), &["silu"])?;
    let (theta, traditional) = (config.rope_theta, config.rope_traditional);
    let rope = config::rope(head_dim, theta, traditional, config.rope_scaling.as_ref(), value)?;
    let state = TokenState::new(heads, kv_heads, head_dim);
    Ok(loader(Qwen2 { config, state, rope }, setup))
}

impl Architecture for Qwen2 {
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

    fn adapt(&self, _: &mut TensorCursor) -> Result<(), Error> {
        Ok(())
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, intermediate_size: inner, rms_norm_eps: eps, .. } = self.config;
        let prefix = format!("model.layers.{index}");
        let module = format!("{prefix}.self_attn");
        let attention = Attention::load(weights, &module, (index, &self.state), hidden, (true, false))?;
        let mlp = weights.gated_mlp(&format!("{prefix}.mlp"), (hidden, inner), Gate::Silu, false)?;
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        Ok(vec![Residual::new(before, attention), Residual::new(after, mlp)])
    }
}
