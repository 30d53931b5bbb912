//! Reads a GGUF file's header, versions 2 and 3, little-endian: metadata, and where each tensor lies
//! (ggml's docs/gguf.md). Counts, lengths and offsets come from strangers: each has a limit and is checked
//! against the file's size before memory is taken, and tensors may not overlap.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::super::HubError;
use super::super::read::open_regular;
use super::blocks::Kind;

/// Real files have about 50 keys.
const KEYS_MAX: u64 = 1 << 14;
/// A model of 126 layers has about 1,200 tensors.
const TENSORS_MAX: u64 = 1 << 17;
/// The specification's limit for names is 64 KiB; the longest texts are chat templates.
const TEXT_BYTES_MAX: u64 = 4 << 20;
/// The largest vocabularies have 262,144 tokens, with twice as many merges.
const ARRAY_LEN_MAX: u64 = 1 << 22;
/// Files of one model; each is held open.
const PARTS_MAX: u64 = 200;

/// A value of the metadata.
#[derive(Debug)]
pub(super) enum Meta {
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    Texts(Vec<String>),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    /// An array that no caller needs.
    Skipped,
}

/// Where a tensor lies and what it is.
#[derive(Debug)]
pub(super) struct Tensor {
    /// Number of the file.
    part: usize,
    pub(super) kind: Kind,
    /// As GGUF counts them: the first is the length of a row.
    pub(super) dims: Vec<usize>,
    /// From the file's start.
    offset: u64,
    pub(super) bytes: u64,
}

/// A GGUF file, or the files that a model was split into, headers read.
#[derive(Debug)]
pub(super) struct Gguf {
    path: PathBuf,
    /// The files; the metadata is the first one's.
    parts: Vec<(PathBuf, File)>,
    pub(super) tensors: BTreeMap<String, Tensor>,
    meta: BTreeMap<String, Meta>,
}

impl Gguf {
    /// Opens a file; with the first of several parts the others (llama.cpp's gguf-split).
    pub(super) fn open(path: &Path) -> Result<Self, HubError> {
        let mut whole = Self::open_one(path)?;
        let count = whole.uint("split.count")?.unwrap_or(1);
        if count <= 1 {
            return Ok(whole);
        }
        let number = whole.uint("split.no")?.unwrap_or(0);
        if number != 0 || count > PARTS_MAX {
            let why = format!(
                "the GGUF file is part {} of {count}; the first of at most {PARTS_MAX} is needed",
                number + 1
            );
            return Err(HubError::unsupported(why));
        }
        let end = format!("-00001-of-{count:05}.gguf");
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(start) = name.and_then(|name| name.strip_suffix(&end)) else {
            return Err(
                whole.damaged(format!("is the first of {count} parts, but its name does not end with {end}"))
            );
        };
        for number in 1..count {
            let other = path.with_file_name(format!("{start}-{:05}-of-{count:05}.gguf", number + 1));
            whole.join(Self::open_one(&other)?, number, count)?;
        }
        let tensors_count = whole.uint("split.tensors.count")?;
        if tensors_count.is_some_and(|promised| promised != whole.tensors.len() as u64) {
            return Err(whole.damaged(format!(
                "and its parts have {} tensors, not as many as it says",
                whole.tensors.len()
            )));
        }
        Ok(whole)
    }

    /// Adds the tensors of another part.
    fn join(&mut self, other: Self, number: u64, count: u64) -> Result<(), HubError> {
        if (other.uint("split.no")?, other.uint("split.count")?) != (Some(number), Some(count)) {
            return Err(other.damaged(format!("is not part {} of {count}", number + 1)));
        }
        let part = self.parts.len();
        for (name, tensor) in other.tensors {
            if self.tensors.insert(name.clone(), Tensor { part, ..tensor }).is_some() {
                return Err(HubError::damaged(
                    &other.path,
                    format!("has tensor {name}, which an earlier part has"),
                ));
            }
        }
        self.parts.extend(other.parts);
        Ok(())
    }

