//! Conversion to a folder that MLX, mlx-lm and this daemon load. The folder itself is made here, whatever is
//! converted (`draft`, `shards`). A GGUF file is converted here too: formats that MLX can express are carried
//! over to the last bit, Q6_K and IQ4_NL are rounded to f16; or all are dequantized and become what is asked
//! for. Anything else is refused by name. Hugging Face folders are read by the architectures, and so
//! converted by the device.

mod blocks;
mod config;
mod draft;
mod gguf;
mod numbers;
mod pretokenizer;
mod rope;
mod sentencepiece;
mod shards;
mod tensors;
mod tokenizer;
mod write;

use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

use self::blocks::{GROUP, Stored};
use self::gguf::Gguf;
use self::numbers::Numbers;
use self::tensors::Source;
use self::write::{Form, Stream, Target};
use super::HubError;
use crate::quantize::{QuantFormat, QuantMode, QuantRule, Quantization};

pub use self::draft::Draft;
pub use self::shards::WeightsWriter;
pub use self::write::Quantizer;

/// Is told bytes of tensors done and in all, and may stop the conversion.
pub type Watch<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + 'a;

/// Tells how far a conversion is.
///
/// # Errors
/// `Io` with the kind `Interrupted` if it is to stop.
pub fn told(watch: &mut Watch<'_>, done_bytes: u64, total_bytes: u64) -> Result<(), HubError> {
    match watch(done_bytes, total_bytes) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => {
            Err(HubError::io(Path::new("conversion"))(io::Error::from(io::ErrorKind::Interrupted)))
        }
    }
}

/// A GGUF file to convert.
#[derive(Clone, Copy, Debug)]
pub struct GgufConversion<'a> {
    /// The file, or the first of a split model's.
    pub file: &'a Path,
    /// The folder to write.
    pub out: &'a Path,
    /// Whether a model's folder at `out` is replaced.
    pub overwrite: bool,
    /// Dtype of floats. None: every tensor as the file has it, where MLX has such a format; with
    /// `quantization` float16.
    pub dtype: Option<Dtype>,
    /// How matrices are quantized anew.
    pub quantization: Option<Quantization>,
}

/// What a conversion wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Tensors in the folder.
    pub tensors_count: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bits of most quantized weights; `None` if all are dense.
    pub bits: Option<u32>,
    /// GGUF tensors that MLX has no format for and that were rounded to f16.
    pub rounded: Vec<String>,
}

/// Converts a GGUF file to an MLX folder. An existing model's folder is replaced once the new one is
/// complete.
///
/// # Errors
/// `Damaged` if the file contradicts itself, `Unsupported` naming what cannot be converted, `Io`; with the
/// kind `AlreadyExists` if `out` has files and may not be replaced, `Interrupted` if `watch` stops it. `out`
/// is then as it was.
pub fn convert_gguf(
    job: &GgufConversion<'_>,
    quantizer: &mut dyn Quantizer,
    watch: &mut Watch<'_>,
) -> Result<Converted, HubError> {
    let gguf = Gguf::open(job.file)?;
    let numbers = Numbers::read(&gguf)?;
    let sources = tensors::sources(&gguf, &numbers)?;
    let tokenizer = tokenizer::build(&gguf, numbers.context_length)?;
    let mut config = config::build(&gguf, &numbers, tokenizer.tokens_count, &tokenizer.generation)?;
    let model_type = config["model_type"].as_str().unwrap_or_default();
    let layers = usize::try_from(numbers.layers).unwrap_or(usize::MAX);
    let rule = job.quantization.map(|quantization| QuantRule::new(quantization, model_type, layers));
    if let Some(rule) = &rule {
        let modules = sources.iter().map(|source| source.module.as_str());
        rule.check(modules).map_err(|error| HubError::unsupported(error.to_string()))?;
    }
    let target = Target { dtype: job.dtype, rule };
    let formed = formed(&gguf, &sources, &target)?;
    let table = table(&formed, &target);
    if let Some((_, table)) = &table {
        config["quantization"] = table.clone();
        config["quantization_config"] = table.clone();
    }
    let draft = Draft::new(job.file, job.out, job.overwrite)?;
    let mut stream = Stream { gguf: &gguf, target: &target, head_dim: numbers.head_dim, quantizer };
    let (tensors_count, bytes) = stream.write(&draft, &sources, watch)?;
    for (name, value, pretty) in [
        ("config.json", &config, true),
        ("generation_config.json", &tokenizer.generation, true),
        ("tokenizer.json", &tokenizer.tokenizer, false),
        ("tokenizer_config.json", &tokenizer.config, true),
    ] {
        draft.json(name, value, pretty)?;
    }
    draft.finish()?;
    let rounded = formed.iter().filter(|(_, form)| *form == Form::Stored(Stored::Rounded));
    Ok(Converted {
        tensors_count,
        bytes,
        bits: table.map(|(format, _)| format.bits),
        rounded: rounded.map(|(source, _)| source.from.clone()).collect(),
    })
}

/// Returns what each source becomes.
fn formed<'a>(
    gguf: &Gguf,
    sources: &'a [Source],
    target: &Target,
) -> Result<Vec<(&'a Source, Form)>, HubError> {
    let mut formed = Vec::with_capacity(sources.len());
    for source in sources {
        let Some(tensor) = gguf.tensors.get(&source.from) else { continue };
        if tensor.kind.block().0 > 1 && tensor.dims.len() < 2 {
            return Err(HubError::unsupported(format!("tensor {} is quantized, but no matrix", source.from)));
        }
        formed.push((source, target.form(source, tensor)));
    }
    Ok(formed)
}

/// Returns the config's quantization table, and the format of most: the one that was asked for, or the most
/// common one of the file. Every module that differs is named.
fn table(formed: &[(&Source, Form)], target: &Target) -> Option<(QuantFormat, Value)> {
    let format = |form: Form| match form {
        Form::Stored(Stored::Affine(bits)) => {
            let (bits, group_size) = (u32::try_from(bits).ok()?, u32::try_from(GROUP).ok()?);
            Some(QuantFormat { mode: QuantMode::Affine, bits, group_size })
        }
        Form::Quantized(format, _) => Some(format),
        Form::Stored(_) | Form::Dense(_) => None,
    };
    let matrices = formed.iter().filter(|(source, _)| source.is_matrix());
    let modules: Vec<(&str, Option<QuantFormat>)> =
        matrices.map(|(source, form)| (source.module.as_str(), format(*form))).collect();
    let count =
        |bits: u32| modules.iter().filter(|(_, format)| format.is_some_and(|f| f.bits == bits)).count();
    let common = modules
        .iter()
        .filter_map(|(_, format)| *format)
        .max_by_key(|format| (count(format.bits), format.bits));
    let asked = target.rule.as_ref().map(QuantRule::quantization);
    let most = asked.map_or(common, |asked| Some(asked.format))?;
    let names_all = asked.is_some_and(|asked| asked.recipe.is_some());
    let mut table = format_entry(most);
    for (module, format) in modules {
        match format {
            None => table[module] = json!(false),
            Some(format) if names_all || format != most => table[module] = format_entry(format),
            Some(_) => {}
        }
    }
    Some((most, table))
}

/// Returns the entry of a format in a config's quantization table.
#[must_use]
pub fn format_entry(format: QuantFormat) -> Value {
    let QuantFormat { mode, bits, group_size } = format;
    json!({"group_size": group_size, "bits": bits, "mode": mode.as_str()})
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
