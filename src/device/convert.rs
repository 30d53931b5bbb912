//! Converts a Hugging Face folder to one that MLX, mlx-lm and this daemon load: the architecture brings the
//! tensors to mlx-lm's names and shapes, floats are cast, and MLX itself quantizes matrices on the CPU, so
//! that the result is mlx-lm's to the last bit. Arrays are lazy, and each is read, computed, written and
//! dropped before the next one: memory is that of the largest tensor and its result.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use mlx_rs::{Array, Device, Dtype, Stream, memory, ops, with_stream};
use serde_json::{Map, Value};

use crate::device::{opening, plan};
use crate::error::Error;
use crate::hub::{self, Draft, HubError, ModelFiles, ModelFolder, Quantizer, TensorInfo, Watch, told};
use crate::mlx::dim;
use crate::mlx::ffi;
use crate::mlx::kernels::KernelSet;
use crate::mlx::tensors::{Policy, TensorCursor};
use crate::models::{self, Loading, OpenError, Setup, keeps_dtype};
use crate::quantize::{QuantFormat, QuantRule, Quantization, QuantizationError};

/// What to convert, and to what.
#[derive(Clone, Copy, Debug)]
pub struct Conversion<'a> {
    /// The model.
    pub source: &'a ModelFolder,
    /// The folder to write.
    pub out: &'a Path,
    /// Whether a model's folder at `out` is replaced.
    pub overwrite: bool,
    /// Dtype of floats; None: what the config names (`torch_dtype`), else as stored.
    pub dtype: Option<hub::Dtype>,
    /// How matrices are quantized; None: they stay as they are.
    pub quantization: Option<Quantization>,
}

/// What a conversion wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FolderConverted {
    /// Number of tensors.
    pub tensors_count: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Number of weights; a packed tensor counts its elements.
    pub parameters: u64,
}