    fn open_one(path: &Path) -> Result<Self, HubError> {
        let (file, metadata) = open_regular(path)?.ok_or_else(|| HubError::damaged(path, "is missing"))?;
        let file_bytes = metadata.len();
        let mut source = Source { path, reader: BufReader::new(&file), left: file_bytes };
        if &source.array::<4>()? != b"GGUF" {
            return Err(source.damaged("is not a GGUF file"));
        }
        match source.u32()? {
            2 | 3 => {}
            version if version.swap_bytes() == 3 => {
                return Err(HubError::unsupported("the GGUF file is big-endian"));
            }
            version => {
                return Err(HubError::unsupported(format!("GGUF version {version}; 2 and 3 are known")));
            }
        }
        let tensors_count = source.count("tensors", TENSORS_MAX)?;
        let keys_count = source.count("keys", KEYS_MAX)?;
        let mut meta = BTreeMap::new();
        for _ in 0..keys_count {
            let key = source.text()?;
            let kind = source.u32()?;
            let value = source.value(kind)?;
            if let Some(key) = meta.insert(key.clone(), value).map(|_| key) {
                return Err(source.damaged(format!("has the key {key} twice")));
            }
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..tensors_count {
            let (name, tensor) = source.tensor()?;
            if let Some(name) = tensors.insert(name.clone(), tensor).map(|_| name) {
                return Err(source.damaged(format!("has the tensor {name} twice")));
            }
        }
        let header_bytes = file_bytes - source.left;
        let path = path.to_path_buf();
        let mut gguf = Self { parts: vec![(path.clone(), file)], path, tensors, meta };
        gguf.place(header_bytes, file_bytes)?;
        Ok(gguf)
    }

    /// Turns offsets within the data into offsets within the file, and checks that tensors lie in it, apart.
    fn place(&mut self, header_bytes: u64, file_bytes: u64) -> Result<(), HubError> {
        let alignment = self.uint("general.alignment")?.unwrap_or(32);
        if !alignment.is_power_of_two() || !(8..=1 << 20).contains(&alignment) {
            return Err(self.damaged(format!("cannot have an alignment of {alignment}")));
        }
        let start = header_bytes.next_multiple_of(alignment);
        let mut places = Vec::with_capacity(self.tensors.len());
        for (name, tensor) in &mut self.tensors {
            let begin = tensor.offset.checked_add(start);
            let end = begin.and_then(|begin| begin.checked_add(tensor.bytes));
            let (Some(begin), Some(end)) = (begin, end.filter(|end| *end <= file_bytes)) else {
                return Err(HubError::damaged(&self.path, format!("ends before tensor {name} does")));
            };
            tensor.offset = begin;
            places.push((begin, end, name));
        }
        places.sort();
        if let Some(pair) = places.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            let why = format!("tensors {} and {} overlap", pair[0].2, pair[1].2);
            return Err(HubError::damaged(&self.path, why));
        }
        Ok(())
    }

