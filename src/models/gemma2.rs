//! Gemma 2 (<https://arxiv.org/abs/2408.00118>): norms before and after each sublayer, capped scores and
//! logits, and always tied embeddings. Defaults for missing config keys are mlx-lm's (models/gemma2.py). As
//! there, `rope_scaling` and `sliding_window` are not read: every layer attends to all positions, which is
//! the same within a window (4096 in the releases).

use serde_json::Value;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::parts::Layer;
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::layers::{Attention, Gate, Residual};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    rope_theta: Key::Or(1e4),
    rope_traditional: Key::Or(false),
    tie_word_embeddings: Key::Always(true),
    activation: "gelu_pytorch_tanh",
    activation_keys: &["hidden_activation", "hidden_act"],
    ..Keys::USUAL
};

struct Gemma2 {
    common: Common,
    logit_softcap: f32,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let mut common = Common::read(value, &KEYS)?;
    common.ropes = vec![common.rope(common.attention.head_dim, None, value)?];
    let positive = |name: &str, default: f32| {
        let number = Key::Or(default).read(value, name)?;
        config::positive(&[(name, number.into())]).map(|()| number)
    };
    common.attention.scale = positive("query_pre_attn_scalar", 144.0)?.sqrt().recip();
    common.attention.softcap = positive("attn_logit_softcapping", 50.0)?;
    let logit_softcap = positive("final_logit_softcapping", 30.0)?;
    Ok(loader(Gemma2 { common, logit_softcap }, setup))
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
