//! The file of a part, in the layout of safetensors so that other tools can read it: the header's length, the
//! header as JSON, and the data: the part's own tokens, its arrays, and a seal of all before it. What the
//! header says follows from the part's name, place and layout alone, so it is compared and not believed.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::name::{Name, Piece};
use crate::backend::{BuildKv, KvArray, KvArrays, KvContent, KvElement, KvLayout, KvPart};
use crate::error::Error;
use crate::priority;
use crate::store::disk::{Disk, NEW};

const SEAL_BYTES: u64 = 32;

/// Bytes of a file after which those so far are made durable: a slow disk takes seconds for them.
const SYNC_BYTES: u64 = 64 << 20;

/// Bytes of a file that are hashed and written before it is asked again who goes on, and whether anybody
/// wants it: a fraction of a millisecond of a processor.
const PIECE_BYTES: usize = 64 << 10;

/// A part, where it is stored, and how its file is laid out.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) name: Name,
    pub(super) piece: Piece,
    arrays: Vec<KvArray>,
    /// The length of the header, and the header.
    head: Vec<u8>,
}

/// With what a part is written.
pub(super) struct Means<'a> {
    pub(super) disk: &'a dyn Disk,
    /// Says before each piece whether nobody wants it any more.
    pub(super) stop: &'a (dyn Fn() -> bool + Sync),
    /// As long as there is some, it is written while processors are idle.
    pub(super) patience: &'a AtomicU32,
}

/// Why a part was not read.
#[derive(Debug)]
pub(super) enum PartError {
    /// There is no such file.
    Gone,
    /// It is not what was written.
    Damaged,
    /// The disk failed.
    Io(io::Error),
    /// The device failed.
    Device(Error),
}

impl From<io::Error> for PartError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::NotFound { Self::Gone } else { Self::Io(error) }
    }
}

