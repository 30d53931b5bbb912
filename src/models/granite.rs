//! Granite 3 (<https://github.com/ibm-granite/granite-3.0-language-models>): Llama with factors at the embedding, the
//! scores, what each body adds, and the logits. What a config must say is mlx-lm's reading (models/granite.py).

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Gate, Residual, Rope};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    hidden_size: i32,
    num_hidden_layers: usize,
    intermediate_size: i32,
    num_attention_heads: i32,
    rms_norm_eps: f32,
    vocab_size: i32,
    logits_scaling: f32,
    attention_multiplier: f32,
    embedding_multiplier: f32,
    residual_multiplier: f32,
    num_key_value_heads: i32,
    attention_bias: bool,
    mlp_bias: bool,
    rope_theta: f64,
    rope_scaling: Option<Value>,
    #[serde(default = "config::yes")]
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
}

struct Granite {
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
    config::positive(&[
        ("logits_scaling", config.logits_scaling.into()),
        ("1 / logits_scaling", config.logits_scaling.recip().into()),
        ("attention_multiplier", config.attention_multiplier.into()),
        ("embedding_multiplier", config.embedding_multiplier.into()),
        ("residual_multiplier", config.residual_multiplier.into()),
    ])?;
    let rope = config::rope(head_dim, config.rope_theta, false, config.rope_scaling.as_ref(), value)?;
    let scale = config.attention_multiplier;
    let state = TokenState { scale, ..TokenState::new(heads, kv_heads, head_dim) };
    Ok(loader(Granite { config, state, rope }, setup))
}

impl Architecture for Granite {
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings, .. } = self.config;
        EmbeddingAndHead {
            embedding_scale: self.config.embedding_multiplier,
            logit_scale: self.config.logits_scaling.recip(),
            ..EmbeddingAndHead::new(hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings)
        }
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
        let Config { attention_bias, mlp_bias, residual_multiplier, .. } = self.config;
        let prefix = format!("model.layers.{index}");
        let (module, biases) = (format!("{prefix}.self_attn"), (attention_bias, attention_bias));
        let attention = Attention::load(weights, &module, (index, &self.state), hidden, biases)?;
        let mlp = weights.gated_mlp(&format!("{prefix}.mlp"), (hidden, inner), Gate::Silu, mlp_bias)?;
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        let scale = (residual_multiplier != 1.0).then_some(residual_multiplier);
        let attend = Residual { scale, ..Residual::new(before, attention) };
        Ok(vec![attend, Residual { scale, ..Residual::new(after, mlp) }])
    }
}
