//! A blob that is not complete: its data, and beside it how far each of its parts has come, so that a
//! download goes on where it ended, whichever parts were under way. Data is written before it is counted. The
//! names end with `.incomplete`, as Python's; they are ours, because a file with gaps must not be taken for
//! one that only lacks its end.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::FetchError;
use super::api::Digest;
use super::store::remove;

/// Endings of the two files.
const DATA: &str = ".mlxd.incomplete";
const COUNTS: &str = ".mlxd-parts.incomplete";

/// Begins the file of counts.
const MAGIC: [u8; 8] = *b"mlxdpart";

/// Bytes before the counts: the magic, the blob's size, the size of a part.
const HEADER_BYTES: u64 = 24;

/// Smallest and largest part. A part is one request; an interrupted one loses what was not yet counted.
const PART_BYTES: std::ops::RangeInclusive<u64> = 4 << 20..=64 << 20;

/// Parts by connection: few connections end at the same time, and the rest share what is left.
const PARTS_BY_CONNECTION: u64 = 4;

/// Bytes that are read at a time to compute a hash.
const BLOCK_BYTES: usize = 1 << 20;

/// An incomplete blob; its lock is held.
#[derive(Debug)]
pub(super) struct Partial {
    data: File,
    counts: File,
    data_path: PathBuf,
    counts_path: PathBuf,
    size: u64,
    part_bytes: u64,
    /// Bytes of each part that are on disk, from its start.
    done: Vec<AtomicU64>,
    /// Whether bytes of an earlier download are in it.
    pub(super) is_resumed: bool,
}

/// Returns the size of a part of a file: the same for every file of its size and these connections.
pub(super) fn part_bytes(size: u64, connections: usize) -> u64 {
    let parts = PARTS_BY_CONNECTION * connections as u64;
    size.div_ceil(parts.max(1)).next_power_of_two().clamp(*PART_BYTES.start(), *PART_BYTES.end())
}

impl Partial {
    /// Opens what an earlier download left of a blob, else begins one with parts of `part_bytes`.
    pub(super) fn open(blob: &Path, size: u64, part_bytes: u64) -> Result<Self, FetchError> {
        let (data_path, counts_path) = (beside(blob, DATA), beside(blob, COUNTS));
        let open = |path: &Path| {
            let mut options = OpenOptions::new();
            let opened = options.read(true).write(true).create(true).truncate(false).open(path);
            opened.map_err(FetchError::io(path))
        };
        let (data, counts) = (open(&data_path)?, open(&counts_path)?);
        let earlier =
            read_counts(&counts, size).filter(|_| data.metadata().is_ok_and(|data| data.len() == size));
        let is_resumed = earlier.as_ref().is_some_and(|(_, done)| done.iter().any(|done| *done > 0));
        let (part_bytes, done) = earlier.unwrap_or((part_bytes, Vec::new()));
        let mut partial =
            Self { data, counts, data_path, counts_path, size, part_bytes, done: Vec::new(), is_resumed };
        if done.is_empty() {
            partial.restart(part_bytes)?;
        } else {
            partial.done = done.into_iter().map(AtomicU64::new).collect();
        }
        Ok(partial)
    }

    /// Begins anew, with parts of this size.
    pub(super) fn restart(&mut self, part_bytes: u64) -> Result<(), FetchError> {
        let parts = self.size.div_ceil(part_bytes);
        self.done = (0..parts).map(|_| AtomicU64::new(0)).collect();
        (self.part_bytes, self.is_resumed) = (part_bytes, false);
        let header = [MAGIC, self.size.to_le_bytes(), part_bytes.to_le_bytes()].concat();
        // Counts that are not written read as zero.
        let written = self
            .counts
            .set_len(0)
            .and_then(|()| self.counts.write_all_at(&header, 0))
            .and_then(|()| self.counts.set_len(HEADER_BYTES + 8 * parts));
        written.map_err(FetchError::io(&self.counts_path))?;
        self.data.set_len(self.size).map_err(FetchError::io(&self.data_path))
    }

