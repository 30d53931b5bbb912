//! OLMo 2 (<https://arxiv.org/abs/2501.00656>): Llama that norms what comes out of a body, not what goes in, and
//! queries and keys over all heads together. Defaults for missing config keys are mlx-lm's (models/olmo2.py).

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Gate, HeadNorms, Residual, RmsNorm, Rope, Sublayer};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    hidden_size: i32,
    num_hidden_layers: usize,
    intermediate_size: i32,
    num_attention_heads: i32,
    rms_norm_eps: f32,
    vocab_size: i32,
    head_dim: Option<i32>,
    num_key_value_heads: Option<i32>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default = "config::ten_thousand")]
    rope_theta: f64,
    #[serde(default)]
    rope_traditional: bool,
    rope_scaling: Option<Value>,
    #[serde(default = "config::yes")]
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
}

struct Olmo2 {
    config: Config,
    state: TokenState,
    rope: Rope,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let heads = config.num_attention_heads;
    let kv_heads = config.num_key_value_heads.unwrap_or(heads);
    let head_dim = config.head_dim.unwrap_or(config.hidden_size / heads.max(1));
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
    Ok(loader(Olmo2 { config, state, rope }, setup))
}

fn residual(body: impl Sublayer + 'static, after: RmsNorm) -> Residual {
    Residual { before: None, body: Box::new(body), after: Some(after), scale: None, sum_scale: None }
}

impl Architecture for Olmo2 {
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
        let Config { attention_bias, mlp_bias, .. } = self.config;
        let TokenState { heads, kv_heads, head_dim, .. } = self.state;
        let prefix = format!("model.layers.{index}");
        let (module, biases) = (format!("{prefix}.self_attn"), (attention_bias, attention_bias));
        let norms = HeadNorms::Whole {
            query: weights.rms_norm(&format!("{module}.q_norm"), heads * head_dim, eps)?,
            key: weights.rms_norm(&format!("{module}.k_norm"), kv_heads * head_dim, eps)?,
        };
        let attention =
            Attention { norms, ..Attention::load(weights, &module, (index, &self.state), hidden, biases)? };
        let mlp = weights.gated_mlp(&format!("{prefix}.mlp"), (hidden, inner), Gate::Silu, mlp_bias)?;
        let attended = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        let fed = weights.rms_norm(&format!("{prefix}.post_feedforward_layernorm"), hidden, eps)?;
        Ok(vec![residual(attention, attended), residual(mlp, fed)])
    }
}
