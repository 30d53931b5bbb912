//! Facts about a model that its files state before anything is loaded: from `config.json`,
//! `generation_config.json` and the headers of the weight files. Context length and vocabulary size are
//! computed here and nowhere else.

use std::collections::BTreeMap;

use safetensors::Dtype;
use serde_json::Value;

use super::{HubError, TensorInfo, WeightIndex, config_f64, text_default};
use crate::quantize::QuantMode;

/// Context length of a config that does not name one, as in transformers' `LlamaConfig`.
const CONTEXT_LENGTH_DEFAULT: u32 = 2048;

/// Facts about a model on disk.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelFacts {
    /// `model_type`.
    pub architecture: String,
    /// Tokens that a sequence may have: `max_position_embeddings`.
    pub context_length: u32,
    /// Tokens in the vocabulary: `vocab_size`.
    pub vocabulary_size: u32,
    /// Number of weights; a packed tensor counts its elements.
    pub parameter_count: u64,
    /// Storage format of the weights, for people.
    pub stored_as: String,
    /// Bytes of the tensors in the files.
    pub file_bytes: u64,
    /// Sampling values for the options that a request leaves unset.
    pub default_sampling: DefaultSampling,
}

/// Sampling values of `generation_config.json`. Without `do_sample: true` the model asks for greedy decoding,
/// and the temperature is 0. Values out of a request's range count as absent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DefaultSampling {
    /// Softmax temperature; 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass; 1 is off.
    pub top_p: f32,
    /// Number of candidates; 0 is off.
    pub top_k: u32,
    /// Smallest probability relative to the most likely token's; 0 is off.
    pub min_p: f32,
    /// Factor; 1 is off.
    pub repetition_penalty: f32,
    /// Mass of locally typical sampling; 1 is off.
    pub typical_p: f32,
}

/// Packing of quantized weights.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packing {
    bits: u64,
    group_size: u64,
    mode: String,
}

impl ModelFacts {
    /// Collects the facts from the text part of a config, the generation config and the index of tensors.
    ///
    /// # Errors
    /// `Damaged` if the config lacks a required value, `Unsupported` for a foreign quantization.
    pub(super) fn new(
        config: &Value,
        generation: Option<&Value>,
        weights: &WeightIndex,
    ) -> Result<Self, HubError> {
        let damaged = |why: &str| HubError::Damaged { file: "config.json".into(), why: why.into() };
        let count = |key: &str| config[key].as_u64().and_then(|count| u32::try_from(count).ok());
        let architecture = config["model_type"].as_str().ok_or_else(|| damaged("has no model_type"))?;
        let size = |key: &str, default: Option<u32>| match config.get(key) {
            None => text_default(architecture, key).or(default),
            Some(_) => count(key).filter(|size| *size > 0),
        };
        let vocabulary_size = size("vocab_size", None).ok_or_else(|| damaged("has no valid vocab_size"))?;
        let context_length = size("max_position_embeddings", Some(CONTEXT_LENGTH_DEFAULT))
            .ok_or_else(|| damaged("max_position_embeddings is not a length"))?;
        let quantization = &config["quantization"];
        refuse_unknown_quantization(quantization, &config["quantization_config"], weights)?;
        Ok(Self {
            architecture: architecture.to_owned(),
            context_length,
            vocabulary_size,
            parameter_count: parameter_count(weights, quantization),
            stored_as: stored_as(weights, quantization),
            file_bytes: weights.bytes,
            default_sampling: DefaultSampling::from_config(generation),
        })
    }
}

impl Default for DefaultSampling {
    /// Greedy.
    fn default() -> Self {
        let (temperature, top_p, top_k, min_p) = (0.0, 1.0, 0, 0.0);
        Self { temperature, top_p, top_k, min_p, repetition_penalty: 1.0, typical_p: 1.0 }
    }
}

impl DefaultSampling {
    fn from_config(config: Option<&Value>) -> Self {
        let number = |key: &str, low: f64, high: f64| {
            let value = config.and_then(|config| config_f64(&config[key]));
            value.filter(|value| (low..=high).contains(value))
        };
        #[allow(clippy::cast_possible_truncation, reason = "the range is far within f32's")]
        let float = |key: &str, low, high, unset| number(key, low, high).unwrap_or(unset) as f32;
        let samples = config.is_some_and(|config| config["do_sample"] == true);
        let top_k = config.and_then(|config| config["top_k"].as_u64());
        Self {
            temperature: if samples { float("temperature", 0.0, 100.0, 1.0) } else { 0.0 },
            top_p: float("top_p", f64::MIN_POSITIVE, 1.0, 1.0),
            top_k: top_k.and_then(|top_k| u32::try_from(top_k).ok()).unwrap_or(0),
            min_p: float("min_p", 0.0, 1.0, 0.0),
            repetition_penalty: float("repetition_penalty", 0.01, 100.0, 1.0),
            typical_p: float("typical_p", f64::MIN_POSITIVE, 1.0, 1.0),
        }
    }
}

