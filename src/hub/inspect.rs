//! Reads the headers of a model's weight files and checks every claim in them: a tensor has a known dtype,
//! the bytes that its shape needs, and a place of its own; together the tensors fill the file exactly. Tensor
//! data is not read. The loader relies on these checks, because MLX trusts its input.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use safetensors::Dtype;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::HubError;
use super::error::file_name;
use super::read::{open_regular, read_object};

/// The format allows 100 MB; a model with 100,000 tensors needs about 12.
const HEADER_BYTES_MAX: u64 = 32 << 20;
/// Large enough for the headers of all shards.
pub(super) const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Says which file has which tensor, where a model has several files.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Bytes of the length that a header begins with.
const LENGTH_BYTES: usize = 8;
/// MLX counts dimensions in 32 bits.
const DIMENSION_MAX: usize = i32::MAX as usize;

/// The tensors of a model, by file.
#[derive(Clone, Debug, Default)]
pub struct WeightIndex {
    /// The files, sorted by name.
    pub files: Vec<WeightFile>,
    /// Files that `model.safetensors.index.json` does not name. A tensor of theirs counts only where no other
    /// file has one of its name.
    pub spare: Vec<WeightFile>,
    /// Number of tensors in `files`.
    pub tensors_count: usize,
    /// Bytes of their tensors, as stored.
    pub bytes: u64,
    /// What is odd about the files and does no harm.
    pub warning: Option<String>,
}

/// One safetensors file.
#[derive(Clone, Debug)]
pub struct WeightFile {
    /// Its path.
    pub path: PathBuf,
    /// Its tensors, in the order of their data.
    pub tensors: Vec<TensorInfo>,
    /// Size of its header.
    header_bytes: u64,
    /// Its size and time when the header was read.
    stamp: Option<Stamp>,
}

/// A weight file that is open.
#[derive(Debug)]
pub struct OpenWeights {
    /// The file.
    pub file: File,
    /// Its beginning: the length of the header, in 8 bytes, and the header.
    pub head: Vec<u8>,
    /// Its size.
    pub bytes: u64,
}

/// Identifies a state of a file: its size in bytes and the time of its last change.
type Stamp = (u64, Option<SystemTime>);

/// One tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, as in `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Size in bytes.
    pub bytes: u64,
}

impl WeightIndex {
    /// Returns every tensor of `files`.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.files.iter().flat_map(|file| &file.tensors)
    }

    /// Returns every file, those that the index does not name last, and whether it is one of these.
    pub fn all(&self) -> impl Iterator<Item = (&WeightFile, bool)> {
        let spare = self.spare.iter().map(|file| (file, true));
        self.files.iter().map(|file| (file, false)).chain(spare)
    }

    /// Checks that no file changed since its header was read. Compares sizes and times; reads no file.
    ///
    /// # Errors
    /// `Changed`, naming the file; `Io`.
    pub fn check_unchanged(&self) -> Result<(), HubError> {
        for WeightFile { path, stamp, .. } in self.files.iter().chain(&self.spare) {
            let now = match fs::metadata(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                found => Some(stamp_of(&found.map_err(HubError::io(path))?)),
            };
            if stamp.is_some() && *stamp != now {
                return Err(HubError::Changed { file: file_name(path) });
            }
        }
        Ok(())
    }
}

impl WeightFile {
    /// Opens the file and reads its header again. From then on nothing can take its place.
    ///
    /// # Errors
    /// `Changed` if it is not what was checked; `Damaged`; `Io`.
    pub fn open(&self) -> Result<OpenWeights, HubError> {
        let changed = || HubError::Changed { file: self.name() };
        let (file, metadata) = open_regular(&self.path)?.ok_or_else(changed)?;
        if self.stamp.is_some_and(|stamp| stamp != stamp_of(&metadata)) {
            return Err(changed());
        }
        let header_bytes = usize::try_from(self.header_bytes).map_err(|_| changed())?;
        let mut head = vec![0; LENGTH_BYTES + header_bytes];
        file.read_exact_at(&mut head, 0).map_err(HubError::io(&self.path))?;
        if head[..LENGTH_BYTES] != self.header_bytes.to_le_bytes() {
            return Err(changed());
        }
        Ok(OpenWeights { file, head, bytes: metadata.len() })
    }

    /// Returns its name within the model's folder.
    #[must_use]
    pub fn name(&self) -> String {
        file_name(&self.path)
    }

    /// Makes an index entry of tensors that are in no file.
    #[cfg(test)]
    pub(crate) fn of_tensors(path: PathBuf, tensors: Vec<TensorInfo>) -> Self {
        Self { path, tensors, header_bytes: 0, stamp: None }
    }
}

fn stamp_of(metadata: &fs::Metadata) -> Stamp {
    (metadata.len(), metadata.modified().ok())
}

