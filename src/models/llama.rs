//! Llama (<https://arxiv.org/abs/2302.13971>) and what shares its shape: Mistral, SmolLM2, and SmolLM3, which
//! rotates queries and keys in some layers only. A Mistral's layers all have the window `sliding_window`, if
//! it is not null and `layer_types` does not say otherwise.

use serde::Deserialize;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::given::Given;
use super::parts::Layer;
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::layers::{Attention, Sublayer};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    model_type: String,
    no_rope_layers: Option<Vec<i32>>,
    #[serde(default = "config::or::<4, _>")]
    no_rope_layer_interval: u16,
}

struct Llama {
    common: Common,
    windows: Vec<i32>,
    /// Whether each layer rotates queries and keys.
    rotates: Vec<bool>,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let config = given.parse::<Config>()?;
    let keys = match config.model_type.as_str() {
        "mistral" => Keys { num_key_value_heads: Key::Required, ..Keys::LLAMA },
        "smollm3" => Keys { num_key_value_heads: Key::Required, rope_theta: Key::Required, ..Keys::LLAMA },
        _ => Keys::LLAMA,
    };
    let common = Common::rotated(given, &keys)?;
    let rotates = config.rotates(common.layers);
    if rotates.len() != common.layers {
        return config::invalid("no_rope_layers does not name every layer");
    }
    let windows = config.windows(given, &rotates)?;
    Ok(loader(Llama { common, windows, rotates }, setup))
}

impl Config {
    fn windows(&self, given: &Given<'_>, rotates: &[bool]) -> Result<Vec<i32>, OpenError> {
        let (mistral, smol) = (self.model_type == "mistral", self.model_type == "smollm3");
        // Left out, it is what the first release had.
        let window = Key::Or(mistral.then_some(4096)).read(given, "sliding_window")?;
        let smol = smol && Key::Or(false).read(given, "use_sliding_window")?;
        let slides = |layer: usize| window.is_some() && (mistral || smol && !rotates[layer]);
        config::windows(given, rotates.len(), slides, window)
    }

    fn rotates(&self, layers: usize) -> Vec<bool> {
        match (&self.no_rope_layers, self.model_type.as_str()) {
            (Some(listed), "smollm3") => listed.iter().map(|&rotates| rotates != 0).collect(),
            (None, "smollm3") => {
                let interval = usize::from(self.no_rope_layer_interval.max(1));
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
