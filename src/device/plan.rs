//! Decides how a model is loaded, from its config and the headers of its files: the dtype, whether quantized
//! matrices are dequantized, and the bytes that it will take. Pure: nothing is read, and what depends on the
//! tensors was counted when their headers were read.
//!
//! Policy: on the CPU everything computes in float32, where quantized products are several times slower
//! than dense ones with a good BLAS, so matrices are dequantized when that fits. GPUs compute as stored.

use mlx_rs::Dtype;

use crate::backend::{ComputeDtype, KvDtype, LoadPlan, LoadSpec};
use crate::error::Error;
use crate::hub::{Dtype as Stored, WeightSizes};
use crate::mlx::kernels::Selection;
use crate::mlx::tensors::Policy;
use crate::models::{self, Loading, OpenError, Setup};

/// Plans a load with `free_bytes` available.
pub(crate) fn plan(spec: &LoadSpec, on_cpu: bool, free_bytes: u64) -> LoadPlan {
    let sizes = &spec.files().sizes;
    let dtype = match spec.dtype {
        ComputeDtype::Auto if on_cpu => ComputeDtype::Float32,
        ComputeDtype::Auto => stored_float(sizes),
        given => given,
    };
    let item = if dtype == ComputeDtype::Float32 { 4 } else { 2 };
    let dense_bytes = (sizes.dense_elements + sizes.plain_elements) * item;
    let packed_bytes = sizes.packed_bytes + (sizes.plain_elements + sizes.side_elements) * item;
    let quantized = sizes.packed_bytes > 0;
    let dequantize = quantized && on_cpu && dense_bytes <= free_bytes;
    let needed_bytes = if dequantize || !quantized { dense_bytes } else { packed_bytes };
    LoadPlan { spec: spec.clone(), dtype, dequantize, needed_bytes, kv_bytes: 0 }
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
    let quantized = plan.spec.files().sizes.packed_bytes > 0;
    let weights = match (quantized, plan.dequantize) {
        (true, true) => ", dequantized at load",
        (true, false) => ", quantized weights",
        (false, _) => "",
    };
    let kv = if plan.spec.kv == KvDtype::Int8 { ", 8-bit KV cache" } else { "" };
    format!("{float}{weights}{kv}")
}

/// Returns the dtype of most of the stored floats.
fn stored_float(sizes: &WeightSizes) -> ComputeDtype {
    match sizes.float {
        Some(Stored::BF16) => ComputeDtype::Bfloat16,
        Some(Stored::F16) => ComputeDtype::Float16,
        _ => ComputeDtype::Float32,
    }
}
