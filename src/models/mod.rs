//! Architectures, one file each, and the registry that names them. An architecture reads its part of
//! config.json, takes its tensors piece by piece, and runs packed tokens.

mod config;
mod decoder;
mod deepseek;
mod gemma2;
mod gemma3;
mod gemma4;
mod gemma4_parts;
mod given;
mod glm4_moe;
mod gpt_oss;
mod granite;
mod lfm2;
mod llama;
mod ministral3;
mod mixtral;
mod nemotron_h;
mod olmo2;
mod parts;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_next;
mod rotation;
mod stored;
#[cfg(test)]
mod tests;

use mlx_rs::Array;
use serde_json::Value;

use crate::error::Error;
use crate::mlx::batch::Batch;
use crate::mlx::kernels::KernelSet;
use crate::mlx::kv::{Kv, KvShape};
use crate::mlx::tensors::TensorCursor;
use given::Given;
pub(crate) use stored::{keeps_dtype, prefix};

/// A model that can run.
pub(crate) trait Model: Send {
    /// Runs packed tokens through all layers, writing their keys and values; returns the logits `[rows,
    /// vocabulary]` of the batch's output rows, or None if it has none. `attention` is the set that attends
    /// over `kv`.
    fn forward(
        &self,
        batch: &Batch,
        kv: &mut Kv,
        attention: KernelSet,
    ) -> mlx_rs::error::Result<Option<Array>>;

    /// Returns every array of its weights.
    fn arrays(&self) -> Vec<&Array>;
}

/// A model that is being loaded.
pub(crate) trait Loading: Send {
    /// Brings the tensors to the names and shapes that mlx-lm writes, and drops those that are not used.
    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error>;

    /// Takes the next piece and begins to evaluate it; returns the model after the last one. The piece before
    /// has been read.
    fn next(&mut self, weights: &mut TensorCursor) -> Result<Option<Box<dyn Model>>, Error>;

    /// Returns the number of pieces.
    fn pieces(&self) -> usize;

    /// Returns the number of layers.
    fn layers(&self) -> usize;

    /// Returns the shape of its KV cache.
    fn kv_shape(&self) -> KvShape;
}

/// Facts of the device and the request that an architecture needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    /// The dtype of activations and KV cache.
    pub(crate) dtype: mlx_rs::Dtype,
    /// The kernels beside dense matrix products.
    pub(crate) kernels: KernelSet,
    /// Whether the KV cache holds 8-bit integers.
    pub(crate) int8_kv: bool,
}

/// Why a model's config is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum OpenError {
    /// It names an option that is not implemented.
    Unsupported(String),
    /// Something is missing, malformed or contradictory.
    Invalid(String),
}

type Open = fn(&Given<'_>, Setup) -> Result<Box<dyn Loading>, OpenError>;

/// A loader that blames the keys that its config leaves out, beside the weights that do not fit it.
struct Blaming {
    loading: Box<dyn Loading>,
    silent: Vec<&'static str>,
}

impl Blaming {
    /// Returns an error that also blames the keys that the config leaves out.
    fn blame(&self, error: Error) -> Error {
        match error {
            Error::ModelInvalid { model, why } if !self.silent.is_empty() => {
                let keys = self.silent.join(", ");
                Error::ModelInvalid { model, why: format!("{why}; config.json leaves to defaults: {keys}") }
            }
            other => other,
        }
    }
}

impl Loading for Blaming {
    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        self.loading.adapt(weights).map_err(|error| self.blame(error))
    }

    fn next(&mut self, weights: &mut TensorCursor) -> Result<Option<Box<dyn Model>>, Error> {
        self.loading.next(weights).map_err(|error| self.blame(error))
    }

    fn pieces(&self) -> usize {
        self.loading.pieces()
    }

    fn layers(&self) -> usize {
        self.loading.layers()
    }

    fn kv_shape(&self) -> KvShape {
        self.loading.kv_shape()
    }
}

/// An architecture as the registry knows it.
struct Registration {
    /// The values of `model_type` it serves.
    model_types: &'static [&'static str],
    open: Open,
}

const REGISTRY: &[Registration] = &[
    Registration {
        model_types: &["llama", "mistral", "smollm3", "iquestcoder", "xverse"],
        open: llama::open,
    },
    Registration { model_types: &["qwen2", "qwen2_5_vl"], open: qwen2::open },
    Registration { model_types: &["qwen2_moe"], open: qwen2_moe::open },
    Registration { model_types: &["qwen3", "qwen3_moe"], open: qwen3::open },
    Registration { model_types: &["gemma3", "gemma3_text"], open: gemma3::open },
    Registration { model_types: &["gemma2"], open: gemma2::open },
    Registration { model_types: &["phi3"], open: phi3::open },
    Registration { model_types: &["gpt_oss"], open: gpt_oss::open },
    Registration { model_types: &["ministral3"], open: ministral3::open },
    Registration { model_types: &["gemma4", "gemma4_text", "gemma4_unified"], open: gemma4::open },
    Registration {
        model_types: &["qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"],
        open: qwen3_next::open,
    },
    Registration { model_types: &["mixtral"], open: mixtral::open },
    Registration { model_types: &["glm4_moe"], open: glm4_moe::open },
    Registration {
        model_types: &["deepseek_v3", "kimi_k2", "joyai_llm_flash", "glm4_moe_lite"],
        open: deepseek::open,
    },
    Registration { model_types: &["olmo2"], open: olmo2::open },
    Registration { model_types: &["lfm2"], open: lfm2::open },
    Registration { model_types: &["granite"], open: granite::open },
    Registration { model_types: &["nemotron_h"], open: nemotron_h::open },
];

/// A model of several parts whose text part has a `model_type` of its own, and the default of that.
const MIXED: (&str, &str) = ("mistral3", "mistral");

/// Returns the values of `model_type` that can be loaded.
pub(crate) fn model_types() -> Vec<&'static str> {
    let plain = REGISTRY.iter().flat_map(|architecture| architecture.model_types).copied();
    plain.chain([MIXED.0]).collect()
}

/// Reads the text part of a config.json and returns a loader of the model's tensors.
pub(crate) fn open(config: &Value, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let Some(model_type) = config.get("model_type").and_then(Value::as_str) else {
        return Err(OpenError::Invalid("config.json has no model_type".into()));
    };
    let own = match config.get("text_model_type") {
        None => MIXED.1,
        Some(Value::String(own)) => own.as_str(),
        Some(other) => {
            return Err(OpenError::Invalid(format!("config.json: text_config.model_type is {other}")));
        }
    };
    let model_type = if model_type == MIXED.0 { own } else { model_type };
    let architecture = REGISTRY.iter().find(|known| known.model_types.contains(&model_type));
    let Some(architecture) = architecture else {
        return Err(OpenError::Unsupported(format!("model_type {model_type:?}")));
    };
    let given = Given::new(config)?;
    let loading = (architecture.open)(&given, setup)?;
    Ok(Box::new(Blaming { loading, silent: given.silent() }))
}