    /// A whole number that is not negative.
    pub(super) fn uint(&self, key: &str) -> Result<Option<u64>, HubError> {
        match self.meta.get(key) {
            None => Ok(None),
            Some(Meta::Int(value)) if *value >= 0 => Ok(u64::try_from(*value).ok()),
            Some(_) => Err(self.damaged(format!("{key} is not a whole number"))),
        }
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>, HubError> {
        match self.meta.get(key) {
            None => Ok(None),
            Some(Meta::Float(value)) if value.is_finite() => Ok(Some(*value)),
            Some(_) => Err(self.damaged(format!("{key} is not a number"))),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, HubError> {
        match self.meta.get(key) {
            None => Ok(None),
            Some(Meta::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.damaged(format!("{key} is not true or false"))),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, HubError> {
        match self.meta.get(key) {
            None => Ok(None),
            Some(Meta::Text(value)) => Ok(Some(value)),
            Some(_) => Err(self.damaged(format!("{key} is not a text"))),
        }
    }

    pub(super) fn texts(&self, key: &str) -> Result<&[String], HubError> {
        match self.meta.get(key) {
            Some(Meta::Texts(values)) => Ok(values),
            _ => Err(self.damaged(format!("{key} is not a list of texts"))),
        }
    }

    pub(super) fn ints(&self, key: &str) -> Result<&[i64], HubError> {
        match self.meta.get(key) {
            Some(Meta::Ints(values)) => Ok(values),
            _ => Err(self.damaged(format!("{key} is not a list of whole numbers"))),
        }
    }

    /// A list of floats; None if there is none.
    pub(super) fn floats(&self, key: &str) -> Result<Option<&[f32]>, HubError> {
        match self.meta.get(key) {
            None => Ok(None),
            Some(Meta::Floats(values)) => Ok(Some(values)),
            Some(_) => Err(self.damaged(format!("{key} is not a list of numbers"))),
        }
    }

    pub(super) fn damaged(&self, why: impl Into<String>) -> HubError {
        HubError::damaged(&self.path, why)
    }

    /// Reads a part of a tensor, from its byte `at` on, into `bytes`.
    pub(super) fn read(&self, tensor: &Tensor, at: u64, bytes: &mut [u8]) -> Result<(), HubError> {
        let (path, file) = &self.parts[tensor.part];
        file.read_exact_at(bytes, tensor.offset + at).map_err(HubError::io(path))
    }

    /// Reads a tensor of floats whole: one number for each of `len` elements.
    pub(super) fn numbers(&self, name: &str, len: usize) -> Result<Option<Vec<f64>>, HubError> {
        let Some(tensor) = self.tensors.get(name) else { return Ok(None) };
        if tensor.kind != Kind::F32 || tensor.dims != [len] {
            return Err(self.damaged(format!("tensor {name} is not {len} numbers in f32")));
        }
        let mut bytes = vec![0; len * 4];
        self.read(tensor, 0, &mut bytes)?;
        let numbers = bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        Ok(Some(numbers.collect()))
    }
}

/// The header's bytes, and how many the file still has.
struct Source<'a> {
    path: &'a Path,
    reader: BufReader<&'a File>,
    left: u64,
}

impl Source<'_> {
    fn damaged(&self, why: impl Into<String>) -> HubError {
        HubError::damaged(self.path, why)
    }

    fn spend(&mut self, bytes: u64) -> Result<(), HubError> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| self.damaged("ends within its header"))?;
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], HubError> {
        self.spend(N as u64)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(HubError::io(self.path))?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, HubError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, HubError> {
        self.array().map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &str, max: u64) -> Result<u64, HubError> {
        match self.u64()? {
            count if count <= max => Ok(count),
            count => Err(self.damaged(format!("says it has {count} {what}; at most {max}"))),
        }
    }

    fn text(&mut self) -> Result<String, HubError> {
        let bytes_count = self.count("bytes in a text", TEXT_BYTES_MAX)?;
        self.spend(bytes_count)?;
        let mut bytes = Vec::new();
        let read = self.reader.by_ref().take(bytes_count).read_to_end(&mut bytes);
        if read.map_err(HubError::io(self.path))? as u64 != bytes_count {
            return Err(self.damaged("became shorter while it was read"));
        }
        String::from_utf8(bytes).map_err(|_| self.damaged("has a text that is not UTF-8"))
    }

    /// A value of a type code (docs/gguf.md, `gguf_metadata_value_type`).
    fn value(&mut self, kind: u32) -> Result<Meta, HubError> {
        Ok(match kind {
            6 => Meta::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Meta::Bool(self.array::<1>()? != [0]),
            8 => Meta::Text(self.text()?),
            9 => self.list()?,
            12 => Meta::Float(f64::from_le_bytes(self.array()?)),
            _ => Meta::Int(self.int(kind)?),
        })
    }

    fn int(&mut self, kind: u32) -> Result<i128, HubError> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array()?).into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => u32::from_le_bytes(self.array()?).into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            10 => u64::from_le_bytes(self.array()?).into(),
            11 => i64::from_le_bytes(self.array()?).into(),
            _ => return Err(self.damaged(format!("has a value of the unknown type {kind}"))),
        })
    }

    fn list(&mut self) -> Result<Meta, HubError> {
        let kind = self.u32()?;
        let len = self.count("values in a list", ARRAY_LEN_MAX)?;
        let width = match kind {
            8 => return (0..len).map(|_| self.text()).collect::<Result<_, _>>().map(Meta::Texts),
            4 | 5 => {
                let ints = (0..len).map(|_| self.int(kind).map(|value| i64::try_from(value).unwrap_or(-1)));
                return ints.collect::<Result<_, _>>().map(Meta::Ints);
            }
            6 => {
                let floats = (0..len).map(|_| self.array().map(f32::from_le_bytes));
                return floats.collect::<Result<_, _>>().map(Meta::Floats);
            }
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            10..=12 => 8,
            _ => return Err(self.damaged(format!("has a list of the type {kind}"))),
        };
        self.spend(len * width)?;
        let skip = i64::try_from(len * width).unwrap_or(i64::MAX);
        self.reader.seek_relative(skip).map_err(HubError::io(self.path))?;
        Ok(Meta::Skipped)
    }

    fn tensor(&mut self) -> Result<(String, Tensor), HubError> {
        let name = self.text()?;
        let dims_count = self.u32()?;
        if dims_count == 0 || dims_count > 4 {
            return Err(self.damaged(format!("tensor {name} has {dims_count} dimensions")));
        }
        let mut dims = Vec::with_capacity(4);
        for _ in 0..dims_count {
            dims.push(usize::try_from(self.u64()?).unwrap_or(usize::MAX));
        }
        let code = self.u32()?;
        let kind = Kind::from_code(code)
            .map_err(|kind| HubError::unsupported(format!("tensor {name} is stored as {kind}")))?;
        let offset = self.u64()?;
        let (elements, block_bytes) = kind.block();
        let rows = dims[1..].iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        let bytes = rows.and_then(|rows| rows.checked_mul(dims[0] / elements)?.checked_mul(block_bytes));
        let Some(bytes) = bytes.filter(|_| dims[0].is_multiple_of(elements)) else {
            return Err(self.damaged(format!("tensor {name} cannot be {dims:?}")));
        };
        Ok((name, Tensor { part: 0, kind, dims, offset, bytes: bytes as u64 }))
    }
}

/// GGUF keeps f32; the shortest decimal that is the same f32 is what the original config said (1e-05, not
/// 9.999999747378752e-06).
#[expect(clippy::cast_possible_truncation, reason = "the value came from an f32")]
pub(super) fn single(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}