impl Packing {
    fn read(value: &Value) -> Option<Self> {
        let mode = value["mode"].as_str().unwrap_or("affine").to_owned();
        Some(Self { bits: value["bits"].as_u64()?, group_size: value["group_size"].as_u64()?, mode })
    }
}

/// Ends of the names of tensors that only others' formats have, for configs that do not name theirs.
const FOREIGN_TENSORS: [(&str, &str); 3] =
    [(".qweight", "GPTQ or AWQ"), (".weight_scale_inv", "fp8 in blocks"), (".activation_scale", "fp8")];

/// Refuses quantization that is not MLX's. MLX writes `quantization` and, without a method,
/// `quantization_config`; others write only the latter, with a method of their own, or nothing.
fn refuse_unknown_quantization(own: &Value, foreign: &Value, weights: &WeightIndex) -> Result<(), HubError> {
    let refuse_at = |place: &str, how: &str| {
        HubError::unsupported(format!(
            "{place}: quantized with {how}, which only others can load; use the model's floats, which `quantize` \
             packs at load, or a copy that was quantized for MLX"
        ))
    };
    let refuse = |how: &str| refuse_at("config.json", how);
    let method = &foreign["quant_method"];
    if own.is_null() && !method.is_null() && method != "mxfp4" {
        return Err(refuse(method.as_str().unwrap_or("a method that is not a string")));
    }
    let overrides = own.as_object().into_iter().flatten().map(|(_, module)| module);
    for mode in std::iter::once(own).chain(overrides).map(|packing| &packing["mode"]) {
        if !mode.is_null() && !QuantMode::ALL.iter().any(|known| mode == known.as_str()) {
            return Err(refuse(mode.as_str().unwrap_or("a mode that is not a string")));
        }
    }
    let of_others = weights.tensors().find_map(|TensorInfo { name, .. }| {
        let foreign = FOREIGN_TENSORS.iter().find(|(end, _)| name.ends_with(end));
        foreign.map(|(_, how)| refuse_at(name, how))
    });
    of_others.filter(|_| own.is_null()).map_or(Ok(()), Err)
}

/// Counts the weights: a packed tensor by its elements, its scales and biases not at all.
fn parameter_count(weights: &WeightIndex, quantization: &Value) -> u64 {
    let default = Packing::read(quantization);
    let names: BTreeMap<&str, &TensorInfo> =
        weights.tensors().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    let is_packed = |module: &str| names.contains_key(format!("{module}.scales").as_str());
    let elements = |tensor: &TensorInfo| tensor.shape.iter().map(|length| *length as u64).product::<u64>();
    names
        .values()
        .map(|tensor| {
            let (module, part) = tensor.name.rsplit_once('.').unwrap_or(("", &tensor.name));
            match part {
                _ if !is_packed(module) => elements(tensor),
                "weight" => {
                    let packing = Packing::read(&quantization[module]).or_else(|| default.clone());
                    elements(tensor) * 32 / packing.map_or(32, |packing| packing.bits.clamp(1, 32))
                }
                "scales" | "biases" => 0,
                _ => elements(tensor),
            }
        })
        .sum()
}

