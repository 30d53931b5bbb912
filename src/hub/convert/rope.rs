//! Rotary embeddings' scaling. Linear scaling is a number of the metadata. That of Llama 3.1 and later is
//! only there as a tensor of one factor for each pair of a head; the four numbers behind it are found again
//! and kept only if they give that very tensor.

use serde_json::{Value, json};

use super::super::HubError;
use super::blocks::Kind;
use super::gguf::{Gguf, single};

/// The tensor of factors.
pub(super) const FACTORS: &str = "rope_freqs.weight";

/// What every Llama 3.1, 3.2 and 3.3 has: `low_freq_factor`, `high_freq_factor` and the context length it was
/// trained with at first. Only the factor differs (8 or 32).
const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;
const ORIGINAL: f64 = 8192.0;

/// Factors are stored as f32 and are computed by the converter in f32.
const TOLERANCE: f64 = 1e-4;

/// The config's `rope_scaling`.
pub(super) fn scaling(gguf: &Gguf, head_dim: usize, rope_base: f64) -> Result<Value, HubError> {
    let kind = gguf.text("llama.rope.scaling.type")?.unwrap_or("none");
    let factor = match gguf.float("llama.rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => gguf.float("llama.rope.scale_linear")?,
    };
    let factors = factors(gguf, head_dim / 2)?;
    match (kind, factor, factors) {
        ("none", None, None) => Ok(Value::Null),
        // A factor of 1 scales nothing; old converters always wrote it.
        ("none" | "linear", Some(1.0), None) => Ok(Value::Null),
        ("none" | "linear", Some(factor), None) => {
            Ok(json!({"rope_type": "linear", "type": "linear", "factor": single(factor)}))
        }
        ("none", None, Some(factors)) => llama3(&factors, head_dim, rope_base),
        (kind, _, factors) => {
            let beside = if factors.is_some() { " with factors" } else { "" };
            Err(HubError::unsupported(format!("the rope scaling {kind:?}{beside} cannot be converted")))
        }
    }
}

fn factors(gguf: &Gguf, pairs: usize) -> Result<Option<Vec<f64>>, HubError> {
    let Some(tensor) = gguf.tensors.get(FACTORS) else {
        return Ok(None);
    };
    if tensor.kind != Kind::F32 || tensor.dims != [pairs] {
        return Err(gguf.damaged(format!("tensor {FACTORS} is not {pairs} numbers in f32")));
    }
    let mut bytes = vec![0; pairs * 4];
    gguf.read(tensor.offset, &mut bytes)?;
    let numbers = bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    Ok(Some(numbers.collect()))
}

fn llama3(factors: &[f64], head_dim: usize, rope_base: f64) -> Result<Value, HubError> {
    let factor = factors.iter().copied().fold(1.0, f64::max).round();
    let mut inverse = 1.0;
    let step = rope_base.powf(2.0 / head_dim as f64);
    let same = factors.iter().all(|&stored| {
        let expected = llama3_factor(2.0 * std::f64::consts::PI * inverse, factor);
        inverse *= step;
        (stored - expected).abs() <= TOLERANCE * expected
    });
    if !same {
        return Err(HubError::unsupported(format!("{FACTORS} is not the rope scaling of a Llama 3.x")));
    }
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": 8192,
    }))
}

/// How much slower a pair rotates, by its wavelength in tokens (transformers' modeling_rope_utils.py,
/// `_compute_llama3_parameters`).
fn llama3_factor(wavelength: f64, factor: f64) -> f64 {
    if wavelength < ORIGINAL / HIGH {
        1.0
    } else if wavelength > ORIGINAL / LOW {
        factor
    } else {
        let smooth = (ORIGINAL / wavelength - LOW) / (HIGH - LOW);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}