/// Why a folder is not converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// A file cannot be read, used or written.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The architecture does not take the files.
    #[error(transparent)]
    Model(#[from] Error),
    /// The quantization does not fit the model.
    #[error(transparent)]
    Quantization(#[from] QuantizationError),
}

impl From<mlx_rs::error::Exception> for ConvertError {
    fn from(exception: mlx_rs::error::Exception) -> Self {
        Self::Model(exception.into())
    }
}

/// The tensors of a module that are made together.
struct Piece {
    tensors: Vec<(String, Array)>,
    format: Option<QuantFormat>,
    /// The module's path, where it has a matrix.
    module: Option<String>,
}

/// Converts a folder. The destination is as it was if this fails.
///
/// # Errors
/// Files are damaged, or need something that is not implemented; the quantization does not fit; `out` may
/// not be written; the disk is full; `watch` stops it.
pub fn convert(job: &Conversion<'_>, watch: &mut Watch<'_>) -> Result<FolderConverted, ConvertError> {
    let files = ModelFiles::read(job.source)?;
    let draft = Draft::new(&job.source.path, job.out, job.overwrite)?;
    // Before the weights, which take the time: a file that cannot be copied is told at once.
    draft.copy_others(&job.source.path)?;
    begin()?;
    let stream = Stream::new_with_device(&Device::cpu());
    with_stream(&stream, || run(job, &files, &draft, &stream, watch))
        .inspect(|_| drop(memory::clear_cache()))
        .and_then(|converted| {
            draft.finish()?;
            Ok(converted)
        })
}

/// Takes MLX into use on this thread.
fn begin() -> Result<(), Error> {
    // mlx-c's own error handler ends the process; mlx-rs puts its own in place at the first checked op.
    ops::zeros_dtype(&[1], Dtype::Float32)?.eval()?;
    // What was written is of no use any more.
    memory::set_cache_limit(0)?;
    Ok(())
}

fn run(
    job: &Conversion<'_>,
    files: &ModelFiles,
    draft: &Draft,
    stream: &Stream,
    watch: &mut Watch<'_>,
) -> Result<FolderConverted, ConvertError> {
    let policy = Policy { float: Dtype::Float32, dequantize: false, kernels: KernelSet::Composed };
    let Checked { loader, matrices, parameters } = check(files, policy, stream)?;
    let model_type = files.facts.architecture.as_str();
    let rule = job.quantization.map(|asked| QuantRule::new(asked, model_type, loader.layers()));
    if let Some(rule) = &rule {
        rule.check(matrices.iter().map(String::as_str))?;
    }
    let mut weights = opened(TensorCursor::new(&files.name, policy), files, stream)?;
    loader.adapt(&mut weights)?;
    let plan = Plan { model_type, matrices: &matrices, dtype: dtype(job, files)?, rule: rule.as_ref() };
    let failure = weights.failure();
    let pieces = plan.pieces(weights)?;
    let infos = pieces.iter().flat_map(|piece| &piece.tensors).map(|(name, array)| info(name, array));
    let infos = infos.collect::<Result<Vec<_>, _>>()?;
    let config = config(files, rule.as_ref(), &pieces);
    let writer = draft.weights(&infos, parameters)?;
    let (mut done, total) = (0, writer.bytes());
    told(watch, done, total)?;
    for piece in pieces {
        for (name, array) in piece.tensors {
            bytes_of(&array, |bytes| writer.write(&name, 0, bytes))??;
            if let Some(why) = failure.get() {
                return Err(Error::ModelInvalid { model: files.name.clone(), why: why.clone() }.into());
            }
            done += array.nbytes() as u64;
            told(watch, done, total)?;
        }
    }
    let converted = FolderConverted { tensors_count: writer.tensors_count(), bytes: total, parameters };
    files.weights.check_unchanged()?;
    writer.finish()?;
    draft.json("config.json", &config, true)?;
    Ok(converted)
}

/// A model whose tensors the architecture takes.
struct Checked {
    /// A loader that has taken nothing yet.
    loader: Box<dyn Loading>,
    /// Modules that have matrices.
    matrices: BTreeSet<String>,
    /// Number of weights.
    parameters: u64,
}

/// Lets the architecture take every tensor, none of which is read: what does not fit is told before anything
/// is written.
fn check(files: &ModelFiles, policy: Policy, stream: &Stream) -> Result<Checked, ConvertError> {
    let open = || {
        let setup = Setup { dtype: policy.float, kernels: policy.kernels, int8_kv: false };
        models::open(&files.text_config, setup).map_err(|error| match error {
            OpenError::Unsupported(why) => Error::ModelUnsupported { model: files.name.clone(), why },
            OpenError::Invalid(why) => Error::ModelInvalid { model: files.name.clone(), why },
        })
    };
    let mut weights = opened(TensorCursor::dry(&files.name, policy), files, stream)?;
    let mut loader = open()?;
    while loader.next(&mut weights)?.is_none() {}
    Ok(Checked {
        loader: open()?,
        matrices: weights.matrices_taken().clone(),
        parameters: weights.parameters(),
    })
}

fn opened(
    mut weights: TensorCursor,
    files: &ModelFiles,
    stream: &Stream,
) -> Result<TensorCursor, ConvertError> {
    for (file, is_spare) in files.weights.all() {
        weights.add(opening::open(file)?, is_spare, stream)?;
    }
    Ok(weights)
}

/// Returns the dtype of floats: what was asked for, else what the config names.
fn dtype(job: &Conversion<'_>, files: &ModelFiles) -> Result<Option<Dtype>, ConvertError> {
    Ok(match job.dtype {
        Some(hub::Dtype::F32) => Some(Dtype::Float32),
        Some(hub::Dtype::F16) => Some(Dtype::Float16),
        Some(hub::Dtype::BF16) => Some(Dtype::Bfloat16),
        Some(other) => {
            let why = format!("weights cannot be {other}: F32, F16 or BF16");
            return Err(ConvertError::Hub(HubError::Unsupported { why }));
        }
        None => plan::named_dtype(files),
    })
}

/// What becomes of each tensor.
struct Plan<'a> {
    model_type: &'a str,
    /// Modules that have matrices.
    matrices: &'a BTreeSet<String>,
    dtype: Option<Dtype>,
    rule: Option<&'a QuantRule>,
}

