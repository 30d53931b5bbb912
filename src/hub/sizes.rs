//! The sizes of a model's weights, by which a load is planned: counted once, when its files are read.

use std::collections::BTreeSet;

use safetensors::Dtype;
use serde_json::Value;

use super::{TensorInfo, WeightIndex};
use crate::quantize::{QuantFormat, QuantMode, QuantRule};

/// Elements and bytes of the weights, dense and as stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightSizes {
    /// Elements of quantized matrices.
    pub dense_elements: u64,
    /// Bytes of quantized matrices as stored.
    pub packed_bytes: u64,
    /// Elements of tensors that are stored as floats.
    pub plain_elements: u64,
    /// Elements of scales and biases.
    pub side_elements: u64,
    /// Type of most of the stored floats, by bytes; None if there are none.
    pub float: Option<Dtype>,
}

impl WeightSizes {
    /// Counts the tensors of a model with this config.
    pub(super) fn new(weights: &WeightIndex, config: &Value) -> Self {
        Self::quantized(weights, config, None)
    }

    /// Counts the tensors as they are once a rule has quantized those that are stored as floats.
    pub(super) fn quantized(weights: &WeightIndex, config: &Value, rule: Option<&QuantRule>) -> Self {
        let mut sizes = Self { float: stored_float(weights), ..Self::default() };
        let scaled: BTreeSet<&str> =
            weights.tensors().filter_map(|tensor| tensor.name.strip_suffix(".scales")).collect();
        for TensorInfo { name, shape, bytes, .. } in weights.tensors() {
            let elements = shape.iter().map(|&size| size as u64).product::<u64>();
            let module = name.rsplit_once('.').map_or("", |(module, _)| module);
            let is = |ending: &str| name.ends_with(ending) && scaled.contains(module);
            if is(".scales") || is(".biases") {
                sizes.side_elements += elements;
            } else if is(".weight") {
                sizes.packed_bytes += bytes;
                sizes.dense_elements += bytes * 8 / bits_of(config, module);
            } else if let Some(format) = rule.and_then(|rule| format_of(rule, name, shape)) {
                sizes.dense_elements += elements;
                sizes.packed_bytes += elements * u64::from(format.bits) / 8;
                let sides = if format.mode == QuantMode::Affine { 2 } else { 1 };
                sizes.side_elements += elements / u64::from(format.group_size) * sides;
            } else {
                sizes.plain_elements += elements;
            }
        }
        sizes
    }
}

/// Returns the format that a rule gives a tensor, by its name in the file: matrices, and experts that are
/// stacked there. Convolutions are not matrices.
fn format_of(rule: &QuantRule, name: &str, shape: &[usize]) -> Option<QuantFormat> {
    let stacked = ["experts.gate_up_proj", "experts.down_proj"].iter().any(|end| name.ends_with(end));
    let module = name.strip_suffix(".weight").or(Some(name).filter(|_| stacked))?;
    let [.., _, columns] = shape else { return None };
    if module.ends_with("conv") || module.ends_with("conv1d") { None } else { rule.format(module, *columns) }
}

/// Returns the bits of an element of a module, by the config: for the plan; the load goes by shapes.
fn bits_of(config: &Value, module: &str) -> u64 {
    let quantization = config.get("quantization").or_else(|| config.get("quantization_config"));
    let bits =
        |value: &Value| value.get("bits").and_then(Value::as_u64).filter(|bits| (2..=8).contains(bits));
    let own = quantization.and_then(|q| q.get(module)).and_then(bits);
    own.or_else(|| quantization.and_then(bits)).unwrap_or(4)
}

fn stored_float(weights: &WeightIndex) -> Option<Dtype> {
    let mut bytes = [Dtype::BF16, Dtype::F16, Dtype::F32].map(|dtype| (dtype, 0));
    for tensor in weights.tensors() {
        let counted = bytes.iter_mut().find(|(dtype, _)| *dtype == tensor.dtype);
        counted.into_iter().for_each(|(_, bytes)| *bytes += tensor.bytes);
    }
    let most = bytes.into_iter().max_by_key(|(_, bytes)| *bytes);
    most.filter(|(_, bytes)| *bytes > 0).map(|(dtype, _)| dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::{ModelFiles, WeightFile};
    use crate::quantize::{Quantization, Recipe};

    #[test]
    fn quantized_matrices_count_by_their_bits_and_others_as_they_are() {
        let tensor = |name: &str, dtype, shape: &[usize], bytes| TensorInfo {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
            bytes,
        };
        let tensors = vec![
            tensor("a.weight", Dtype::U32, &[8, 8], 256),
            tensor("a.scales", Dtype::BF16, &[8, 1], 16),
            tensor("a.biases", Dtype::BF16, &[8, 1], 16),
            tensor("b.weight", Dtype::U32, &[8, 16], 512),
            tensor("b.scales", Dtype::BF16, &[8, 1], 16),
            tensor("norm.weight", Dtype::F32, &[7], 28),
        ];
        let weights = WeightIndex {
            files: vec![WeightFile::of_tensors("m".into(), tensors)],
            ..WeightIndex::default()
        };
        let config = serde_json::json!({ "quantization": { "bits": 4, "b": { "bits": 8 } } });
        let expected = WeightSizes {
            dense_elements: 512 + 512,
            packed_bytes: 768,
            plain_elements: 7,
            side_elements: 24,
            float: Some(Dtype::BF16),
        };
        assert_eq!(WeightSizes::new(&weights, &config), expected);
        let quantization = Quantization::new(QuantMode::Affine, Some(4), Some(32), None).unwrap();
        let rule = QuantRule::new(quantization, "llama", 1);
        assert_eq!(WeightSizes::quantized(&weights, &config, Some(&rule)), expected);
        let plain = vec![
            tensor("a.weight", Dtype::BF16, &[8, 64], 1024),
            tensor("n.weight", Dtype::BF16, &[64], 128),
        ];
        let files = vec![WeightFile::of_tensors("m".into(), plain)];
        let weights = WeightIndex { files, ..WeightIndex::default() };
        let expected = WeightSizes {
            dense_elements: 512,
            packed_bytes: 256,
            plain_elements: 64,
            side_elements: 32,
            float: Some(Dtype::BF16),
        };
        assert_eq!(WeightSizes::quantized(&weights, &Value::Null, Some(&rule)), expected);
        assert_eq!(WeightSizes::new(&WeightIndex::default(), &config), WeightSizes::default());
    }

    #[test]
    fn a_recipe_fits_a_model_whose_files_have_what_it_chooses_by() {
        let recipe = Quantization::new(QuantMode::Affine, None, None, Some(Recipe::Mixed2And6)).unwrap();
        let fits = |architecture: &str, name: &str| {
            let mut files = ModelFiles::fake("m");
            files.facts.architecture = architecture.into();
            let tensor =
                TensorInfo { name: name.into(), dtype: Dtype::BF16, shape: vec![8, 64], bytes: 1024 };
            files.weights.files = vec![WeightFile::of_tensors("m".into(), vec![tensor])];
            files.quantized_sizes(recipe).map(|sizes| sizes.dense_elements).map_err(|error| error.to_string())
        };
        assert_eq!(fits("llama", "model.layers.0.mlp.down_proj.weight"), Ok(512));
        assert_eq!(fits("mixtral", "model.layers.0.block_sparse_moe.experts.0.w2.weight"), Ok(512));
        let refused = Err("mixed_2_6 does not fit lfm2, which has no down_proj".to_owned());
        assert_eq!(fits("lfm2", "model.layers.0.feed_forward.w2.weight"), refused);
    }
}