    pub(super) fn parts_count(&self) -> usize {
        self.done.len()
    }

    /// Returns the bytes of a part that are missing, as a range of the file; `None` if none are.
    pub(super) fn missing(&self, part: usize) -> Option<std::ops::Range<u64>> {
        let start = part as u64 * self.part_bytes;
        let end = (start + self.part_bytes).min(self.size);
        let from = start + self.done.get(part)?.load(Ordering::Relaxed);
        (from < end).then_some(from..end)
    }

    /// Returns the bytes on disk.
    pub(super) fn done_bytes(&self) -> u64 {
        self.done.iter().map(|done| done.load(Ordering::Relaxed)).sum()
    }

    /// Writes the next bytes of a part, which are missing.
    pub(super) fn write(&self, part: usize, bytes: &[u8]) -> Result<(), FetchError> {
        let Some(missing) = self.missing(part) else { return Ok(()) };
        self.data.write_all_at(bytes, missing.start).map_err(FetchError::io(&self.data_path))?;
        self.done[part].fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Records how far a part has come, for the next download.
    pub(super) fn record(&self, part: usize) -> Result<(), FetchError> {
        let done = self.done[part].load(Ordering::Relaxed).to_le_bytes();
        let at = HEADER_BYTES + 8 * part as u64;
        self.counts.write_all_at(&done, at).map_err(FetchError::io(&self.counts_path))
    }

    /// Returns whether the content is the file's. Reads all of it.
    pub(super) fn is_content_of(&self, digest: &Digest) -> Result<bool, FetchError> {
        let hashed = match digest {
            Digest::Sha256(_) => self.hash(Sha256::new()),
            Digest::Git(_) => self.hash(Sha1::new_with_prefix(format!("blob {}\0", self.size))),
        };
        Ok(hashed.map_err(FetchError::io(&self.data_path))? == digest.as_str())
    }

    fn hash(&self, mut hash: impl sha2::Digest) -> io::Result<String> {
        let mut block = vec![0; BLOCK_BYTES];
        let mut at = 0;
        loop {
            let read = self.data.read_at(&mut block, at)?;
            if read == 0 {
                return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
            }
            hash.update(&block[..read]);
            at += read as u64;
        }
    }

    /// Makes the blob of it.
    pub(super) fn finish(&self, blob: &Path) -> Result<(), FetchError> {
        // A name that is a hash must not outlive its content when the power fails.
        self.data.sync_all().map_err(FetchError::io(&self.data_path))?;
        fs::rename(&self.data_path, blob).map_err(FetchError::io(blob))?;
        remove(&self.counts_path)
    }

    /// Removes it: nothing in it can be used.
    pub(super) fn discard(&self) -> Result<(), FetchError> {
        remove(&self.counts_path)?;
        remove(&self.data_path)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        for part in 0..self.done.len() {
            // A count that is not recorded costs its bytes again, no more.
            _ = self.record(part);
        }
    }
}

/// Returns the bytes of a blob that an earlier download left on disk.
pub(super) fn bytes_left(blob: &Path, size: u64) -> u64 {
    let counts = File::open(beside(blob, COUNTS)).ok().and_then(|counts| read_counts(&counts, size));
    counts.map_or(0, |(_, done)| done.iter().sum())
}

fn beside(blob: &Path, ending: &str) -> PathBuf {
    let mut name = blob.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// Reads size of a part and counts; `None` unless they fit a file of this size.
fn read_counts(file: &File, size: u64) -> Option<(u64, Vec<u64>)> {
    let mut bytes = Vec::new();
    // The largest file in the smallest parts.
    file.take(HEADER_BYTES + 8 * (1 << 24)).read_to_end(&mut bytes).ok()?;
    let mut words = bytes.chunks_exact(8).filter_map(|word| word.try_into().ok());
    if words.next()? != MAGIC || u64::from_le_bytes(words.next()?) != size {
        return None;
    }
    let part_bytes = u64::from_le_bytes(words.next()?);
    let done: Vec<u64> = words.map(u64::from_le_bytes).collect();
    let parts = size.checked_div(part_bytes).map(|_| size.div_ceil(part_bytes))?;
    let length = |part: usize| (size - part as u64 * part_bytes).min(part_bytes);
    let fits =
        done.len() as u64 == parts && done.iter().enumerate().all(|(part, done)| *done <= length(part));
    fits.then_some((part_bytes, done))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: u64 = 4;

    fn open(folder: &Path, size: u64) -> Partial {
        Partial::open(&folder.join("blob"), size, PART).unwrap()
    }

    #[test]
    fn a_download_goes_on_in_every_part() {
        let folder = tempfile::tempdir().unwrap();
        let partial = open(folder.path(), 10);
        assert_eq!((partial.parts_count(), partial.is_resumed), (3, false));
        partial.write(0, b"abc").unwrap();
        partial.write(2, b"ij").unwrap();
        drop(partial);
        assert_eq!(bytes_left(&folder.path().join("blob"), 10), 5);
        let partial = open(folder.path(), 10);
        assert!(partial.is_resumed);
        assert_eq!(
            (partial.missing(0), partial.missing(1), partial.missing(2)),
            (Some(3..4), Some(4..8), None)
        );
        partial.write(0, b"d").unwrap();
        partial.write(1, b"efgh").unwrap();
        // printf abcdefghij | git hash-object --stdin
        let digest = Digest::Git("c76a96421b967235e3e3c307c8fe4ff16fbef402".to_owned());
        assert!(partial.is_content_of(&digest).unwrap());
        partial.finish(&folder.path().join("blob")).unwrap();
        drop(partial);
        assert_eq!(fs::read(folder.path().join("blob")).unwrap(), b"abcdefghij");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn hashes_are_gits_and_sha256() {
        let folder = tempfile::tempdir().unwrap();
        let partial = open(folder.path(), 3);
        partial.write(0, b"abc").unwrap();
        let git = Digest::Git("f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f".to_owned());
        assert!(partial.is_content_of(&git).unwrap());
        let sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert!(partial.is_content_of(&Digest::Sha256(sha.to_owned())).unwrap());
        let empty = tempfile::tempdir().unwrap();
        let empty = open(empty.path(), 0);
        assert_eq!(empty.parts_count(), 0);
        assert!(
            empty.is_content_of(&Digest::Git("e69de29bb2d1d6434b8b29ae775ad8c2e48c5391".to_owned())).unwrap()
        );
    }

    #[test]
    fn counts_that_do_not_fit_are_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let counts = folder.path().join("blob.mlxd-parts.incomplete");
        let partial = open(folder.path(), 10);
        partial.write(0, b"abcd").unwrap();
        drop(partial);
        let right = fs::read(&counts).unwrap();
        let changed = |at: usize, byte: u8| {
            let mut bytes = right.clone();
            bytes[at] = byte;
            bytes
        };
        let wrong =
            [changed(0, b'x'), changed(8, 11), changed(16, 0), changed(24, 5), right[..31].to_vec(), vec![]];
        for bytes in wrong {
            fs::write(&counts, bytes).unwrap();
            let partial = open(folder.path(), 10);
            assert_eq!((partial.done_bytes(), partial.is_resumed), (0, false));
        }
        fs::write(&counts, &right).unwrap();
        fs::write(folder.path().join("blob.mlxd.incomplete"), "short").unwrap();
        assert!(!open(folder.path(), 10).is_resumed);
    }

    #[test]
    fn parts_grow_with_the_file() {
        assert_eq!(part_bytes(1, 8), 4 << 20);
        assert_eq!(part_bytes(200 << 20, 8), 8 << 20);
        assert_eq!(part_bytes(40 << 30, 8), 64 << 20);
        assert_eq!(part_bytes(1 << 20, 0), 4 << 20);
    }
}