impl Plan<'_> {
    /// Returns everything that is written, in the order of names, numbers by their value.
    fn pieces(&self, mut weights: TensorCursor) -> Result<Vec<Piece>, ConvertError> {
        let all: BTreeMap<Vec<String>, (String, Array)> =
            weights.take_all().into_iter().map(|(name, array)| (order(&name), (name, array))).collect();
        let packed: BTreeSet<String> =
            all.values().filter_map(|(name, _)| name.strip_suffix(".scales").map(str::to_owned)).collect();
        all.into_values().map(|(name, array)| self.piece(&name, &array, &packed)).collect()
    }

    fn piece(&self, name: &str, array: &Array, packed: &BTreeSet<String>) -> Result<Piece, ConvertError> {
        let prefix = models::prefix(self.model_type);
        let full = |name: &str| format!("{prefix}{name}");
        let is_float = matches!(array.dtype(), Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16);
        let cast = self.dtype.filter(|_| is_float && !keeps_dtype(self.model_type, name));
        let array = cast.map_or_else(|| Ok(array.clone()), |dtype| array.as_dtype(dtype))?;
        let module = name.strip_suffix(".weight").filter(|module| self.matrices.contains(*module));
        let columns = array.shape().last().and_then(|&columns| usize::try_from(columns).ok()).unwrap_or(0);
        let format = module.filter(|module| is_float && !packed.contains(*module));
        let format = format.and_then(|module| self.rule?.format(module, columns));
        let (Some(format), Some(module)) = (format, module) else {
            let tensors = vec![(full(name), array)];
            return Ok(Piece { tensors, format: None, module: None });
        };
        let names = [full(name), full(&format!("{module}.scales")), full(&format!("{module}.biases"))];
        let tensors = names.into_iter().zip(ffi::quantize(&array, format)?).collect();
        Ok(Piece { tensors, format: Some(format), module: Some(full(module)) })
    }
}

/// Returns a key by which names come in the order of a model: layer 2 before layer 10.
fn order(name: &str) -> Vec<String> {
    let padded =
        |part: &str| if part.parse::<u32>().is_ok() { format!("{part:>10}") } else { part.to_owned() };
    name.split('.').map(padded).collect()
}

/// Computes an array and hands its bytes to `take`.
fn bytes_of<T>(array: &Array, take: impl FnOnce(&[u8]) -> T) -> Result<T, Error> {
    let columns = array.shape().last().copied().unwrap_or(1);
    let rows = array.shape().split_last().map_or(1, |(_, outer)| outer.iter().product());
    // In rows, so that no dimension passes 2^31.
    let bytes = array.reshape(&[rows, columns])?.contiguous()?.view_dtype(Dtype::Uint8)?;
    bytes.eval()?;
    Ok(take(bytes.try_as_slice::<u8>().map_err(|error| Error::Internal(error.to_string()))?))
}

fn info(name: &str, array: &Array) -> Result<TensorInfo, Error> {
    let dtype = match array.dtype() {
        Dtype::Bool => hub::Dtype::BOOL,
        Dtype::Uint8 => hub::Dtype::U8,
        Dtype::Uint16 => hub::Dtype::U16,
        Dtype::Uint32 => hub::Dtype::U32,
        Dtype::Uint64 => hub::Dtype::U64,
        Dtype::Int8 => hub::Dtype::I8,
        Dtype::Int16 => hub::Dtype::I16,
        Dtype::Int32 => hub::Dtype::I32,
        Dtype::Int64 => hub::Dtype::I64,
        Dtype::Float16 => hub::Dtype::F16,
        Dtype::Bfloat16 => hub::Dtype::BF16,
        Dtype::Float32 => hub::Dtype::F32,
        other => return Err(Error::Internal(format!("{name} has dtype {other:?}"))),
    };
    let shape = array.shape().iter().map(|&size| usize::try_from(size).unwrap_or(0)).collect();
    Ok(TensorInfo { name: name.to_owned(), dtype, shape, bytes: array.nbytes() as u64 })
}

