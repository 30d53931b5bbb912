//! Streams the tensors of a GGUF file to their places in the weight files, a few megabytes at a time.

use half::{bf16, f16};
use safetensors::Dtype;

use super::super::HubError;
use super::blocks::{GROUP, Parts, Stored};
use super::draft::Draft;
use super::gguf::{Gguf, Tensor};
use super::shards::WeightsWriter;
use super::tensors::Source;
use super::{Watch, told};
use crate::hub::TensorInfo;
use crate::quantize::{QuantFormat, QuantMode, QuantRule};

/// Bytes of the GGUF file converted at a time, or one head's rows if they are more.
const CHUNK_BYTES: usize = 1 << 20;

/// Quantizes rows; MLX does.
pub trait Quantizer {
    /// Returns elements, scales, and in the affine mode biases, of rows of `columns` elements in `dtype`.
    ///
    /// # Errors
    /// The device refuses.
    fn quantize(
        &mut self,
        rows: &[u8],
        columns: usize,
        dtype: Dtype,
        format: QuantFormat,
    ) -> Result<Vec<Vec<u8>>, HubError>;
}

/// What tensors become.
#[derive(Debug)]
pub(super) struct Target {
    /// Dtype of floats; None: as the file has them.
    pub(super) dtype: Option<Dtype>,
    /// How matrices are quantized; None: as the file has them, or not at all if `dtype` is given.
    pub(super) rule: Option<QuantRule>,
}

/// What a tensor becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// What is in the file, as MLX writes it.
    Stored(Stored),
    /// Floats.
    Dense(Dtype),
    /// Quantized anew, with scales in this dtype.
    Quantized(QuantFormat, Dtype),
}

impl Target {
    /// Returns what a tensor becomes.
    pub(super) fn form(&self, source: &Source, tensor: &Tensor) -> Form {
        let float = match (self.dtype, &self.rule) {
            (None, None) if source.less_one => return Form::Dense(Dtype::F32),
            (None, None) => return Form::Stored(tensor.kind.stored()),
            (dtype, _) => dtype.unwrap_or(Dtype::F16),
        };
        let columns = source.shape.last().copied().unwrap_or(0);
        let rule = self.rule.as_ref().filter(|_| source.is_matrix());
        match rule.and_then(|rule| rule.format(&source.module, columns)) {
            Some(format) => Form::Quantized(format, float),
            None => Form::Dense(float),
        }
    }
}

/// A source and where its parts go: the weight, then scales and biases.
struct Job<'a> {
    source: &'a Source,
    tensor: &'a Tensor,
    form: Form,
    parts: Vec<TensorInfo>,
}

/// A GGUF file on its way.
pub(super) struct Stream<'a> {
    pub(super) gguf: &'a Gguf,
    pub(super) target: &'a Target,
    /// Rows of a head.
    pub(super) head_dim: usize,
    pub(super) quantizer: &'a mut dyn Quantizer,
}