fn stored_as(weights: &WeightIndex, quantization: &Value) -> String {
    if let Some(packing) = Packing::read(quantization) {
        let Packing { bits, group_size, mode } = &packing;
        let overrides = quantization.as_object().into_iter().flatten().map(|(_, value)| value);
        let mixed = overrides
            .filter(|value| value.is_object() || value.is_boolean())
            .any(|value| Packing::read(value).as_ref() != Some(&packing));
        return format!("{bits}-bit {mode}, group {group_size}{}", if mixed { ", mixed" } else { "" });
    }
    let mut bytes_by_dtype: BTreeMap<Dtype, u64> = BTreeMap::new();
    for tensor in weights.tensors() {
        *bytes_by_dtype.entry(tensor.dtype).or_default() += tensor.bytes;
    }
    let most = bytes_by_dtype.iter().max_by_key(|(_, bytes)| **bytes);
    let name = most.map_or_else(String::new, |(dtype, _)| match dtype {
        Dtype::BF16 => "bfloat16".into(),
        Dtype::F16 => "float16".into(),
        Dtype::F32 => "float32".into(),
        other => format!("{other:?}").to_lowercase(),
    });
    if bytes_by_dtype.len() > 1 { format!("{name}, mixed") } else { name }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> TensorInfo {
        TensorInfo { name: name.into(), dtype, shape: shape.to_vec(), bytes: 8 }
    }

    fn weights(tensors: Vec<TensorInfo>) -> WeightIndex {
        let file = crate::hub::WeightFile::of_tensors("m".into(), tensors);
        WeightIndex { files: vec![file], ..WeightIndex::default() }
    }

    #[test]
    fn packed_weights_count_by_their_elements() {
        let packed = weights(vec![
            tensor("a.weight", Dtype::U32, &[8, 4]),
            tensor("a.scales", Dtype::F16, &[8, 1]),
            tensor("a.biases", Dtype::F16, &[8, 1]),
            tensor("b.weight", Dtype::U32, &[8, 4]),
            tensor("b.scales", Dtype::F16, &[8, 1]),
            tensor("norm.weight", Dtype::F16, &[8]),
        ]);
        let config = json!({ "bits": 4, "group_size": 32, "b": { "bits": 8, "group_size": 32 } });
        assert_eq!(parameter_count(&packed, &config), 8 * 4 * 8 + 8 * 4 * 4 + 8);
        assert_eq!(stored_as(&packed, &config), "4-bit affine, group 32, mixed");
        assert_eq!(stored_as(&packed, &json!({ "bits": 4, "group_size": 64 })), "4-bit affine, group 64");
    }

    #[test]
    fn only_quantization_of_mlx_is_taken() {
        let floats = weights(vec![tensor("a.weight", Dtype::F16, &[8, 4])]);
        let check = |own: Value, foreign: Value| refuse_unknown_quantization(&own, &foreign, &floats);
        let affine = json!({ "bits": 4, "group_size": 64, "mode": "affine", "a": false, "b": { "bits": 8 } });
        assert!(check(Value::Null, Value::Null).is_ok());
        assert!(check(affine.clone(), affine.clone()).is_ok());
        assert!(check(affine, json!({ "quant_method": "gptq" })).is_ok());
        let why = check(Value::Null, json!({ "quant_method": "gptq" })).unwrap_err().to_string();
        assert!(why.contains("gptq"), "{why}");
        assert!(check(Value::Null, json!({ "quant_method": "mxfp4" })).is_ok());
        assert!(check(json!({ "bits": 4, "mode": "mxfp4" }), Value::Null).is_ok());
        assert!(check(json!({ "bits": 4, "mode": "fp3" }), Value::Null).is_err());
        assert!(check(json!({ "bits": 4, "a": { "mode": "fp3" } }), Value::Null).is_err());
    }

    #[test]
    fn what_others_have_quantized_is_known_by_its_tensors_too() {
        for (name, how) in [
            ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
            ("model.layers.0.mlp.up_proj.weight_scale_inv", "fp8 in blocks"),
            ("model.layers.0.mlp.up_proj.activation_scale", "fp8"),
        ] {
            let packed = weights(vec![tensor(name, Dtype::I32, &[8, 4])]);
            let check = |own: &Value| refuse_unknown_quantization(own, &Value::Null, &packed);
            let why = check(&Value::Null).unwrap_err().to_string();
            assert!(why.starts_with(&format!("{name}: quantized with {how}, which only others")), "{why}");
            assert!(why.contains("quantized for MLX"), "{why}");
            assert!(check(&json!({ "bits": 4, "group_size": 64 })).is_ok(), "MLX says how it packed them");
        }
    }

    #[test]
    fn plain_weights_are_named_by_their_dtype() {
        let plain = weights(vec![tensor("a.weight", Dtype::BF16, &[2, 3])]);
        assert_eq!(stored_as(&plain, &Value::Null), "bfloat16");
        assert_eq!(parameter_count(&plain, &Value::Null), 6);
    }

    #[test]
    fn a_model_that_does_not_ask_for_sampling_is_greedy() {
        let greedy = DefaultSampling::from_config(None);
        assert_eq!((greedy.temperature, greedy.top_p, greedy.repetition_penalty), (0.0, 1.0, 1.0));
        let unasked = json!({ "temperature": 0.7, "top_p": 0.9 });
        assert_eq!(DefaultSampling::from_config(Some(&unasked)).temperature, 0.0);
        let asked = json!({ "do_sample": true, "temperature": 0.5, "top_p": 7, "top_k": 40 });
        let sampling = DefaultSampling::from_config(Some(&asked));
        assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.5, 1.0, 40));
        let beyond = json!({ "repetition_penalty": 1e-38 });
        assert_eq!(DefaultSampling::from_config(Some(&beyond)).repetition_penalty, 1.0);
        let typical = json!({ "typical_p": 0.5 });
        assert_eq!(DefaultSampling::from_config(Some(&typical)).typical_p, 0.5);
        let bare = json!({ "do_sample": true });
        assert_eq!(DefaultSampling::from_config(Some(&bare)).temperature, 1.0);
    }
}