/// Why a part was not written.
#[derive(Debug)]
pub(super) enum WriteError {
    /// The disk failed.
    Io(io::Error),
    /// The device does not show the arrays that the layout says.
    Device(String),
    /// Nobody wants it any more.
    GivenUp,
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Part {
    pub(super) fn new(name: Name, piece: Piece, layout: &KvLayout) -> Self {
        let part = match &piece {
            Piece::Tokens(_) => KvPart::Tokens,
            Piece::States(_) => KvPart::States,
        };
        let arrays: Vec<KvArray> = layout.of(part).cloned().collect();
        let head = head(name, &piece, &arrays);
        Self { name, piece, arrays, head }
    }

    /// Returns the bytes of its file.
    pub(super) fn size(&self) -> u64 {
        let arrays = self.arrays.iter().map(|array| array.bytes(count(&self.piece)));
        arrays.fold(self.arrays_at().saturating_add(SEAL_BYTES), u64::saturating_add)
    }

    /// Returns where the arrays begin: behind the tokens.
    fn arrays_at(&self) -> u64 {
        self.head.len() as u64 + tokens_bytes(&self.piece)
    }

    /// Writes its file under another name, makes it durable and gives it its own; that name is not durable
    /// yet. `tokens` are all of the cache. Once there is no more patience, this thread writes the rest.
    pub(super) fn write(
        &self,
        means: &Means<'_>,
        tokens: &[u32],
        content: &dyn KvArrays,
    ) -> Result<(), WriteError> {
        let unfit = || WriteError::Device("the device shows other arrays than its layout says".into());
        let arrays = content.bytes().map_err(|error| WriteError::Device(error.to_string()))?;
        let sizes = self.arrays.iter().map(|array| array.bytes(count(&self.piece)));
        if !arrays.iter().map(|bytes| bytes.len() as u64).eq(sizes) {
            return Err(unfit());
        }
        let own = match &self.piece {
            Piece::Tokens(own) => tokens.get(own.start as usize..own.end as usize).ok_or_else(unfit)?,
            Piece::States(_) => &[],
        };
        let own: Vec<u8> = own.iter().flat_map(|token| token.to_le_bytes()).collect();
        let all = [&self.head[..], &own].into_iter().chain(arrays);
        let mut pieces = all.flat_map(|bytes| bytes.chunks(PIECE_BYTES));
        let Means { disk, stop, patience } = *means;
        let mut file = Growing::new(disk, self.name.file());
        let mut go_on = |goes_on: &dyn Fn() -> bool| {
            while !file.is_whole && goes_on() {
                if stop() {
                    return Err(WriteError::GivenUp);
                }
                match pieces.next() {
                    Some(bytes) => file.add(bytes, stop)?,
                    None => file.end()?,
                }
            }
            Ok(())
        };
        let has_patience = || patience.load(Ordering::Relaxed) > 0;
        priority::while_idle("kv-idle", patience, || go_on(&has_patience)).transpose()?;
        go_on(&|| true)
    }

    /// Reads the head of its file and its own tokens, which are not compared with the seal yet.
    pub(super) fn tokens(&self, disk: &dyn Disk) -> Result<Vec<u32>, PartError> {
        let bytes = self.begin(disk)?;
        Ok(bytes
            .chunks_exact(4)
            .map(|token| u32::from_le_bytes([token[0], token[1], token[2], token[3]]))
            .collect())
    }

    /// Compares the size and the head of its file, and returns the bytes of its tokens.
    fn begin(&self, disk: &dyn Disk) -> Result<Vec<u8>, PartError> {
        let file = self.name.file();
        if disk.size(&file)? != self.size() {
            return Err(PartError::Damaged);
        }
        let mut bytes = disk.read(&file, 0, fitting(self.arrays_at()))?;
        if bytes.len() as u64 != self.arrays_at() || !bytes.starts_with(&self.head) {
            return Err(PartError::Damaged);
        }
        Ok(bytes.split_off(self.head.len()))
    }

    /// Reads its arrays, cut to some of its tokens, after its `tokens` were compared. Array by array, so that
    /// no second copy is ever whole; the last of them shows whether any of it is true.
    pub(super) fn read(
        &self,
        disk: &dyn Disk,
        builder: &dyn BuildKv,
        wanted: &Range<u32>,
    ) -> Result<KvContent, PartError> {
        let mut seal = Sha256::new();
        seal.update(&self.head);
        seal.update(self.begin(disk)?);
        let (file, mut at, mut building) = (self.name.file(), self.arrays_at(), builder.begin());
        for array in &self.arrays {
            let size = array.bytes(count(&self.piece));
            let bytes = disk.read(&file, at, fitting(size))?;
            if bytes.len() as u64 != size {
                return Err(PartError::Damaged);
            }
            seal.update(&bytes);
            at += size;
            let bytes = cut(array, &self.piece, wanted, bytes);
            building.add(array, wanted.end - wanted.start, &bytes).map_err(PartError::Device)?;
        }
        let last = disk.read(&file, at, fitting(SEAL_BYTES + 1))?;
        if last[..] != seal.finalize()[..] {
            return Err(PartError::Damaged);
        }
        building.finish().map_err(PartError::Device)
    }
}

/// A file that is being written, by one thread after the other.
struct Growing<'a> {
    disk: &'a dyn Disk,
    /// The name that it is to have.
    name: String,
    /// The one that it has until then.
    new: String,
    at: u64,
    seal: Sha256,
    synced: u64,
    is_whole: bool,
}

impl<'a> Growing<'a> {
    fn new(disk: &'a dyn Disk, name: String) -> Self {
        let new = format!("{name}{NEW}");
        Self { disk, name, new, at: 0, seal: Sha256::new(), synced: 0, is_whole: false }
    }

    fn add(&mut self, bytes: &[u8], stop: &dyn Fn() -> bool) -> io::Result<()> {
        self.seal.update(bytes);
        self.disk.write(&self.new, self.at, bytes)?;
        self.at += bytes.len() as u64;
        // So that a slow disk shows that it comes along.
        if self.at - self.synced >= SYNC_BYTES && !stop() {
            self.disk.sync(&self.new)?;
            self.synced = self.at;
        }
        Ok(())
    }

