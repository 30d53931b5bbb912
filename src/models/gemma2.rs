//! Gemma 2 (<https://arxiv.org/abs/2408.00118>): norms before and after each body, capped scores and logits, and always
//! tied embeddings. Defaults for missing config keys are mlx-lm's (models/gemma2.py). As there, `sliding_window` is not
//! read: every layer sees all positions, which is the same up to that many (4096 in the releases).

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Gate, Residual, RmsNorm, Rope};
use crate::mlx::tensors::TensorCursor;

fn score_cap() -> f32 {
    50.0
}

fn logit_cap() -> f32 {
    30.0
}

fn query_scalar() -> f32 {
    144.0
}

#[derive(Clone, Debug, Deserialize)]
struct Config {
    hidden_size: i32,
    num_hidden_layers: usize,
    intermediate_size: i32,
    num_attention_heads: i32,
    head_dim: i32,
    rms_norm_eps: f32,
    vocab_size: i32,
    num_key_value_heads: i32,
    #[serde(default = "config::ten_thousand")]
    rope_theta: f64,
    #[serde(default)]
    rope_traditional: bool,
    #[serde(default = "score_cap")]
    attn_logit_softcapping: f32,
    #[serde(default = "logit_cap")]
    final_logit_softcapping: f32,
    #[serde(default = "query_scalar")]
    query_pre_attn_scalar: f32,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
}

struct Gemma2 {
    config: Config,
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
    config::positive(&[
        ("attn_logit_softcapping", config.attn_logit_softcapping.into()),
        ("final_logit_softcapping", config.final_logit_softcapping.into()),
        ("query_pre_attn_scalar", config.query_pre_attn_scalar.into()),
    ])?;
    let activation = config.hidden_activation.as_deref().or(config.hidden_act.as_deref());
    config::activation(activation, &["gelu_pytorch_tanh"])?;
    let rope = config::rope(head_dim, config.rope_theta, config.rope_traditional, None, value)?;
    let state = TokenState {
        scale: config.query_pre_attn_scalar.sqrt().recip(),
        softcap: config.attn_logit_softcapping,
        ..TokenState::new(heads, kv_heads, head_dim)
    };
    Ok(loader(Gemma2 { config, state, rope }, setup))
}

impl Architecture for Gemma2 {
    #[allow(clippy::cast_precision_loss, reason = "a size is 2^24 at most, which is exact")]
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, rms_norm_eps, final_logit_softcapping, .. } = self.config;
        EmbeddingAndHead {
            norm_plus_one: true,
            embedding_scale: (hidden_size as f32).sqrt(),
            softcap: final_logit_softcapping,
            ..EmbeddingAndHead::new(hidden_size, vocab_size, rms_norm_eps, true)
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
        let prefix = format!("model.layers.{index}");
        let module = format!("{prefix}.self_attn");
        let norm = |weights: &mut TensorCursor, name: &str| -> Result<RmsNorm, Error> {
            Ok(weights.rms_norm(&format!("{prefix}.{name}"), hidden, eps)?.plus_one()?)
        };
        let attention = Attention::load(weights, &module, (index, &self.state), hidden, (false, false))?;
        let mlp = weights.gated_mlp(&format!("{prefix}.mlp"), (hidden, inner), Gate::Gelu, false)?;
        let attend = Residual {
            after: Some(norm(weights, "post_attention_layernorm")?),
            ..Residual::new(norm(weights, "input_layernorm")?, attention)
        };
        let feed = Residual {
            after: Some(norm(weights, "post_feedforward_layernorm")?),
            ..Residual::new(norm(weights, "pre_feedforward_layernorm")?, mlp)
        };
        Ok(vec![attend, feed])
    }
}
