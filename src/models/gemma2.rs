//! Gemma 2 (<https://arxiv.org/abs/2408.00118>): norms before and after each sublayer, capped scores and
//! logits; every other layer has a window.

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::given::Given;
use super::parts::Layer;
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::layers::{Attention, Gate, Residual};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    attention_bias: Key::Or(false),
    rope_theta: Key::Or(1e4),
    rope_traditional: Key::Or(false),
    activation: "gelu_pytorch_tanh",
    activation_keys: &["hidden_activation", "hidden_act"],
    ..Keys::USUAL
};

struct Gemma2 {
    common: Common,
    windows: Vec<i32>,
    logit_softcap: f32,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let mut common = Common::rotated(given, &KEYS)?;
    let positive = |name: &'static str, key: Key<f32>| {
        let number = key.read(given, name)?;
        config::positive(&[(name, number.into())]).map(|()| number)
    };
    common.attention.scale = positive("query_pre_attn_scalar", Key::Required)?.sqrt().recip();
    common.attention.softcap = positive("attn_logit_softcapping", Key::Or(50.0))?;
    let logit_softcap = positive("final_logit_softcapping", Key::Or(30.0))?;
    config::off(given, &["use_bidirectional_attention"])?;
    let window = Key::Or(Some(4096)).read(given, "sliding_window")?;
    let windows = config::windows(given, common.layers, |layer| layer.is_multiple_of(2), window)?;
    Ok(loader(Gemma2 { common, windows, logit_softcap }, setup))
}

/// Takes a layer of Gemma 2 or 3 with this attention; norms are stored less 1.
pub(super) fn normed_twice(
    common: &Common,
    layer: &Layer,
    attention: Attention,
    weights: &mut TensorCursor,
) -> Result<Vec<Residual>, Error> {
    let mlp = common.mlp(layer, Gate::Gelu, weights)?;
    let mut norm = |name: &str| Ok::<_, Error>(common.norm(&layer.name(name), weights)?.plus_one()?);
    let attend = Residual {
        after: Some(norm("post_attention_layernorm")?),
        ..Residual::new(norm("input_layernorm")?, Box::new(attention))
    };
    let feed = Residual {
        after: Some(norm("post_feedforward_layernorm")?),
        ..Residual::new(norm("pre_feedforward_layernorm")?, Box::new(mlp))
    };
    Ok(vec![attend, feed])
}

impl Architecture for Gemma2 {
    fn common(&self) -> &Common {
        &self.common
    }

    fn window(&self, layer: usize) -> i32 {
        self.windows[layer]
    }

    fn ends(&self) -> EmbeddingAndHead {
        EmbeddingAndHead {
            norm_plus_one: true,
            embedding_scale: config::root(self.common.hidden),
            softcap: self.logit_softcap,
            ..EmbeddingAndHead::new(&self.common)
        }
    }

    fn layer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let attention = self.common.attention(layer, weights)?;
        normed_twice(&self.common, layer, attention, weights)
    }
}