    /// Seals it, makes it durable and gives it its name.
    fn end(&mut self) -> io::Result<()> {
        self.disk.write(&self.new, self.at, &self.seal.finalize_reset())?;
        self.disk.sync(&self.new)?;
        self.disk.rename(&self.new, &self.name)?;
        self.is_whole = true;
        Ok(())
    }
}

/// Builds the arrays of some of a segment's tokens anew.
pub(super) fn rebuilt(
    content: &dyn KvArrays,
    layout: &KvLayout,
    tokens: &Range<u32>,
    wanted: &Range<u32>,
    builder: &dyn BuildKv,
) -> Result<KvContent, Error> {
    let (mut building, piece) = (builder.begin(), Piece::Tokens(tokens.clone()));
    for (array, bytes) in layout.of(KvPart::Tokens).zip(content.bytes()?) {
        if bytes.len() as u64 != array.bytes(count(&piece)) {
            return Err(Error::Internal("a segment has other arrays than its layout says".into()));
        }
        let bytes = cut(array, &piece, wanted, bytes.to_vec());
        building.add(array, wanted.end - wanted.start, &bytes)?;
    }
    building.finish()
}

/// Returns the number of a piece's own tokens.
fn count(piece: &Piece) -> u32 {
    match piece {
        Piece::Tokens(tokens) => tokens.end - tokens.start,
        Piece::States(_) => 0,
    }
}

fn tokens_bytes(piece: &Piece) -> u64 {
    u64::from(count(piece)) * size_of::<u32>() as u64
}

/// Cuts an array `[1, heads, tokens, elements]` to some of the tokens.
fn cut(array: &KvArray, piece: &Piece, wanted: &Range<u32>, bytes: Vec<u8>) -> Vec<u8> {
    let (KvArray::PerToken { elements, element, .. }, Piece::Tokens(tokens)) = (array, piece) else {
        return bytes;
    };
    if tokens == wanted {
        return bytes;
    }
    let row = fitting(u64::from(*elements) * element.bytes());
    let from = (wanted.start - tokens.start) as usize * row;
    let to = (wanted.end - tokens.start) as usize * row;
    bytes.chunks_exact(count(piece) as usize * row).flat_map(|head| &head[from..to]).copied().collect()
}

/// Returns the header of a part's file, with its length before it.
fn head(name: Name, piece: &Piece, arrays: &[KvArray]) -> Vec<u8> {
    let (kind, start) = match piece {
        Piece::Tokens(tokens) => ("tokens", tokens.start),
        Piece::States(_) => ("states", 0),
    };
    let facts = json!({
        "format": "mlxd kv 1", "name": name.to_string(), "kind": kind,
        "start": start.to_string(), "end": piece.end().to_string(),
    });
    let mut header = Map::from_iter([("__metadata__".to_owned(), facts)]);
    let mut at = 0_u64;
    let mut add = |name: String, dtype: &str, shape: &[u32], bytes: u64| {
        let to = at.saturating_add(bytes);
        header.insert(name, json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, to] }));
        at = to;
    };
    let own = count(piece);
    if own > 0 {
        add("tokens".into(), "U32", &[own], tokens_bytes(piece));
    }
    for (index, array) in arrays.iter().enumerate() {
        let dtype = match array.element() {
            KvElement::Float32 => "F32",
            KvElement::Float16 => "F16",
            KvElement::Bfloat16 => "BF16",
            KvElement::Int8 => "I8",
        };
        add(format!("array.{index}"), dtype, &array.shape(own), array.bytes(own));
    }
    add("seal".into(), "U8", &[32], SEAL_BYTES);
    let mut header = Value::Object(header).to_string().into_bytes();
    // Data that begins at a multiple of 8 can be used where it is mapped.
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes()[..], &header].concat()
}

/// Returns a size in memory; files have no more bytes than fit.
fn fitting(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
