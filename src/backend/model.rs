//! Models as engine and device name them: what to load, how far a load is, and the facts of a model that can
//! run.

use std::sync::Arc;

use crate::hub::{ModelAssets, ModelFiles};
use crate::ids::ModelName;
use crate::quantize::Quantization;

/// Number of a resident or loading model, given by its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelId(pub u32);

/// Facts of a model that is ready to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Most tokens of a sequence.
    pub context_length: u32,
    /// Number of tokens in the vocabulary.
    pub vocabulary_size: u32,
    /// KV bytes of one token, all layers together.
    pub kv_bytes_per_token: u64,
    /// Bytes of a sequence's recurrent states, independent of its length; 0 if no layer is recurrent. A cache
    /// with recurrent states cannot be cut back to fewer tokens, except to a checkpoint.
    pub state_bytes: u64,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Number of parameters.
    pub parameter_count: u64,
    /// Smallest efficient prefill of a step, in tokens; smaller ones take about as long.
    pub prefill_tokens_min: u32,
    /// Whether the device prepares something, such as kernels, when a step first has some number of rows.
    pub prepares_steps: bool,
    /// Description of how it computes, for people.
    pub computes_in: String,
}

/// Progress of a load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadStep {
    /// Weights are being read.
    Reading {
        /// Bytes of the files that were read.
        done_bytes: u64,
        /// Bytes of all files.
        total_bytes: u64,
    },
    /// A piece is still being read; nothing waits for it.
    Pending,
    /// The model can run.
    Ready(ModelShape),
}

/// The float type that a model computes with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ComputeDtype {
    /// float32 on the CPU, as stored on a GPU.
    #[default]
    Auto,
    /// 32-bit floats.
    Float32,
    /// bfloat16.
    Bfloat16,
    /// IEEE half precision.
    Float16,
}

/// The element type of a KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// As the configuration says.
    #[default]
    Auto,
    /// As the model computes.
    Compute,
    /// 8-bit integers, with a scale for each token and head.
    Int8,
}

/// A model to make resident.
#[derive(Clone, Debug)]
pub struct LoadSpec {
    /// Its files, already read, and its tokenizer.
    pub assets: Arc<ModelAssets>,
    /// Float type to compute with.
    pub dtype: ComputeDtype,
    /// Element type of its KV cache.
    pub kv: KvDtype,
    /// How matrices that are stored as floats are quantized while they are read; None: not at all.
    pub quantize: Option<Quantization>,
}

impl LoadSpec {
    /// Returns the model's name.
    #[must_use]
    pub fn model(&self) -> &ModelName {
        &self.files().name
    }

    /// Returns the model's files.
    #[must_use]
    pub fn files(&self) -> &ModelFiles {
        &self.assets.files
    }
}

/// A load, decided by [`super::Backend::plan`] and carried out by [`super::Backend::load`].
#[derive(Clone, Debug)]
pub struct LoadPlan {
    /// The model.
    pub spec: LoadSpec,
    /// Float type to compute with; not `Auto`.
    pub dtype: ComputeDtype,
    /// Whether quantized matrices are dequantized at load.
    pub dequantize: bool,
    /// Bytes that the weights will take.
    pub needed_bytes: u64,
    /// Bytes of the KV cache that there must be room for besides, so that a first request can run.
    pub kv_bytes: u64,
}
