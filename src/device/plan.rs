//! Decides how a model is loaded, from its config and the headers of its files: the dtype, whether quantized
//! matrices are dequantized, and the bytes that it will take. Pure: nothing is read.
//!
//! Policy: on the CPU everything computes in float32, where quantized products are several times slower
//! than dense ones with a good BLAS, so matrices are dequantized when that fits. GPUs compute as stored.

use std::collections::BTreeSet;

use mlx_rs::Dtype;
use serde_json::Value;

use crate::backend::{ComputeDtype, KvDtype, LoadPlan, LoadSpec};
use crate::error::Error;
use crate::hub::{Dtype as Stored, WeightIndex};
use crate::mlx::kernels::Selection;
use crate::mlx::tensors::Policy;
use crate::models::{self, Loading, OpenError, Setup};

/// Elements and bytes of the weights, dense and as stored.
#[derive(Clone, Copy, Debug, Default)]
struct Sizes {
    /// Elements of quantized matrices.
    dense_elements: u64,
    /// Bytes of quantized matrices as stored.
    packed_bytes: u64,
    /// Elements of tensors that are stored as floats.
    plain_elements: u64,
    /// Elements of scales and biases.
    side_elements: u64,
}

/// Plans a load with `free_bytes` available.
pub(crate) fn plan(spec: &LoadSpec, on_cpu: bool, free_bytes: u64) -> LoadPlan {
    let sizes = Sizes::of(&spec.files().weights, &spec.files().text_config);
    let dtype = match spec.dtype {
        ComputeDtype::Auto if on_cpu => ComputeDtype::Float32,
        ComputeDtype::Auto => stored_float(&spec.files().weights),
        given => given,
    };
    let item = if dtype == ComputeDtype::Float32 { 4 } else { 2 };
    let dense_bytes = (sizes.dense_elements + sizes.plain_elements) * item;
    let packed_bytes = sizes.packed_bytes + (sizes.plain_elements + sizes.side_elements) * item;
    let quantized = sizes.packed_bytes > 0;
    let dequantize = quantized && on_cpu && dense_bytes <= free_bytes;
    let needed_bytes = if dequantize || !quantized { dense_bytes } else { packed_bytes };
    LoadPlan { spec: spec.clone(), dtype, dequantize, needed_bytes }
}

/// Returns how the weights become arrays.
pub(crate) fn policy(plan: &LoadPlan, kernels: Selection) -> Policy {
    let float = match plan.dtype {
        ComputeDtype::Auto | ComputeDtype::Float32 => Dtype::Float32,
        ComputeDtype::Bfloat16 => Dtype::Bfloat16,
        ComputeDtype::Float16 => Dtype::Float16,
    };
    Policy { float, dequantize: plan.dequantize, kernels: kernels.set(float) }
}

/// Returns the architecture, ready to take tensors.
pub(crate) fn open(spec: &LoadSpec, policy: Policy) -> Result<Box<dyn Loading>, Error> {
    let setup = Setup { dtype: policy.float, kernels: policy.kernels, int8_kv: spec.kv == KvDtype::Int8 };
    models::open(&spec.files().text_config, setup).map_err(|error| match error {
        OpenError::Unsupported(why) => Error::ModelUnsupported { model: spec.model().clone(), why },
        OpenError::Invalid(why) => Error::ModelInvalid { model: spec.model().clone(), why },
    })
}

/// Describes the arithmetic for people.
pub(crate) fn computes_in(plan: &LoadPlan) -> String {
    let float = match plan.dtype {
        ComputeDtype::Auto | ComputeDtype::Float32 => "float32",
        ComputeDtype::Bfloat16 => "bfloat16",
        ComputeDtype::Float16 => "float16",
    };
    let quantized = Sizes::of(&plan.spec.files().weights, &plan.spec.files().text_config).packed_bytes > 0;
    let weights = match (quantized, plan.dequantize) {
        (true, true) => ", dequantized at load",
        (true, false) => ", quantized weights",
        (false, _) => "",
    };
    let kv = if plan.spec.kv == KvDtype::Int8 { ", 8-bit KV cache" } else { "" };
    format!("{float}{weights}{kv}")
}

impl Sizes {
    fn of(weights: &WeightIndex, config: &Value) -> Self {
        let mut sizes = Self::default();
        let scaled: BTreeSet<&str> =
            weights.tensors().filter_map(|tensor| tensor.name.strip_suffix(".scales")).collect();
        for tensor in weights.tensors() {
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

/// Returns the bits of an element of a module, by the config: for the plan; the load goes by shapes.
fn bits_of(config: &Value, module: &str) -> u64 {
    let quantization = config.get("quantization").or_else(|| config.get("quantization_config"));
    let bits =
        |value: &Value| value.get("bits").and_then(Value::as_u64).filter(|bits| (2..=8).contains(bits));
    let own = quantization.and_then(|q| q.get(module)).and_then(bits);
    own.or_else(|| quantization.and_then(bits)).unwrap_or(4)
}

/// Returns the dtype of most of the stored floats, by bytes.
fn stored_float(weights: &WeightIndex) -> ComputeDtype {
    let mut bytes = [(ComputeDtype::Bfloat16, 0), (ComputeDtype::Float16, 0), (ComputeDtype::Float32, 0)];
    for tensor in weights.tensors() {
        let dtype = match tensor.dtype {
            Stored::BF16 => 0,
            Stored::F16 => 1,
            Stored::F32 => 2,
            _ => continue,
        };
        bytes[dtype].1 += tensor.bytes;
    }
    bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or(ComputeDtype::Float32, |(dtype, _)| dtype)
}
