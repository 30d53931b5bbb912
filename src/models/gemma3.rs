//! Gemma 3's text model (<https://arxiv.org/abs/2503.19786>): norms before and after each sublayer and of
//! each head's queries and keys; one layer in `sliding_window_pattern` attends to all positions, the others
//! to a window, each kind with a rotation of its own.

use serde::Deserialize;
use serde_json::Value;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::given::Given;
use super::parts::Layer;
use super::rotation::Rotation;
use super::{Loading, OpenError, Setup, gemma2};
use crate::error::Error;
use crate::mlx::layers::{Attention, Residual};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    num_hidden_layers: Key::Or(26),
    head_dim: Key::Or(Some(256)),
    rms_norm_eps: Key::Or(1e-6),
    attention_bias: Key::Or(false),
    // Each kind of layer has its own.
    rope_theta: Key::Always(1e6),
    activation: "gelu_pytorch_tanh",
    activation_keys: &["hidden_activation", "hidden_act"],
    ..Keys::USUAL
};

#[derive(Clone, Debug, Deserialize)]
struct Config {
    #[serde(default = "config::or::<256, _>")]
    query_pre_attn_scalar: f32,
    sliding_window: i32,
    sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
}

struct Gemma3 {
    common: Common,
    windows: Vec<i32>,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let mut keys = KEYS;
    if given.get("model_type").is_some_and(|kind| kind == "gemma3") {
        // Releases of several parts leave these out.
        keys.vocab_size = config::vocabulary_of_release("gemma3");
        keys.num_attention_heads = Key::Or(8);
        keys.num_key_value_heads = Key::Or(Some(4));
    }
    let (mut common, _) = Common::read(given, &keys)?;
    let config: Config = given.parse()?;
    config::sizes(&[("sliding_window", config.sliding_window)])?;
    config::positive(&[("query_pre_attn_scalar", config.query_pre_attn_scalar.into())])?;
    config::off(
        given,
        &["attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"],
    )?;
    let windows = config.windows(given, common.layers)?;
    common.attention.scale = config.query_pre_attn_scalar.sqrt().recip();
    let (theta, scaling) = full_rotation(given)?;
    let dims = common.attention.head_dim;
    // The rotation of layers with a window comes first.
    common.ropes = vec![
        config::rope(dims, local_theta(given)?, false, &Value::Null, given)?,
        config::rope(dims, theta, false, &scaling, given)?,
    ];
    Ok(loader(Gemma3 { common, windows }, setup))
}

impl Config {
    /// Returns the window of each layer: by `layer_types`, by `sliding_window_pattern`, or by both if they
    /// agree.
    fn windows(&self, given: &Given<'_>, layers: usize) -> Result<Vec<i32>, OpenError> {
        let pattern = self.sliding_window_pattern.unwrap_or(6);
        if pattern == 0 {
            return config::invalid("sliding_window_pattern is 0");
        }
        let slides = |layer: usize| !(layer + 1).is_multiple_of(pattern);
        let windows = config::windows(given, layers, slides, Some(self.sliding_window))?;
        let agree = windows.iter().enumerate().all(|(layer, &window)| (window > 0) == slides(layer));
        if self.sliding_window_pattern.is_some() && self.layer_types.is_some() && !agree {
            return config::unsupported("layer_types that are not those of sliding_window_pattern");
        }
        Ok(windows)
    }
}

/// Returns the base of the rotation of layers without a window, and its scaling.
fn full_rotation(given: &Given<'_>) -> Result<(f64, Value), OpenError> {
    let kind = Rotation::of_kind(given, config::FULL)?;
    let beside = Key::Or(1e6).read(given, "rope_theta")?;
    let theta = kind.as_ref().and_then(|kind| kind.theta).unwrap_or(beside);
    let scaling = match given.get("rope_scaling").filter(|scaling| !scaling.is_null()) {
        Some(scaling) => scaling.clone(),
        None => kind.map_or(Value::Null, |kind| kind.scaling),
    };
    Ok((theta, scaling))
}

/// Returns the base of the rotation of layers with a window.
fn local_theta(given: &Given<'_>) -> Result<f64, OpenError> {
    let kind = Rotation::of_kind(given, config::SLIDING)?;
    let beside = Key::Or(1e4).read(given, "rope_local_base_freq")?;
    let Some(Rotation { theta, scaling, .. }) = kind else { return Ok(beside) };
    match scaling.get("rope_type").and_then(Value::as_str) {
        None | Some("default") => Ok(theta.unwrap_or(beside)),
        Some(other) => config::unsupported(format!("rope_parameters.sliding_attention of type {other:?}")),
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
        self.windows[layer]
    }

    fn layer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let attention = Attention {
            norms: self.common.head_norms(layer, weights)?.plus_one()?,
            rope: Some(usize::from(self.windows[layer.index] == 0)),
            ..self.common.attention(layer, weights)?
        };
        gemma2::normed_twice(&self.common, layer, attention, weights)
    }
}
