//! Streams the tensors of a GGUF file to their places in the weight files, a few megabytes at a time.

use safetensors::Dtype;

use super::super::HubError;
use super::blocks::{GROUP, Parts, Stored};
use super::draft::Draft;
use super::gguf::{Gguf, Tensor};
use super::llama::Source;
use super::shards::WeightsWriter;
use super::{Watch, told};
use crate::hub::TensorInfo;

/// Bytes of the GGUF file converted at a time, or one head's rows if they are more.
const CHUNK_BYTES: usize = 1 << 20;

/// A source and where its parts go: the weight, then scales and biases if it is affine.
struct Job<'a> {
    source: &'a Source,
    tensor: &'a Tensor,
    parts: Vec<TensorInfo>,
}

/// Writes the weight files; returns the number of tensors and their bytes.
pub(super) fn weights(
    draft: &Draft,
    gguf: &Gguf,
    sources: &[Source],
    head_dim: usize,
    watch: &mut Watch<'_>,
) -> Result<(usize, u64), HubError> {
    let mut jobs = Vec::with_capacity(sources.len());
    for source in sources {
        let Some(tensor) = gguf.tensors.get(&source.from) else {
            return Err(gguf.damaged(format!("has no tensor {}", source.from)));
        };
        let parts = outputs(source, tensor).into_iter().map(|(leaf, dtype, shape)| {
            let bytes = (shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64;
            TensorInfo { name: format!("{}.{leaf}", source.module), dtype, shape, bytes }
        });
        jobs.push(Job { source, tensor, parts: parts.collect() });
    }
    let parameters = jobs.iter().map(|job| job.tensor.dims.iter().map(|&dim| dim as u64).product::<u64>());
    let tensors: Vec<TensorInfo> = jobs.iter().flat_map(|job| job.parts.clone()).collect();
    let writer = draft.weights(&tensors, parameters.sum())?;
    let total = jobs.iter().map(|job| job.tensor.bytes).sum();
    let mut done = 0;
    told(watch, done, total)?;
    for job in &jobs {
        job.run(gguf, head_dim, &writer)?;
        done += job.tensor.bytes;
        told(watch, done, total)?;
    }
    let written = (writer.tensors_count(), writer.bytes());
    writer.finish()?;
    Ok(written)
}

/// Names, dtypes and shapes of what a source becomes.
fn outputs(source: &Source, tensor: &Tensor) -> Vec<(&'static str, Dtype, Vec<usize>)> {
    let shape: Vec<usize> = tensor.dims.iter().rev().copied().collect();
    let with_row = |len: usize| {
        let mut shape = shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = len;
        }
        shape
    };
    let row = tensor.dims[0];
    match tensor.kind.stored() {
        Stored::Same(dtype) => vec![(source.leaf, dtype, shape)],
        Stored::Rounded => vec![(source.leaf, Dtype::F16, shape)],
        Stored::Affine(bits) => vec![
            (source.leaf, Dtype::U32, with_row(row * bits / 32)),
            ("scales", Dtype::F32, with_row(row / GROUP)),
            ("biases", Dtype::F32, with_row(row / GROUP)),
        ],
    }
}

impl Job<'_> {
    /// Converts the tensor chunk by chunk.
    fn run(&self, gguf: &Gguf, head_dim: usize, writer: &WeightsWriter) -> Result<(), HubError> {
        let (elements, block_bytes) = self.tensor.kind.block();
        // A bias is one row to GGUF; its elements move like rows.
        let row_len = if self.tensor.dims.len() == 1 { 1 } else { self.tensor.dims[0] };
        let row_bytes = row_len / elements * block_bytes;
        let rows_at_once = if self.source.permuted { head_dim } else { (CHUNK_BYTES / row_bytes).max(1) };
        let chunk_bytes = (rows_at_once * row_bytes) as u64;
        let mut input = Vec::new();
        let mut ordered = Vec::new();
        let mut parts = Parts::default();
        let mut read = 0;
        let mut written = [0; 3];
        while read < self.tensor.bytes {
            let bytes = chunk_bytes.min(self.tensor.bytes - read);
            input.resize(usize::try_from(bytes).unwrap_or(usize::MAX), 0);
            gguf.read(self.tensor.offset + read, &mut input)?;
            read += bytes;
            parts.clear();
            if self.source.permuted {
                ordered.clear();
                unpermute(&input, row_bytes, &mut ordered);
                self.tensor.kind.convert(&ordered, &mut parts);
            } else {
                self.tensor.kind.convert(&input, &mut parts);
            }
            let outputs = [&parts.weight, &parts.scales, &parts.biases];
            for ((part, bytes), at) in self.parts.iter().zip(outputs).zip(&mut written) {
                writer.write(&part.name, *at, bytes)?;
                *at += bytes.len() as u64;
            }
        }
        // A defect here would leave zeros in a model that looks whole.
        assert!(self.parts.iter().zip(written).all(|(part, written)| part.bytes == written));
        Ok(())
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
