//! Decides how a model is loaded, from its config and the headers of its files: the dtype, whether quantized
//! matrices are dequantized, and the bytes that it will take. Pure: nothing is read, and what depends on the
//! tensors was counted by whoever wants the load.
//!
//! Policy: on the CPU everything computes in float32, where quantized products are several times slower
//! than dense ones with a good BLAS, so matrices are dequantized when that fits. GPUs compute as stored.

use mlx_rs::{Dtype, Stream};

use crate::backend::{ComputeDtype, Formats, KvDtype, LoadPlan, LoadSpec};
use crate::error::Error;
use crate::hub::{Dtype as Stored, ModelFiles, WeightSizes};
use crate::mlx::kernels::Selection;
use crate::mlx::tensors::{Policy, Quantizing};
use crate::models::{self, Loading, OpenError, Setup};
use crate::quantize::QuantRule;

/// Tokens of a first request: a model is loaded only where their KV cache has room beside it.
const KV_RESERVE_TOKENS: u32 = 1024;

/// Largest part of the weights that this cache counts as: of a model that is all cache, less is room enough.
const KV_RESERVE_PART: u64 = 8;

/// Plans a load with `free_bytes` available.
///
/// # Errors
/// The model's config is one that cannot be loaded.
pub(crate) fn plan(spec: &LoadSpec, kernels: Selection, free_bytes: u64) -> Result<LoadPlan, Error> {
    let on_cpu = kernels.on_cpu;
    let LoadSpec { formats, sizes, .. } = spec;
    let dtype = match formats.dtype {
        ComputeDtype::Auto if on_cpu => ComputeDtype::Float32,
        ComputeDtype::Auto => stored_float(sizes),
        given => given,
    };
    let item = if dtype == ComputeDtype::Float32 { 4 } else { 2 };
    let dense_bytes = (sizes.dense_elements + sizes.plain_elements) * item;
    let packed_bytes = sizes.packed_bytes + (sizes.plain_elements + sizes.side_elements) * item;
    let quantized = sizes.packed_bytes > 0;
    let packed = LoadPlan {
        spec: LoadSpec { formats: Formats { dtype, ..*formats }, ..spec.clone() },
        dequantize: false,
        needed_bytes: if quantized { packed_bytes } else { dense_bytes },
        kv_bytes: 0,
    };
    let kv_bytes = first_kv_bytes(&packed, kernels)?;
    if quantized && on_cpu && dense_bytes.saturating_add(kv_bytes) <= free_bytes {
        return Ok(LoadPlan { dequantize: true, needed_bytes: dense_bytes, kv_bytes, ..packed });
    }
    Ok(LoadPlan { kv_bytes, ..packed })
}

/// Returns the bytes of a first request's KV cache.
fn first_kv_bytes(plan: &LoadPlan, kernels: Selection) -> Result<u64, Error> {
    let shape = open(&plan.spec, policy(plan, kernels))?.kv_shape();
    let tokens = plan.spec.files().facts.context_length.min(KV_RESERVE_TOKENS);
    let kv_bytes = shape.bytes_per_token() * u64::from(tokens) + shape.bytes_per_sequence();
    Ok(kv_bytes.min(plan.needed_bytes / KV_RESERVE_PART))
}

/// Returns how the weights become arrays.
pub(crate) fn policy(plan: &LoadPlan, kernels: Selection) -> Policy {
    let float = match plan.spec.formats.dtype {
        ComputeDtype::Auto | ComputeDtype::Float32 => Dtype::Float32,
        ComputeDtype::Bfloat16 => Dtype::Bfloat16,
        ComputeDtype::Float16 => Dtype::Float16,
    };
    Policy { float, dequantize: plan.dequantize, kernels: kernels.set(float) }
}

/// Returns the dtype of floats that a config names, by the rule of mlx-lm (convert.py): `torch_dtype`, or
/// `dtype` of the text part.
pub(crate) fn named_dtype(files: &ModelFiles) -> Option<Dtype> {
    let of_text = || files.config.get("text_config").map(|text| &text["dtype"]);
    let named = Some(&files.config["torch_dtype"]).filter(|named| !named.is_null()).or_else(of_text);
    match named.and_then(serde_json::Value::as_str) {
        Some("float32") => Some(Dtype::Float32),
        Some("float16") => Some(Dtype::Float16),
        Some("bfloat16") => Some(Dtype::Bfloat16),
        Some(_) | None => None,
    }
}

/// Returns how matrices are quantized while they are read, on a stream of the CPU, where a conversion does it
/// too.
pub(crate) fn quantizing(plan: &LoadPlan, layers: usize, on: &Stream) -> Option<Quantizing> {
    let files = plan.spec.files();
    let asked = plan.spec.formats.quantize?;
    let model_type = files.facts.architecture.clone();
    Some(Quantizing {
        rule: QuantRule::new(asked, &model_type, layers),
        dtype: named_dtype(files),
        keeps_dtype: Box::new(move |name| models::keeps_dtype(&model_type, name)),
        on: on.clone(),
    })
}

/// Returns the architecture, ready to take tensors.
pub(crate) fn open(spec: &LoadSpec, policy: Policy) -> Result<Box<dyn Loading>, Error> {
    let setup =
        Setup { dtype: policy.float, kernels: policy.kernels, int8_kv: spec.formats.kv == KvDtype::Int8 };
    models::open(&spec.files().text_config, setup).map_err(|error| match error {
        OpenError::Unsupported(why) => Error::ModelUnsupported { model: spec.model().clone(), why },
        OpenError::Invalid(why) => Error::ModelInvalid { model: spec.model().clone(), why },
    })
}

/// Describes the arithmetic for people.
pub(crate) fn computes_in(plan: &LoadPlan) -> String {
    let float = match plan.spec.formats.dtype {
        ComputeDtype::Auto | ComputeDtype::Float32 => "float32",
        ComputeDtype::Bfloat16 => "bfloat16",
        ComputeDtype::Float16 => "float16",
    };
    let quantized = plan.spec.files().sizes.packed_bytes > 0;
    let weights = match (plan.spec.formats.quantize, quantized, plan.dequantize) {
        (Some(asked), _, true) => format!(", quantized to {asked}, and dequantized at load"),
        (Some(asked), _, false) => format!(", quantized to {asked} at load"),
        (None, true, true) => ", dequantized at load".into(),
        (None, true, false) => ", quantized weights".into(),
        (None, false, _) => String::new(),
    };
    let kv = if plan.spec.formats.kv == KvDtype::Int8 { ", 8-bit KV cache" } else { "" };
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
