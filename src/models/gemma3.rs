//! Gemma 3's text model (<https://arxiv.org/abs/2503.19786>): norms before and after each body and of each head's
//! queries and keys; every so many layers one sees all positions, the others a window, each kind with a rotation of its
//! own. Defaults for missing config keys are mlx-lm's (models/gemma3_text.py).

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Gate, HeadNorms, Residual, RmsNorm, Rope};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
struct Config {
    hidden_size: i32,
    num_hidden_layers: usize,
    intermediate_size: i32,
    num_attention_heads: i32,
    head_dim: i32,
    rms_norm_eps: f32,
    vocab_size: i32,
    num_key_value_heads: i32,
    rope_theta: f64,
    rope_local_base_freq: f64,
    query_pre_attn_scalar: f32,
    sliding_window: i32,
    sliding_window_pattern: usize,
    rope_scaling: Option<Value>,
    /// mlx-lm looks for lm_head in the files instead; releases have none.
    tie_word_embeddings: bool,
    layer_types: Option<Vec<String>>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hidden_size: 1152,
            num_hidden_layers: 26,
            intermediate_size: 6912,
            num_attention_heads: 4,
            head_dim: 256,
            rms_norm_eps: 1e-6,
            vocab_size: 262_144,
            num_key_value_heads: 1,
            rope_theta: 1_000_000.0,
            rope_local_base_freq: 10_000.0,
            query_pre_attn_scalar: 256.0,
            sliding_window: 512,
            sliding_window_pattern: 6,
            rope_scaling: None,
            tie_word_embeddings: true,
            layer_types: None,
            hidden_act: None,
            hidden_activation: None,
        }
    }
}

struct Gemma3 {
    config: Config,
    state: TokenState,
    /// Of layers with a window, and of those without.
    ropes: [Rope; 2],
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let Config { num_attention_heads: heads, num_key_value_heads: kv_heads, head_dim, .. } = config;
    config::sizes(&[
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
        ("sliding_window", config.sliding_window),
    ])?;
    config::depth(config.num_hidden_layers)?;
    config::heads(heads, kv_heads, head_dim)?;
    config::epsilon(config.rms_norm_eps)?;
    config::positive(&[("query_pre_attn_scalar", config.query_pre_attn_scalar.into())])?;
    let activation = config.hidden_activation.as_deref().or(config.hidden_act.as_deref());
    config::activation(activation, &["gelu_pytorch_tanh"])?;
    config::off(
        value,
        &["attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"],
    )?;
    if config.sliding_window_pattern == 0 {
        return config::invalid("sliding_window_pattern is 0");
    }
    let kind = |layer| if config.slides(layer) { config::SLIDING } else { config::FULL };
    let listed = config.layer_types.as_ref();
    if listed.is_some_and(|listed| !listed.iter().map(String::as_str).eq((0..listed.len()).map(kind))) {
        let why = "layer_types that are not those of sliding_window_pattern";
        return Err(ConfigError::Unsupported(why.into()));
    }
    let local = config::rope(head_dim, config.rope_local_base_freq, false, None, value)?;
    let global = config::rope(head_dim, config.rope_theta, false, config.rope_scaling.as_ref(), value)?;
    let scale = config.query_pre_attn_scalar.sqrt().recip();
    let state = TokenState { scale, ..TokenState::new(heads, kv_heads, head_dim) };
    Ok(loader(Gemma3 { config, state, ropes: [local, global] }, setup))
}

impl Config {
    fn slides(&self, layer: usize) -> bool {
        !(layer + 1).is_multiple_of(self.sliding_window_pattern.max(1))
    }
}

/// A positive number, rounded to the nearest bfloat16, and to the even one between two.
fn bfloat16(number: f32) -> f32 {
    let bits = number.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

impl Architecture for Gemma3 {
    #[allow(clippy::cast_precision_loss, reason = "a size is 2^24 at most, which is exact")]
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings, .. } = self.config;
        EmbeddingAndHead {
            norm_plus_one: true,
            // The model was trained with a factor of this precision.
            embedding_scale: bfloat16((hidden_size as f32).sqrt()),
            ..EmbeddingAndHead::new(hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings)
        }
    }

    fn states(&self) -> Vec<LayerState> {
        let window = |layer| if self.config.slides(layer) { self.config.sliding_window } else { 0 };
        let state = |layer| LayerState::Tokens(config::windowed(self.state, window(layer)));
        (0..self.layers()).map(state).collect()
    }

    fn layers(&self) -> usize {
        self.config.num_hidden_layers
    }

    fn ropes(&self) -> Vec<Rope> {
        self.ropes.to_vec()
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
        let norms = HeadNorms::load(weights, &module, ("q_norm", "k_norm"), self.state.head_dim, eps)?;
        let attention = Attention {
            norms: norms.plus_one()?,
            rope: Some(usize::from(!self.config.slides(index))),
            ..Attention::load(weights, &module, (index, &self.state), hidden, (false, false))?
        };
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
