//! The plan of a load, from the files' headers and the config before a tensor is read: the dtype, whether
//! quantized matrices are dequantized, and the bytes that the weights take.
//!
//! Policy: on the CPU everything computes in float32, where quantized products are several times slower than
//! dense ones with a good BLAS, so matrices are dequantized when that fits. GPUs compute as stored.

use std::collections::BTreeSet;

use mlx_rs::Dtype;
use serde_json::Value;

use crate::backend::{ComputeDtype, KvDtype, LoadSpec};
use crate::error::Error;
use crate::hub::{self, Dtype as Stored};
use crate::ids::ModelName;
use crate::mlx::kernels::Selection;
use crate::mlx::tensors::Policy;
use crate::models::{self, Loading, OpenError, Setup};

/// A load, planned.
#[derive(Debug)]
pub(crate) struct LoadPlan {
    spec: LoadSpec,
    config: Value,
    files: hub::Weights,
    quantized: bool,
    pub(crate) policy: Policy,
    /// Bytes that the weights will take.
    pub(crate) weight_bytes: u64,
    /// Bytes of the files.
    pub(crate) file_bytes: u64,
    pub(crate) context_length: u32,
    pub(crate) vocabulary_size: u32,
}

/// Elements of the weights and bytes of them, dense and as stored.
#[derive(Clone, Copy, Debug, Default)]
struct Sizes {
    dense_elements: u64,
    packed_bytes: u64,
    /// Floats that stay floats: dense tensors, and scales and biases.
    plain_elements: u64,
    side_elements: u64,
}

impl LoadPlan {
    /// Checks the files and decides, given `free_bytes`.
    pub(crate) fn new(spec: &LoadSpec, kernels: Selection, free_bytes: u64) -> Result<Self, Error> {
        let on_cpu = kernels.on_cpu;
        let blame = |error: hub::HubError| error.into_error(&spec.model);
        let files = hub::inspect(&spec.folder).map_err(blame)?;
        let config = hub::text_part(&hub::read_config(&spec.folder).map_err(blame)?);
        let sizes = Sizes::of(&files, &config);
        let float = match spec.dtype {
            ComputeDtype::Auto if on_cpu => Dtype::Float32,
            ComputeDtype::Auto => stored_float(&files),
            ComputeDtype::Float32 => Dtype::Float32,
            ComputeDtype::Bfloat16 => Dtype::Bfloat16,
            ComputeDtype::Float16 => Dtype::Float16,
        };
        let item = if float == Dtype::Float32 { 4 } else { 2 };
        let dense_bytes = (sizes.dense_elements + sizes.plain_elements) * item;
        let packed_bytes = sizes.packed_bytes + (sizes.plain_elements + sizes.side_elements) * item;
        let quantized = sizes.packed_bytes > 0;
        let dequantize = quantized && on_cpu && dense_bytes <= free_bytes;
        let number = |key: &str| config.get(key).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
        Ok(Self {
            weight_bytes: if dequantize || !quantized { dense_bytes } else { packed_bytes },
            file_bytes: files.bytes,
            context_length: number("max_position_embeddings").filter(|&n| n > 0).unwrap_or(CONTEXT_DEFAULT),
            vocabulary_size: number("vocab_size").unwrap_or(0),
            policy: Policy { float, dequantize, kernels: kernels.set(float) },
            spec: spec.clone(),
            config,
            files,
            quantized,
        })
    }

    /// The model's name.
    pub(crate) fn model(&self) -> &ModelName {
        &self.spec.model
    }

    /// Returns the files with tensors.
    pub(crate) fn files(&self) -> impl Iterator<Item = &std::path::Path> {
        self.files.files.iter().map(|file| file.path.as_path())
    }

    /// Returns the architecture, ready to take tensors.
    pub(crate) fn open(&self) -> Result<Box<dyn Loading>, Error> {
        let int8_kv = self.spec.kv == KvDtype::Int8;
        let setup = Setup { dtype: self.policy.float, kernels: self.policy.kernels, int8_kv };
        models::open(&self.config, setup).map_err(|error| match error {
            OpenError::Unsupported(why) => Error::ModelUnsupported { model: self.spec.model.clone(), why },
            OpenError::Invalid(why) => Error::ModelInvalid { model: self.spec.model.clone(), why },
        })
    }

    /// Describes how the model computes, for people.
    pub(crate) fn computes_in(&self) -> String {
        let float = match self.policy.float {
            Dtype::Float32 => "float32",
            Dtype::Bfloat16 => "bfloat16",
            _ => "float16",
        };
        let weights = match (self.quantized, self.policy.dequantize) {
            (true, true) => ", dequantized at load",
            (true, false) => ", quantized weights",
            (false, _) => "",
        };
        let kv = if self.spec.kv == KvDtype::Int8 { ", 8-bit KV cache" } else { "" };
        format!("{float}{weights}{kv}")
    }
}

/// Context of a model whose config does not name one.
const CONTEXT_DEFAULT: u32 = 4096;

impl Sizes {
    fn of(files: &hub::Weights, config: &Value) -> Self {
        let mut sizes = Self::default();
        let scaled: BTreeSet<&str> =
            files.tensors().filter_map(|tensor| tensor.name.strip_suffix(".scales")).collect();
        for tensor in files.tensors() {
            let elements = tensor.shape.iter().map(|&size| size as u64).product::<u64>();
            let module = tensor.name.rsplit_once('.').map_or("", |(module, _)| module);
            let is = |ending: &str| tensor.name.ends_with(ending) && scaled.contains(module);
            if is(".scales") || is(".biases") {
                sizes.side_elements += elements;
            } else if is(".weight") {
                sizes.packed_bytes += tensor.bytes;
                sizes.dense_elements += tensor.bytes * 8 / bits_of(config, module);
            } else {
                sizes.plain_elements += elements;
            }
        }
        sizes
    }
}

/// Returns the bits of a module's elements by the config, for the estimate; the load goes by shapes.
fn bits_of(config: &Value, module: &str) -> u64 {
    let quantization = config.get("quantization").or_else(|| config.get("quantization_config"));
    let bits =
        |value: &Value| value.get("bits").and_then(Value::as_u64).filter(|bits| (2..=8).contains(bits));
    let own = quantization.and_then(|q| q.get(module)).and_then(bits);
    own.or_else(|| quantization.and_then(bits)).unwrap_or(4)
}

/// Returns the dtype of most of the stored floats, by bytes.
fn stored_float(files: &hub::Weights) -> Dtype {
    let mut bytes = [(Dtype::Bfloat16, 0), (Dtype::Float16, 0), (Dtype::Float32, 0)];
    for tensor in files.tensors() {
        let dtype = match tensor.dtype {
            Stored::BF16 => 0,
            Stored::F16 => 1,
            Stored::F32 => 2,
            _ => continue,
        };
        bytes[dtype].1 += tensor.bytes;
    }
    bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or(Dtype::Float32, |(dtype, _)| dtype)
}
