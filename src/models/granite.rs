//! Granite 3 (<https://github.com/ibm-granite/granite-3.0-language-models>): Llama with factors at the
//! embedding, the scores, the output of each sublayer, and the logits.

use serde::Deserialize;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, EmbeddingAndHead, loader, usual_layer};
use super::given::Given;
use super::parts::Layer;
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::layers::Residual;
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys =
    Keys { head_dim: Key::Or(None), attention_bias: Key::Required, mlp_bias: Key::Required, ..Keys::USUAL };

#[derive(Clone, Debug, Deserialize)]
struct Config {
    logits_scaling: f32,
    attention_multiplier: f32,
    embedding_multiplier: f32,
    residual_multiplier: f32,
}

struct Granite {
    common: Common,
    config: Config,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let mut common = Common::rotated(given, &KEYS)?;
    let config: Config = given.parse()?;
    config::positive(&[
        ("logits_scaling", config.logits_scaling.into()),
        ("1 / logits_scaling", config.logits_scaling.recip().into()),
        ("attention_multiplier", config.attention_multiplier.into()),
        ("embedding_multiplier", config.embedding_multiplier.into()),
        ("residual_multiplier", config.residual_multiplier.into()),
    ])?;
    common.attention.scale = config.attention_multiplier;
    Ok(loader(Granite { common, config }, setup))
}

impl Architecture for Granite {
    fn common(&self) -> &Common {
        &self.common
    }

    fn ends(&self) -> EmbeddingAndHead {
        EmbeddingAndHead {
            embedding_scale: self.config.embedding_multiplier,
            logit_scale: self.config.logits_scaling.recip(),
            ..EmbeddingAndHead::new(&self.common)
        }
    }

    fn layer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let mut residuals = usual_layer(self, layer, weights)?;
        let scale = Some(self.config.residual_multiplier).filter(|&scale| scale != 1.0);
        residuals.iter_mut().for_each(|residual| residual.scale = scale);
        Ok(residuals)
    }
}