impl Stream<'_> {
    /// Writes the weight files; returns the number of tensors and their bytes.
    pub(super) fn write(
        &mut self,
        draft: &Draft,
        sources: &[Source],
        watch: &mut Watch<'_>,
    ) -> Result<(usize, u64), HubError> {
        let mut jobs = Vec::with_capacity(sources.len());
        for source in sources {
            let Some(tensor) = self.gguf.tensors.get(&source.from) else {
                return Err(self.gguf.damaged(format!("has no tensor {}", source.from)));
            };
            let form = self.target.form(source, tensor);
            let parts = outputs(source, form).into_iter().map(|(leaf, dtype, shape)| {
                let bytes = (shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64;
                TensorInfo { name: format!("{}.{leaf}", source.module), dtype, shape, bytes }
            });
            jobs.push(Job { source, tensor, form, parts: parts.collect() });
        }
        let elements =
            jobs.iter().map(|job| job.source.shape.iter().map(|&size| size as u64).product::<u64>());
        let tensors: Vec<TensorInfo> = jobs.iter().flat_map(|job| job.parts.clone()).collect();
        let writer = draft.weights(&tensors, elements.sum())?;
        let total = jobs.iter().map(|job| job.tensor.bytes).sum();
        let mut done = 0;
        told(watch, done, total)?;
        for job in &jobs {
            self.run(job, &writer)?;
            done += job.tensor.bytes;
            told(watch, done, total)?;
        }
        let written = (writer.tensors_count(), writer.bytes());
        writer.finish()?;
        Ok(written)
    }

    /// Converts a tensor chunk by chunk.
    fn run(&mut self, job: &Job<'_>, writer: &WeightsWriter) -> Result<(), HubError> {
        let Job { source, tensor, form, parts } = job;
        let (elements, block_bytes) = tensor.kind.block();
        // A bias is one row to GGUF; its elements move like rows.
        let row_len = if tensor.dims.len() == 1 { 1 } else { tensor.dims[0] };
        let row_bytes = row_len / elements * block_bytes;
        let rows_at_once = match (source.permuted, *form) {
            (true, _) => self.head_dim,
            // One row that the file keeps as a vector goes to the quantizer whole.
            (false, Form::Quantized(..)) if tensor.dims.len() == 1 => tensor.dims[0],
            (false, _) => (CHUNK_BYTES / row_bytes).max(1),
        };
        let chunk_bytes = (rows_at_once * row_bytes) as u64;
        let (mut input, mut ordered) = (Vec::new(), Vec::new());
        let mut read = 0;
        let mut written = vec![0; parts.len()];
        while read < tensor.bytes {
            let bytes = chunk_bytes.min(tensor.bytes - read);
            input.resize(usize::try_from(bytes).unwrap_or(usize::MAX), 0);
            self.gguf.read(tensor, read, &mut input)?;
            read += bytes;
            if source.permuted {
                ordered.clear();
                unpermute(&input, row_bytes, &mut ordered);
                std::mem::swap(&mut input, &mut ordered);
            }
            let outputs = self.converted(job, &input)?;
            for ((part, bytes), at) in parts.iter().zip(outputs).zip(&mut written) {
                writer.write(&part.name, *at, &bytes)?;
                *at += bytes.len() as u64;
            }
        }
        // A defect here would leave zeros in a model that looks whole.
        assert!(parts.iter().zip(&written).all(|(part, written)| part.bytes == *written));
        Ok(())
    }

    /// Returns what whole rows become, part by part.
    fn converted(&mut self, job: &Job<'_>, rows: &[u8]) -> Result<Vec<Vec<u8>>, HubError> {
        let kind = job.tensor.kind;
        let dtype = match job.form {
            Form::Stored(_) => {
                let mut parts = Parts::default();
                kind.convert(rows, &mut parts);
                return Ok(vec![parts.weight, parts.scales, parts.biases]);
            }
            Form::Dense(dtype) | Form::Quantized(_, dtype) => dtype,
        };
        let mut floats = Vec::new();
        kind.dequantize(rows, &mut floats);
        if job.source.less_one {
            floats.iter_mut().for_each(|float| *float -= 1.0);
        }
        let floats = cast(&floats, dtype);
        let Form::Quantized(format, _) = job.form else { return Ok(vec![floats]) };
        let columns = job.source.shape.last().copied().unwrap_or(0);
        self.quantizer.quantize(&floats, columns, dtype, format)
    }
}

/// Names, dtypes and shapes of what a source becomes.
fn outputs(source: &Source, form: Form) -> Vec<(&'static str, Dtype, Vec<usize>)> {
    let with_row = |len: usize| {
        let mut shape = source.shape.clone();
        shape.last_mut().into_iter().for_each(|last| *last = len);
        shape
    };
    let row = source.shape.last().copied().unwrap_or(0);
    let (bits, group, scales, is_affine) = match form {
        Form::Stored(Stored::Same(dtype)) | Form::Dense(dtype) => {
            return vec![(source.leaf, dtype, source.shape.clone())];
        }
        Form::Stored(Stored::Rounded) => return vec![(source.leaf, Dtype::F16, source.shape.clone())],
        Form::Stored(Stored::Affine(bits)) => (bits, GROUP, Dtype::F32, true),
        Form::Quantized(QuantFormat { mode, bits, group_size }, float) => {
            let is_affine = mode == QuantMode::Affine;
            (bits as usize, group_size as usize, if is_affine { float } else { Dtype::U8 }, is_affine)
        }
    };
    let mut outputs =
        vec![(source.leaf, Dtype::U32, with_row(row * bits / 32)), ("scales", scales, with_row(row / group))];
    outputs.extend(is_affine.then(|| ("biases", scales, with_row(row / group))));
    outputs
}

/// Returns floats in a dtype, rounded to the nearest.
fn cast(floats: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F16 => floats.iter().flat_map(|&float| f16::from_f32(float).to_le_bytes()).collect(),
        Dtype::BF16 => floats.iter().flat_map(|&float| bf16::from_f32(float).to_le_bytes()).collect(),
        _ => floats.iter().flat_map(|float| float.to_le_bytes()).collect(),
    }
}

/// One head's rows, from neighbours paired (a0 b0 a1 b1 …) to halves paired (a0 a1 … b0 b1 …).
fn unpermute(head: &[u8], row_bytes: usize, ordered: &mut Vec<u8>) {
    for half in 0..2 {
        for row in head.chunks_exact(row_bytes).skip(half).step_by(2) {
            ordered.extend_from_slice(row);
        }
    }
}
