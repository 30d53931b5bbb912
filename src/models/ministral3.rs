//! Ministral 3 (<https://arxiv.org/abs/2601.08584>): Mistral with YaRN and queries that grow with their
//! position, as in Llama 4.

use serde::Deserialize;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::given::Given;
use super::parts::Layer;
use super::rotation::Rotation;
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::layers::{Attention, QueryScale, Sublayer};
use crate::mlx::tensors::TensorCursor;

/// Required parts of `rope_parameters` beside its kind of scaling.
#[derive(Clone, Debug, Deserialize)]
struct RopeParameters {
    llama_4_scaling_beta: f32,
    original_max_position_embeddings: i32,
}

struct Ministral3 {
    common: Common,
    windows: Vec<i32>,
    query_scale: QueryScale,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let common = Common::rotated(given, &Keys::USUAL)?;
    let scaling = Rotation::read(given)?.scaling;
    if scaling.is_null() {
        return config::invalid("rope_parameters is missing");
    }
    let parameters: RopeParameters = Given::new(&scaling)?.parse()?;
    let (beta, original) = (parameters.llama_4_scaling_beta, parameters.original_max_position_embeddings);
    config::sizes(&[("original_max_position_embeddings", original)])?;
    if !beta.is_finite() {
        return config::invalid(format!("llama_4_scaling_beta is {beta}"));
    }
    let window = Key::Or(None).read(given, "sliding_window")?;
    let windows = config::windows(given, common.layers, |_| window.is_some(), window)?;
    Ok(loader(Ministral3 { common, windows, query_scale: QueryScale { beta, original } }, setup))
}

impl Architecture for Ministral3 {
    fn common(&self) -> &Common {
        &self.common
    }

    fn window(&self, layer: usize) -> i32 {
        self.windows[layer]
    }

    fn mixer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        let query_scale = Some(self.query_scale).filter(|scale| scale.beta != 0.0);
        Ok(Box::new(Attention { query_scale, ..self.common.attention(layer, weights)? }))
    }
}
