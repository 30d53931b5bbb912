//! Conversion to a folder that MLX, mlx-lm and this daemon load. The folder itself is made here, whatever is
//! converted (`draft`, `shards`). A GGUF file is converted here too: formats that MLX can express are carried
//! over to the last bit; Q6_K is rounded to f16; anything else is refused by name. Hugging Face folders are
//! read by the architectures, and so converted by the device.

mod blocks;
mod draft;
mod gguf;
mod llama;
mod rope;
mod shards;
mod tokenizer;
mod write;

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use self::blocks::{GROUP, Stored};
use self::gguf::Gguf;
use self::llama::{Llama, Source};
use super::HubError;

pub use self::draft::Draft;
pub use self::shards::WeightsWriter;

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

/// What a conversion wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// The folder.
    pub path: PathBuf,
    /// Tensors in it.
    pub tensors_count: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bits of most quantized weights; `None` if all are dense.
    pub bits: Option<usize>,
    /// GGUF tensors that could not be carried over exactly and were rounded to f16.
    pub rounded: Vec<String>,
}

/// Converts a GGUF file (llama architecture, byte-level BPE tokenizer) to an MLX folder at `out`. `overwrite`
/// lets an existing model's folder be replaced, once the new one is complete.
///
/// # Errors
/// `Damaged` if the file contradicts itself, `Unsupported` naming what cannot be converted, `Io`; with the
/// kind `AlreadyExists` if `out` has files and may not be replaced, `Interrupted` if `watch` stops it. `out`
/// is then as it was.
pub fn convert_gguf(
    file: &Path,
    out: &Path,
    overwrite: bool,
    watch: &mut Watch<'_>,
) -> Result<Converted, HubError> {
    let gguf = Gguf::open(file)?;
    let llama = Llama::read(&gguf)?;
    let sources = llama.sources(&gguf)?;
    let tokenizer = tokenizer::build(&gguf, llama.context_length)?;
    let mut config = llama.config(&gguf, tokenizer.tokens_count, &tokenizer.generation)?;
    let quantization = quantization(&gguf, &sources)?;
    if let Some((_, table)) = &quantization {
        config["quantization"] = table.clone();
        config["quantization_config"] = table.clone();
    }
    let draft = Draft::new(file, out, overwrite)?;
    let (tensors_count, bytes) = write::weights(&draft, &gguf, &sources, llama.head_dim, watch)?;
    for (name, value, pretty) in [
        ("config.json", &config, true),
        ("generation_config.json", &tokenizer.generation, true),
        ("tokenizer.json", &tokenizer.tokenizer, false),
        ("tokenizer_config.json", &tokenizer.config, true),
    ] {
        draft.json(name, value, pretty)?;
    }
    draft.finish()?;
    let rounded = sources.iter().filter(|source| stored(&gguf, source) == Some(Stored::Rounded));
    Ok(Converted {
        path: out.to_path_buf(),
        tensors_count,
        bytes,
        bits: quantization.map(|(bits, _)| bits),
        rounded: rounded.map(|source| source.from.clone()).collect(),
    })
}

fn stored(gguf: &Gguf, source: &Source) -> Option<Stored> {
    gguf.tensors.get(&source.from).map(|tensor| tensor.kind.stored())
}

/// The config's quantization table: the most common width, and every module that differs from it.
fn quantization(gguf: &Gguf, sources: &[Source]) -> Result<Option<(usize, Value)>, HubError> {
    let mut modules = Vec::new();
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    for source in sources {
        let Some(tensor) = gguf.tensors.get(&source.from) else { continue };
        let bits = match tensor.kind.stored() {
            Stored::Affine(bits) => Some(bits),
            Stored::Same(_) | Stored::Rounded => None,
        };
        if tensor.dims.len() == 2 {
            modules.push((&source.module, bits));
            *counts.entry(bits.unwrap_or(0)).or_default() += usize::from(bits.is_some());
        } else if tensor.kind.block().0 > 1 {
            return Err(HubError::unsupported(format!("tensor {} is quantized, but no matrix", source.from)));
        }
    }
    let most = counts.into_iter().filter(|(bits, _)| *bits > 0).max_by_key(|(_, count)| *count);
    let Some((most, _)) = most else {
        return Ok(None);
    };
    let entry = |bits: usize| json!({"group_size": GROUP, "bits": bits, "mode": "affine"});
    let mut table = entry(most);
    for (module, bits) in modules {
        match bits {
            None => table[module] = json!(false),
            Some(bits) if bits != most => table[module] = entry(bits),
            Some(_) => {}
        }
    }
    Ok(Some((most, table)))
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
