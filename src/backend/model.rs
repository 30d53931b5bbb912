//! Models as engine and device name them: what to load, how far a load is, and the facts of a model that can
//! run.

use std::sync::Arc;

use super::KvLayout;
use crate::error::Error;
use crate::hub::{ContentHash, ModelAssets, ModelFiles, WeightSizes};
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
    /// The arrays of its KV caches.
    pub kv_layout: Arc<KvLayout>,
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
    /// The config and weights that were loaded.
    pub content: ContentHash,
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
    /// Files are still being opened; another load may be read meanwhile.
    Opening,
    /// A piece is still being read, or what was unloaded is not free yet; nothing waits for it.
    Pending,
    /// The system has less memory than was planned. Nothing was read.
    Short {
        /// Bytes that it would give.
        available_bytes: u64,
    },
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

/// The number formats of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Formats {
    /// Float type to compute with; in a wish `Auto` takes any.
    pub dtype: ComputeDtype,
    /// Element type of its KV cache; in a wish `Auto` takes any.
    pub kv: KvDtype,
    /// How matrices that are stored as floats are quantized while they are read; in a wish None takes any.
    pub quantize: Option<Quantization>,
}

/// A model to make resident.
#[derive(Clone, Debug)]
pub struct LoadSpec {
    /// Its files, already read, and its tokenizer.
    pub assets: Arc<ModelAssets>,
    /// Its number formats.
    pub formats: Formats,
    /// Sizes of its weights in these formats, by which the load is planned.
    pub sizes: WeightSizes,
}

impl LoadSpec {
    /// Returns the wish for a model. Counts its tensors if they are to be quantized, which takes a while.
    ///
    /// # Errors
    /// `ModelUnsupported`: the recipe does not fit the model.
    pub fn new(assets: Arc<ModelAssets>, formats: Formats) -> Result<Self, Error> {
        let files = &assets.files;
        let sizes = match formats.quantize {
            None => files.sizes,
            Some(asked) => files.quantized_sizes(asked).map_err(|error| Error::ModelUnsupported {
                model: files.name.clone(),
                why: error.to_string(),
            })?,
        };
        Ok(Self { assets, formats, sizes })
    }

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
    /// The model; the float type to compute with is decided, and not `Auto`.
    pub spec: LoadSpec,
    /// Whether quantized matrices are dequantized at load.
    pub dequantize: bool,
    /// Bytes that the weights will take.
    pub needed_bytes: u64,
    /// Bytes of the KV cache that there must be room for besides, so that a first request can run.
    pub kv_bytes: u64,
}

impl LoadPlan {
    /// Returns the bytes that must be free for it.
    #[must_use]
    pub fn reserved_bytes(&self) -> u64 {
        self.needed_bytes.saturating_add(self.kv_bytes)
    }
}
