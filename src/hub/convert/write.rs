//! Writes the folder of a converted model. Tensors stream from the GGUF file to their places in
//! `model.safetensors`, a few megabytes at a time. Everything is written beside the destination, under a
//! hidden name, and takes its own name when it is complete and on disk.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::super::HubError;
use super::blocks::{GROUP, Parts, Stored};
use super::gguf::{Gguf, Tensor};
use super::llama::Source;

/// Bytes of the GGUF file converted at a time, or one head's rows if they are more.
const CHUNK_BYTES: usize = 1 << 20;

/// A tensor of the output.
struct Placed {
    /// From the start of the data.
    offset: u64,
    bytes: u64,
}

/// A source and where its parts go: the weight, then scales and biases if it is affine.
struct Job<'a> {
    source: &'a Source,
    tensor: &'a Tensor,
    parts: Vec<Placed>,
}

/// Writes bytes of a part: its number in [`Job::parts`], and where in it.
type WritePart<'a> = dyn FnMut(usize, u64, &[u8]) -> Result<(), HubError> + 'a;

/// Sizes of what was written.
pub(super) struct Written {
    pub(super) tensors_count: usize,
    pub(super) bytes: u64,
}

/// Writes `model.safetensors`.
pub(super) fn weights(
    path: &Path,
    gguf: &Gguf,
    sources: &[Source],
    head_dim: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, HubError> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "mlx"}));
    let mut data_bytes = 0;
    let mut jobs = Vec::with_capacity(sources.len());
    for source in sources {
        let Some(tensor) = gguf.tensors.get(&source.from) else {
            return Err(gguf.damaged(format!("has no tensor {}", source.from)));
        };
        let mut parts = Vec::with_capacity(3);
        for (leaf, dtype, shape) in outputs(source, tensor) {
            let bytes = (shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64;
            let entry = json!({
                "dtype": dtype.to_string(),
                "shape": shape,
                "data_offsets": [data_bytes, data_bytes + bytes],
            });
            header.insert(format!("{}.{leaf}", source.module), entry);
            parts.push(Placed { offset: data_bytes, bytes });
            data_bytes += bytes;
        }
        jobs.push(Job { source, tensor, parts });
    }
    let mut bytes = vec![0; 8];
    serde_json::to_writer(&mut bytes, &header).map_err(|error| HubError::io(path)(error.into()))?;
    // Spaces align the data, as every writer of the format does.
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    let length = (bytes.len() - 8) as u64;
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    let file = File::create_new(path).map_err(HubError::io(path))?;
    file.write_all_at(&bytes, 0).map_err(HubError::io(path))?;
    let total = jobs.iter().map(|job| job.tensor.bytes).sum();
    let mut done = 0;
    progress(done, total);
    for job in &jobs {
        let start = bytes.len() as u64;
        job.run(gguf, head_dim, &mut |part, offset, bytes| {
            file.write_all_at(bytes, start + job.parts[part].offset + offset).map_err(HubError::io(path))
        })?;
        done += job.tensor.bytes;
        progress(done, total);
    }
    file.sync_all().map_err(HubError::io(path))?;
    Ok(Written { tensors_count: header.len() - 1, bytes: data_bytes })
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
    fn run(&self, gguf: &Gguf, head_dim: usize, write: &mut WritePart<'_>) -> Result<(), HubError> {
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
            for (part, bytes) in outputs.into_iter().enumerate().take(self.parts.len()) {
                write(part, written[part], bytes)?;
                written[part] += bytes.len() as u64;
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

/// Writes a JSON file, `pretty` if people read it.
pub(super) fn json_file(path: &Path, value: &Value, pretty: bool) -> Result<(), HubError> {
    let text = if pretty { serde_json::to_vec_pretty(value) } else { serde_json::to_vec(value) };
    let text = text.map_err(|error| HubError::io(path)(error.into()))?;
    let file = File::create_new(path).map_err(HubError::io(path))?;
    file.write_all_at(&text, 0).and_then(|()| file.sync_all()).map_err(HubError::io(path))
}

/// A folder that takes its name when it is complete, and vanishes if it never is.
pub(super) struct Draft {
    pub(super) path: PathBuf,
    out: PathBuf,
}

impl Draft {
    /// Makes the hidden folder beside `out`. `out` may be an empty folder, or, to be replaced, a model's.
    pub(super) fn new(out: &Path, overwrite: bool) -> Result<Self, HubError> {
        let refuse = |why: &str| Err(HubError::io(out)(io::Error::new(io::ErrorKind::AlreadyExists, why)));
        if out.exists() && !is_empty(out)? {
            if !overwrite {
                return refuse("exists and has files in it");
            }
            // Whoever names a wrong folder must not lose it.
            if !out.join("config.json").is_file() {
                return refuse("is not a model's folder, so it is not replaced");
            }
        }
        let path = beside(out, "partial")?;
        fs::create_dir_all(&path).map_err(HubError::io(&path))?;
        Ok(Self { path, out: out.to_path_buf() })
    }

    /// Puts the folder in its place.
    pub(super) fn finish(self) -> Result<(), HubError> {
        let sync = |path: &Path| File::open(path)?.sync_all();
        sync(&self.path).map_err(HubError::io(&self.path))?;
        let old = beside(&self.out, "old")?;
        let replaces = self.out.exists();
        if replaces {
            fs::rename(&self.out, &old).map_err(HubError::io(&self.out))?;
        }
        if let Err(error) = fs::rename(&self.path, &self.out) {
            if replaces {
                // The first error is what the caller must hear; the old folder is back or under its hidden
                // name.
                let _ = fs::rename(&old, &self.out);
            }
            return Err(HubError::io(&self.out)(error));
        }
        if replaces {
            fs::remove_dir_all(&old).map_err(HubError::io(&old))?;
        }
        let parent = self.out.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync(parent.unwrap_or(Path::new("."))).map_err(HubError::io(&self.out))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // After `finish` it is gone; before, nobody can use it.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn is_empty(folder: &Path) -> Result<bool, HubError> {
    Ok(fs::read_dir(folder).map_err(HubError::io(folder))?.next().is_none())
}

/// A hidden name beside `out` that is free. Model roots skip hidden names.
fn beside(out: &Path, what: &str) -> Result<PathBuf, HubError> {
    let Some(name) = out.file_name() else {
        return Err(HubError::io(out)(io::Error::new(io::ErrorKind::InvalidInput, "names no folder")));
    };
    let process = std::process::id();
    let free = (0..1000)
        .map(|i| out.with_file_name(format!(".{}.{what}-{process}-{i}", name.to_string_lossy())))
        .find(|path| !path.exists());
    free.ok_or_else(|| HubError::io(out)(io::Error::from(io::ErrorKind::AlreadyExists)))
}