/// Returns whether mlx-lm would load this file: its glob is `model*.safetensors`.
pub(super) fn is_weight_file(name: &str) -> bool {
    name.starts_with("model") && name.ends_with(".safetensors")
}

/// The weight files of a folder.
struct Chosen {
    names: Vec<String>,
    spare: Vec<String>,
    warning: Option<String>,
    /// The file that has a tensor, as the index promises.
    promised: Vec<(String, String)>,
}

/// Checks the weight files of a model's folder and lists their tensors.
///
/// # Errors
/// `Incomplete` if there is no weight file, or one that the index names is missing; `Damaged`, naming file
/// and tensor, if one is cut short, lies about its tensors or repeats a name; `Unsupported` for a dtype MLX
/// does not have; `Io`.
pub fn inspect(folder: &Path) -> Result<WeightIndex, HubError> {
    let Chosen { names, spare, warning, promised } = choose(folder)?;
    let mut places: BTreeMap<String, String> = BTreeMap::new();
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        let path = folder.join(&name);
        let file = read_header(&path)?;
        for tensor in &file.tensors {
            if let Some(other) = places.insert(tensor.name.clone(), name.clone()) {
                return Err(HubError::damaged(&path, format!("tensor {} is in {other} too", tensor.name)));
            }
        }
        files.push(file);
    }
    // What is not needed may be damaged.
    let spare: Vec<WeightFile> =
        spare.into_iter().filter_map(|name| read_header(&folder.join(name)).ok()).collect();
    let has = |tensor: &str| spare.iter().any(|file| file.tensors.iter().any(|known| known.name == tensor));
    if let Some((tensor, file)) =
        promised.iter().find(|(tensor, _)| !places.contains_key(tensor) && !has(tensor))
    {
        let why = format!("promises tensor {tensor} in {file}; it is not there");
        return Err(HubError::damaged(&folder.join(INDEX), why));
    }
    let bytes = files.iter().flat_map(|file| &file.tensors).map(|tensor| tensor.bytes).sum();
    Ok(WeightIndex { files, spare, tensors_count: places.len(), bytes, warning })
}

/// Checks that the weight files are there, without a look into them.
///
/// # Errors
/// As [`inspect`], for a file that is missing and for an index that cannot be read.
pub(super) fn check_present(folder: &Path) -> Result<(), HubError> {
    choose(folder).map(drop)
}

/// Finds the weight files, and those that the index does not name.
fn choose(folder: &Path) -> Result<Chosen, HubError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(HubError::io(folder))? {
        let name = file_name(&entry.map_err(HubError::io(folder))?.path());
        if is_weight_file(&name) {
            found.push(name);
        }
    }
    found.sort();
    let promised = read_index(&folder.join(INDEX))?;
    let named: BTreeSet<String> = promised.iter().map(|(_, file)| file.clone()).collect();
    let (there, missing): (Vec<String>, Vec<String>) =
        named.into_iter().partition(|name| is_plain(name) && fs::symlink_metadata(folder.join(name)).is_ok());
    if there.is_empty() && !found.is_empty() {
        let warning = missing
            .first()
            .map(|first| format!("{INDEX} is not used: no file that it names is there, {first} for one"));
        return Ok(Chosen { names: found, spare: Vec::new(), warning, promised: Vec::new() });
    }
    match missing.first() {
        Some(first) => {
            let why = format!("names {first} among {} files; it is not there", there.len() + missing.len());
            Err(HubError::incomplete(&folder.join(INDEX), why))
        }
        None if there.is_empty() => {
            Err(HubError::incomplete(&folder.join("model.safetensors"), "is missing"))
        }
        None => {
            found.retain(|name| !there.contains(name));
            let warning = found.first().map(|first| format!("{first} is not used: {INDEX} does not name it"));
            Ok(Chosen { names: there, spare: found, warning, promised })
        }
    }
}

/// Reads the file of each tensor from the index; nothing if there is none.
fn read_index(path: &Path) -> Result<Vec<(String, String)>, HubError> {
    if fs::symlink_metadata(path).is_err() {
        return Ok(Vec::new());
    }
    let index = read_object(path, INDEX_BYTES_MAX)?;
    let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
        return Err(HubError::damaged(path, "has no weight_map"));
    };
    let places = map.iter().map(|(tensor, file)| match file.as_str() {
        Some(file) => Ok((tensor.clone(), file.to_owned())),
        None => Err(HubError::damaged(path, format!("names no file for tensor {tensor}"))),
    });
    places.collect()
}

/// Whether a name is that of a file in the folder itself.
fn is_plain(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains(['/', '\0'])
}