/// Returns the config with the new quantization, as mlx-lm saves it (utils.py, `quantize_model` and
/// `save_config`).
fn config(files: &ModelFiles, rule: Option<&QuantRule>, pieces: &[Piece]) -> Value {
    let whole = files.config.as_object().cloned().unwrap_or_default();
    let mut config: BTreeMap<String, Value> = whole.into_iter().collect();
    for unused in ["_name_or_path", "vision_config"] {
        config.remove(unused);
    }
    let table = table(&files.text_config, rule, pieces);
    if let Some(table) = table {
        for key in ["quantization", "quantization_config"] {
            config.insert(key.to_owned(), table.clone());
        }
    }
    Value::Object(config.into_iter().collect())
}

/// Returns the table of quantized modules: the format of most, and every module that differs. None: nothing
/// is quantized.
fn table(text_config: &Value, rule: Option<&QuantRule>, pieces: &[Piece]) -> Option<Value> {
    let before = match (&text_config["quantization"], &text_config["quantization_config"]["quant_method"]) {
        (Value::Object(own), _) => Some(own.clone()),
        (_, Value::String(method)) if method == "mxfp4" => {
            hub::format_entry(crate::quantize::QuantMode::Mxfp4.usual()).as_object().cloned()
        }
        _ => None,
    };
    let Some(rule) = rule else { return before.map(Value::Object) };
    let usual = rule.quantization().format;
    let was_quantized = before.is_some();
    let mut table =
        before.unwrap_or_else(|| hub::format_entry(usual).as_object().cloned().unwrap_or_default());
    let quantized = pieces.iter().filter_map(|piece| Some((piece.module.clone()?, piece.format?)));
    // A recipe's modules are all named, as mlx-lm does.
    let named = quantized
        .filter(|(_, format)| was_quantized || rule.quantization().recipe.is_some() || *format != usual);
    table.extend(named.map(|(module, format)| (module, hub::format_entry(format))).collect::<Map<_, _>>());
    Some(Value::Object(table))
}

/// MLX on the CPU as the quantizer of a GGUF file's rows.
pub struct MlxQuantizer {
    stream: Stream,
}

impl MlxQuantizer {
    /// Takes MLX into use on this thread.
    ///
    /// # Errors
    /// MLX does not work here.
    pub fn new() -> Result<Self, Error> {
        begin()?;
        Ok(Self { stream: Stream::new_with_device(&Device::cpu()) })
    }
}

impl Quantizer for MlxQuantizer {
    fn quantize(
        &mut self,
        rows: &[u8],
        columns: usize,
        dtype: hub::Dtype,
        format: QuantFormat,
    ) -> Result<Vec<Vec<u8>>, HubError> {
        let dtype = match dtype {
            hub::Dtype::F16 => Dtype::Float16,
            hub::Dtype::BF16 => Dtype::Bfloat16,
            _ => Dtype::Float32,
        };
        let quantized = || -> Result<Vec<Vec<u8>>, Error> {
            let bytes = Array::from_slice(rows, &[dim(rows.len())]);
            let matrix = bytes.view_dtype(dtype)?.reshape(&[-1, dim(columns)])?;
            let packed = ffi::quantize(&matrix, format)?;
            packed.iter().map(|array| bytes_of(array, <[u8]>::to_vec)).collect()
        };
        with_stream(&self.stream, quantized)
            .map_err(|error| HubError::Unsupported { why: format!("quantization failed: {error}") })
    }
}
