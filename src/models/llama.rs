//! Llama (<https://arxiv.org/abs/2302.13971>) and what shares its shape: Mistral, SmolLM2, and SmolLM3, which
//! rotates queries and keys in some layers only. Defaults for missing config keys are mlx-lm's
//! (models/llama.py, smollm3.py).

use serde::Deserialize;
use serde_json::Value;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::parts::Layer;
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::layers::{Attention, Sublayer};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    model_type: String,
    no_rope_layers: Option<Vec<i32>>,
    no_rope_layer_interval: Option<usize>,
}

struct Llama {
    common: Common,
    windows: Vec<i32>,
    /// Whether each layer rotates queries and keys.
    rotates: Vec<bool>,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let common = Common::rotated(value, &Keys::LLAMA)?;
    let windows = config::windows(value, common.layers, &[config::FULL], Key::Or(None))?;
    let rotates = config::parse::<Config>(value)?.rotates(common.layers);
    if rotates.len() != common.layers {
        return config::invalid("no_rope_layers does not name every layer");
    }
    Ok(loader(Llama { common, windows, rotates }, setup))
}

impl Config {
    fn rotates(&self, layers: usize) -> Vec<bool> {
        match (&self.no_rope_layers, self.model_type.as_str()) {
            (Some(listed), "smollm3") => listed.iter().map(|&rotates| rotates != 0).collect(),
            (None, "smollm3") => {
                let interval = self.no_rope_layer_interval.unwrap_or(4).max(1);
                (1..=layers).map(|layer| layer % interval != 0).collect()
            }
            _ => vec![true; layers],
        }
    }
}

impl Architecture for Llama {
    fn common(&self) -> &Common {
        &self.common
    }

    fn window(&self, layer: usize) -> i32 {
        self.windows[layer]
    }

    fn mixer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        let attention = self.common.attention(layer, weights)?;
        Ok(Box::new(Attention { rope: self.rotates[layer.index].then_some(0), ..attention }))
    }
}
