//! Rotary embeddings' scaling. Linear scaling is a number of the metadata. That of Llama 3.1 and later is
//! only there as a tensor of one factor for each pair of a head; the four numbers behind it are found again
//! and kept only if they give that very tensor. Phi-3 has one tensor for short contexts and one for long.

use serde_json::{Value, json};

use super::super::HubError;
use super::gguf::{Gguf, single};
use super::numbers::{Family, Numbers};

/// The tensor of factors of Llama 3.1 and later.
const FACTORS: &str = "rope_freqs.weight";

/// Those of Phi-3.
const LONG: &str = "rope_factors_long.weight";
const SHORT: &str = "rope_factors_short.weight";

/// Tensors that belong to a rotation.
pub(super) const TENSORS: [&str; 3] = [FACTORS, LONG, SHORT];

/// What every Llama 3.1, 3.2 and 3.3 has: `low_freq_factor`, `high_freq_factor` and the context length it was
/// trained with at first. Only the factor differs (8 or 32).
const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;
const ORIGINAL: f64 = 8192.0;

/// Factors are stored as f32 and are computed by the converter in f32.
const TOLERANCE: f64 = 1e-4;

/// The config's `rope_scaling`.
pub(super) fn scaling(gguf: &Gguf, numbers: &Numbers) -> Result<Value, HubError> {
    let key = |name: &str| format!("{}.rope.{name}", numbers.architecture);
    let kind = gguf.text(&key("scaling.type"))?.unwrap_or("none");
    let factor = match gguf.float(&key("scaling.factor"))? {
        Some(factor) => Some(factor),
        None => gguf.float(&key("scale_linear"))?,
    };
    let pairs = numbers.rotated / 2;
    if kind == "yarn" {
        const OTHERS: [&str; 6] = [
            "attn_factor",
            "yarn_attn_factor",
            "yarn_beta_fast",
            "yarn_beta_slow",
            "yarn_ext_factor",
            "yarn_log_multiplier",
        ];
        let named =
            |name: &&&str| matches!(gguf.float(&key(&format!("scaling.{name}"))), Ok(Some(_)) | Err(_));
        if let Some(name) = OTHERS.iter().find(named) {
            return Err(HubError::unsupported(format!("a rope scaling with {name} cannot be converted")));
        }
    }
    if numbers.family == Family::Phi3 {
        let stretch = gguf.float(&key("scaling.attn_factor"))?;
        return longrope(gguf, numbers, (kind, factor), stretch);
    }
    if let Some(name) = gguf.tensors.keys().find(|name| [LONG, SHORT].contains(&name.as_str())) {
        return Err(HubError::unsupported(format!("tensor {name} has no place in such a model")));
    }
    match (kind, factor, gguf.numbers(FACTORS, pairs)?) {
        ("none", None, None) => Ok(Value::Null),
        // A factor of 1 scales nothing; old converters always wrote it.
        ("none" | "linear", Some(1.0), None) => Ok(Value::Null),
        ("none" | "linear", Some(factor), None) => {
            Ok(json!({"rope_type": "linear", "type": "linear", "factor": single(factor)}))
        }
        ("yarn", Some(factor), None) if numbers.family != Family::Gemma3 => Ok(json!({
            "rope_type": "yarn",
            "type": "yarn",
            "factor": single(factor),
            "original_max_position_embeddings": numbers.rope_original,
        })),
        ("none", None, Some(factors)) if numbers.family == Family::Llama => {
            llama3(&factors, numbers.head_dim, numbers.rope_base)
        }
        (kind, _, factors) => {
            let beside = if factors.is_some() { " with factors" } else { "" };
            Err(HubError::unsupported(format!("the rope scaling {kind:?}{beside} cannot be converted")))
        }
    }
}

/// The scaling of Phi-3: a factor for each pair, for short and for long contexts. The factor of the rotated
/// elements must be the one that follows from the lengths, since no config can say another.
fn longrope(
    gguf: &Gguf,
    numbers: &Numbers,
    (kind, factor): (&str, Option<f64>),
    stretch: Option<f64>,
) -> Result<Value, HubError> {
    let pairs = numbers.rotated / 2;
    let plain = matches!(kind, "none" | "linear" | "longrope") && factor.unwrap_or(1.0) == 1.0;
    let (long, short) = (gguf.numbers(LONG, pairs)?, gguf.numbers(SHORT, pairs)?);
    let (original, context) = (numbers.rope_original as f64, numbers.context_length as f64);
    let ratio = context / original;
    let expected = if ratio > 1.0 { (1.0 + ratio.ln() / original.ln()).sqrt() } else { 1.0 };
    match (long, short) {
        (None, None) if plain => Ok(Value::Null),
        (Some(long), Some(short)) if plain => {
            if stretch.is_some_and(|stretch| (stretch - expected).abs() > 1e-3) {
                return Err(HubError::unsupported("a rope scaling whose attn_factor is not longrope's"));
            }
            let numbers = |factors: Vec<f64>| factors.into_iter().map(single).collect::<Vec<f64>>();
            Ok(json!({
                "rope_type": "longrope",
                "type": "longrope",
                "long_factor": numbers(long),
                "short_factor": numbers(short),
            }))
        }
        _ => Err(HubError::unsupported(format!("the rope scaling {kind:?} of a phi3 cannot be converted"))),
    }
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
