//! Architectures, one file each, and the registry that names them. An architecture reads its part of
//! config.json, takes its tensors piece by piece, and runs packed tokens.

mod llama;

use mlx_rs::Array;
use serde_json::Value;

use crate::device::batch::Batch;
use crate::device::kv::{Kv, KvShape};
use crate::device::layers::Ops;
use crate::device::weights::Weights;
use crate::error::Error;

/// A model that can run.
pub(crate) trait Model {
    /// Runs packed tokens through all layers, writing their keys and values; returns the logits
    /// `[rows, vocabulary]` of the batch's output rows, or None if it has none.
    fn forward(&self, batch: &Batch, kv: &mut Kv) -> mlx_rs::error::Result<Option<Array>>;

    /// Every array of its weights.
    fn arrays(&self) -> Vec<&Array>;
}

/// A model that is being loaded.
pub(crate) trait Loading {
    /// Takes and evaluates the next piece; the model after the last one.
    fn next(&mut self, weights: &mut Weights) -> Result<Option<Box<dyn Model>>, Error>;

    /// What its KV cache looks like, but for the dtype.
    fn kv_shape(&self) -> KvShape;
}

/// Facts of the device and the request that an architecture needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    /// The dtype of activations and KV cache.
    pub(crate) dtype: mlx_rs::Dtype,
    /// How it computes beside matrix products.
    pub(crate) ops: Ops,
    /// Keep the KV cache as 8-bit integers.
    pub(crate) int8_kv: bool,
}

impl Setup {
    /// What computes attention with heads of this size.
    pub(crate) fn attention_ops(&self, head_dim: i32) -> Ops {
        self.ops.for_attention(head_dim, self.int8_kv)
    }
}

/// What a model's config says it needs that is not there, or is wrong in itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ConfigError {
    /// Not implemented.
    Unsupported(String),
    /// Missing, malformed or contradictory.
    Invalid(String),
}

type Open = fn(&Value, Setup) -> Result<Box<dyn Loading>, ConfigError>;

struct Architecture {
    /// The values of `model_type` it serves.
    model_types: &'static [&'static str],
    open: Open,
}

const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_types: &["llama", "mistral"], open: llama::open }];

/// The values of `model_type` that can be loaded.
pub(crate) fn model_types() -> Vec<&'static str> {
    ARCHITECTURES.iter().flat_map(|architecture| architecture.model_types).copied().collect()
}

/// Reads a config.json and gets ready to take the model's tensors.
pub(crate) fn open(config: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let Some(model_type) = config.get("model_type").and_then(Value::as_str) else {
        return Err(ConfigError::Invalid("config.json has no model_type".into()));
    };
    let architecture = ARCHITECTURES.iter().find(|known| known.model_types.contains(&model_type));
    let Some(architecture) = architecture else {
        return Err(ConfigError::Unsupported(format!("model_type {model_type:?}")));
    };
    (architecture.open)(config, setup)
}