/// Reads and checks one file's header: its length (8 bytes, little-endian), then JSON; the data follows.
fn read_header(path: &Path) -> Result<WeightFile, HubError> {
    let damaged = |why: String| HubError::damaged(path, why);
    let (mut file, metadata) = open_regular(path)?.ok_or_else(|| damaged("is missing".into()))?;
    let (file_bytes, stamp) = (metadata.len(), stamp_of(&metadata));
    let mut length = [0; LENGTH_BYTES];
    if file_bytes < 8 {
        return Err(damaged("is too short for a safetensors file".into()));
    }
    file.read_exact(&mut length).map_err(HubError::io(path))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES_MAX {
        return Err(damaged(format!("says its header has {header_bytes} bytes; at most {HEADER_BYTES_MAX}")));
    }
    let Some(data_bytes) = (file_bytes - 8).checked_sub(header_bytes) else {
        return Err(damaged("ends within its header".into()));
    };
    let mut header = Vec::new();
    file.take(header_bytes).read_to_end(&mut header).map_err(HubError::io(path))?;
    let mut json = serde_json::Deserializer::from_slice(&header);
    let entries = json
        .deserialize_map(Entries)
        .and_then(|entries| json.end().map(|()| entries))
        .map_err(|error| damaged(format!("has a header that is not valid: {error}")))?;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, value) in entries {
        if name != "__metadata__" {
            tensors.push(tensor_info(path, name, value)?);
        }
    }
    let tensors = place(path, tensors, data_bytes)?;
    Ok(WeightFile { path: path.to_owned(), tensors, header_bytes, stamp: Some(stamp) })
}

/// Checks one entry by itself; returns its offset too.
fn tensor_info(path: &Path, name: String, value: Value) -> Result<(usize, TensorInfo), HubError> {
    let damaged = |why: String| HubError::damaged(path, format!("tensor {name}: {why}"));
    let info: safetensors::tensor::TensorInfo =
        serde_json::from_value(value).map_err(|error| damaged(error.to_string()))?;
    if !mlx_has(info.dtype) {
        let file = file_name(path);
        return Err(HubError::unsupported(format!("{file}: tensor {name}: MLX has no dtype {}", info.dtype)));
    }
    if info.shape.iter().any(|&dimension| dimension > DIMENSION_MAX) {
        return Err(damaged(format!("shape {:?} has a dimension over {DIMENSION_MAX}", info.shape)));
    }
    let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, &n| bits.checked_mul(n));
    let (start, end) = info.data_offsets;
    let bytes = end.checked_sub(start);
    if bytes.is_none() || bytes.and_then(|bytes| bytes.checked_mul(8)) != bits {
        return Err(damaged(format!("{} {:?} does not fit bytes {start} to {end}", info.dtype, info.shape)));
    }
    let bytes = (end - start) as u64;
    Ok((start, TensorInfo { name, dtype: info.dtype, shape: info.shape, bytes }))
}

/// Checks that the tensors fill the data without gap or overlap; returns them in that order.
fn place(
    path: &Path,
    mut tensors: Vec<(usize, TensorInfo)>,
    data_bytes: u64,
) -> Result<Vec<TensorInfo>, HubError> {
    // Empty tensors share their start with the next one; by size they come first.
    tensors.sort_by(|a, b| (a.0, a.1.bytes, &a.1.name).cmp(&(b.0, b.1.bytes, &b.1.name)));
    let mut next = 0;
    let mut names = BTreeSet::new();
    for (start, tensor) in &tensors {
        let name = &tensor.name;
        if *start as u64 != next {
            let why = if (*start as u64) < next { "overlaps another" } else { "leaves a gap before it" };
            return Err(HubError::damaged(path, format!("tensor {name}: {why}")));
        }
        next += tensor.bytes;
        if next > data_bytes {
            return Err(HubError::damaged(path, format!("is cut short within tensor {name}")));
        }
        if !names.insert(name) {
            return Err(HubError::damaged(path, format!("tensor {name} is in the header twice")));
        }
    }
    if next != data_bytes {
        return Err(HubError::damaged(path, format!("has {} bytes that no tensor owns", data_bytes - next)));
    }
    Ok(tensors.into_iter().map(|(_, tensor)| tensor).collect())
}

/// Returns whether MLX's own safetensors reader takes it (mlx/io/safetensors.cpp).
fn mlx_has(dtype: Dtype) -> bool {
    matches!(
        dtype,
        Dtype::BOOL
            | Dtype::U8
            | Dtype::I8
            | Dtype::F8_E4M3
            | Dtype::U16
            | Dtype::I16
            | Dtype::F16
            | Dtype::BF16
            | Dtype::U32
            | Dtype::I32
            | Dtype::F32
            | Dtype::U64
            | Dtype::I64
            | Dtype::C64
    )
}

/// Collects the header's entries, repeated names included: a map would keep only the last.
struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Vec<(String, Value)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(entries)
    }
}

#[cfg(test)]
#[path = "inspect_tests.rs"]
mod tests;
