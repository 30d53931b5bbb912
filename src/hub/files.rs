//! The files of a model, read once for each revision of them: configs parsed, headers of the weight files
//! checked, facts computed. Made on a thread that may block, then immutable and shared: the edge answers from
//! it, a load carries it to the engine, and the device plans from it. Only tensor data is read later.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::read::{
    CONFIG_BYTES_MAX, TOKENIZER_BYTES_MAX, open_regular, read_bytes, read_config, read_generation_config,
    read_json, read_text,
};
use super::{HubError, ModelFacts, ModelFolder, WeightIndex, WeightSizes, inspect, text_part};
use crate::ids::ModelName;
use crate::quantize::{QuantRule, Quantization, QuantizationError};
use crate::text::TextFiles;

/// The files of a model at one revision.
#[derive(Debug)]
pub struct ModelFiles {
    /// The name clients use.
    pub name: ModelName,
    /// The folder, links resolved.
    pub folder: PathBuf,
    /// Identifies the state of the files.
    pub revision: String,
    /// `config.json`.
    pub config: Value,
    /// The config of the text model; see [`text_part`].
    pub text_config: Value,
    /// `generation_config.json`, if there is a valid one.
    pub generation_config: Option<Value>,
    /// The tensors, by file.
    pub weights: WeightIndex,
    /// Their sizes, by which a load is planned.
    pub sizes: WeightSizes,
    /// Facts computed from the above.
    pub facts: ModelFacts,
}

impl ModelFiles {
    /// Reads the configs and the headers of the weight files of a folder.
    ///
    /// # Errors
    /// A file is missing or damaged, or needs something that is not implemented.
    pub fn read(folder: &ModelFolder) -> Result<Self, HubError> {
        let ModelFolder { name, path, revision } = folder;
        let config = read_config(path)?;
        // It is read later, and by then by a caller who waits.
        open_regular(&path.join("tokenizer.json"))?;
        let text_config = text_part(&config);
        let generation_config = read_generation_config(path);
        let weights = inspect(path)?;
        let sizes = WeightSizes::new(&weights, &text_config);
        let facts = ModelFacts::new(&text_config, generation_config.as_ref(), &weights)?;
        Ok(Self {
            name: name.as_str().into(),
            folder: path.clone(),
            revision: revision.clone(),
            config,
            text_config,
            generation_config,
            weights,
            sizes,
            facts,
        })
    }

    /// Returns the rule by which a quantization treats this model's matrices.
    #[must_use]
    pub fn rule(&self, quantization: Quantization) -> QuantRule {
        let layers =
            self.text_config["num_hidden_layers"].as_u64().and_then(|layers| usize::try_from(layers).ok());
        QuantRule::new(quantization, &self.facts.architecture, layers.unwrap_or(0))
    }

    /// Returns the sizes of the weights once they are quantized. Counts every tensor.
    ///
    /// # Errors
    /// A recipe does not fit the model.
    pub fn quantized_sizes(&self, quantization: Quantization) -> Result<WeightSizes, QuantizationError> {
        let rule = self.rule(quantization);
        // What mlx-lm (mixtral.py, `sanitize`) renames.
        let is_renamed = |name: &str| self.facts.architecture == "mixtral" && name.ends_with(".w2.weight");
        let named = |name| if is_renamed(name) { "down_proj" } else { name };
        rule.check(self.weights.tensors().map(|tensor| named(tensor.name.as_str())))?;
        Ok(WeightSizes::quantized(&self.weights, &self.text_config, Some(&rule)))
    }

    /// Makes files of a model that is on no disk, for a backend that reads nothing.
    #[cfg(test)]
    pub(crate) fn fake(name: &str) -> Self {
        Self {
            name: name.into(),
            folder: PathBuf::from("/"),
            revision: "1".into(),
            config: Value::Null,
            text_config: Value::Null,
            generation_config: None,
            weights: WeightIndex::default(),
            sizes: WeightSizes::default(),
            facts: ModelFacts::default(),
        }
    }
}

/// Reads the files of a folder that the text modules need. Those that a model does without may be absent.
///
/// # Errors
/// A file of the tokenizer is too large, unreadable or damaged.
pub fn read_text_files(folder: &Path) -> Result<TextFiles, HubError> {
    let json = |name: &str| read_json(&folder.join(name), CONFIG_BYTES_MAX);
    let mut files = TextFiles {
        tokenizer: read_bytes(&folder.join("tokenizer.json"), TOKENIZER_BYTES_MAX)?,
        tokenizer_config: json("tokenizer_config.json")?,
        special_tokens_map: json("special_tokens_map.json")?,
        ..TextFiles::default()
    };
    files.template_fault = read_templates(folder, &mut files).err().map(|error| error.to_string());
    Ok(files)
}

/// Reads the files that only a chat template may be in.
fn read_templates(folder: &Path, files: &mut TextFiles) -> Result<(), HubError> {
    let text = |name: &str| read_text(&folder.join(name), CONFIG_BYTES_MAX);
    files.chat_template = text("chat_template.jinja")?;
    // A model with a template ignores what stands in the older places.
    if files.chat_template.is_some() {
        files.tool_use_template = text("additional_chat_templates/tool_use.jinja")?;
    } else if files.tokenizer_config.as_ref().is_none_or(|config| config["chat_template"].is_null()) {
        files.chat_template_json = read_json(&folder.join("chat_template.json"), CONFIG_BYTES_MAX)?;
    }
    Ok(())
}
