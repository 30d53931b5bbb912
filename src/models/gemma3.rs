//! Gemma 3's text model (<https://arxiv.org/abs/2503.19786>): norms before and after each sublayer and of
//! each head's queries and keys; one layer in `sliding_window_pattern` attends to all positions, the others
//! to a window, each kind with a rotation of its own. Defaults for missing config keys are mlx-lm's
//! (models/gemma3_text.py).

use serde::Deserialize;
use serde_json::Value;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::parts::Layer;
use super::{Loading, OpenError, Setup, gemma2};
use crate::error::Error;
use crate::mlx::layers::{Attention, Residual};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    hidden_size: Key::Or(1152),
    num_hidden_layers: Key::Or(26),
    intermediate_size: Key::Or(6912),
    num_attention_heads: Key::Or(4),
    head_dim: Key::Or(Some(256)),
    rms_norm_eps: Key::Or(1e-6),
    vocab_size: Key::Or(262_144),
    num_key_value_heads: Key::Or(Some(1)),
    rope_theta: Key::Or(1e6),
    // mlx-lm looks for lm_head in the files instead; releases have none.
    tie_word_embeddings: Key::Or(true),
    activation: "gelu_pytorch_tanh",
    activation_keys: &["hidden_activation", "hidden_act"],
    ..Keys::USUAL
};

#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
struct Config {
    rope_local_base_freq: f64,
    query_pre_attn_scalar: f32,
    sliding_window: i32,
    sliding_window_pattern: usize,
    layer_types: Option<Vec<String>>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            rope_local_base_freq: 1e4,
            query_pre_attn_scalar: 256.0,
            sliding_window: 512,
            sliding_window_pattern: 6,
            layer_types: None,
        }
    }
}

struct Gemma3 {
    common: Common,
    config: Config,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let mut common = Common::rotated(value, &KEYS)?;
    let config: Config = config::parse(value)?;
    config::sizes(&[("sliding_window", config.sliding_window)])?;
    config::positive(&[("query_pre_attn_scalar", config.query_pre_attn_scalar.into())])?;
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
        return config::unsupported("layer_types that are not those of sliding_window_pattern");
    }
    common.attention.scale = config.query_pre_attn_scalar.sqrt().recip();
    // The rotation of layers with a window comes first.
    let local = config::rope(common.attention.head_dim, config.rope_local_base_freq, false, None, value)?;
    common.ropes.insert(0, local);
    Ok(loader(Gemma3 { common, config }, setup))
}

impl Config {
    fn slides(&self, layer: usize) -> bool {
        !(layer + 1).is_multiple_of(self.sliding_window_pattern.max(1))
    }
}

/// Rounds a positive number to the nearest bfloat16, and to the even one between two.
fn bfloat16(number: f32) -> f32 {
    let bits = number.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

impl Architecture for Gemma3 {
    fn common(&self) -> &Common {
        &self.common
    }

    fn ends(&self) -> EmbeddingAndHead {
        EmbeddingAndHead {
            norm_plus_one: true,
            // The model was trained with a factor of this precision.
            embedding_scale: bfloat16(config::root(self.common.hidden)),
            ..EmbeddingAndHead::new(&self.common)
        }
    }

    fn window(&self, layer: usize) -> i32 {
        if self.config.slides(layer) { self.config.sliding_window } else { 0 }
    }

    fn layer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let attention = Attention {
            norms: self.common.head_norms(layer, weights)?.plus_one()?,
            rope: Some(usize::from(!self.config.slides(layer.index))),
            ..self.common.attention(layer, weights)?
        };
        gemma2::normed_twice(&self.common, layer, attention, weights)
    }
}
