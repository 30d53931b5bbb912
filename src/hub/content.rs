//! What a model is made of, as a hash: its config, the headers of its weight files and samples of their data.
//! It is taken of the files that a load has open, so it tells what was loaded, whatever names, sizes and
//! times the files have: those of a folder that was copied over may be the same.

use std::fmt;
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};

use super::{HubError, ModelFiles, OpenWeights, TensorInfo, WeightFile};

/// Bytes of a sample at most, and at least where there are many. Training changes nearly every element of a
/// matrix; where it changes few, as an adapter of a low rank in 16 bits may, some of two thousand.
const SAMPLE_BYTES: u64 = 4 << 10;
const SAMPLE_BYTES_MIN: u64 = 512;

/// Bytes of a tensor for which there is a sample; a smaller tensor has one too.
const STRIDE_BYTES: u64 = 16 << 20;

/// Bytes of a file that are read at most: a thousandth of a shard of usual size.
const BYTES_MAX: u64 = 4 << 20;

/// Says which config and weights a model has, with a certainty that samples give.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContentHash([u8; 32]);

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl ContentHash {
    /// Returns the hash of a config and of the weight files that go with it, in their order.
    #[must_use]
    pub fn new(files: &ModelFiles, weights: &[Self]) -> Self {
        let mut hash = Sha256::new();
        hash.update(files.config.to_string());
        weights.iter().for_each(|file| hash.update(file.0));
        Self(hash.finalize().into())
    }

    /// Returns one that stands for a number, of a model that is on no disk.
    #[cfg(test)]
    pub(crate) fn fake(number: u8) -> Self {
        Self([number; 32])
    }
}

impl WeightFile {
    /// Returns the hash of this file, which is open. Reads at most 4 MiB of it.
    ///
    /// # Errors
    /// `Io`.
    pub fn content(&self, opened: &OpenWeights) -> Result<ContentHash, HubError> {
        let OpenWeights { file, head, bytes } = opened;
        let mut hash = Sha256::new();
        hash.update(bytes.to_le_bytes());
        hash.update(head);
        let mut sample = Vec::new();
        for (at, bytes) in samples(&self.tensors, head.len() as u64) {
            sample.resize(bytes, 0);
            file.read_exact_at(&mut sample, at).map_err(HubError::io(&self.path))?;
            hash.update(&sample);
        }
        Ok(ContentHash(hash.finalize().into()))
    }
}

/// Returns where the samples of a file are, and their sizes, given where the data of its tensors begins.
/// Every tensor has one, unless there are more than [`BYTES_MAX`] has room for.
fn samples(tensors: &[TensorInfo], data_at: u64) -> Vec<(u64, usize)> {
    let parts = |tensor: &TensorInfo| tensor.bytes.div_ceil(STRIDE_BYTES);
    let count = tensors.iter().map(parts).sum::<u64>().max(1);
    let sample_bytes = (BYTES_MAX / count).clamp(SAMPLE_BYTES_MIN, SAMPLE_BYTES);
    let (mut all, mut at) = (Vec::new(), data_at);
    for tensor in tensors {
        let (bytes, parts) = (tensor.bytes, parts(tensor));
        for part in 0..parts {
            let start = bytes / parts * part;
            let end = if part + 1 < parts { bytes / parts * (part + 1) } else { bytes };
            // From its middle: a matrix may begin with rows of padding.
            let size = sample_bytes.min(end - start);
            let begin = start + (end - start - size) / 2;
            all.push((at + begin, usize::try_from(size).unwrap_or(usize::MAX)));
        }
        at += bytes;
    }
    let step = count.div_ceil(BYTES_MAX / sample_bytes);
    all.into_iter().step_by(usize::try_from(step).unwrap_or(usize::MAX)).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::{Duration, SystemTime};

    use safetensors::Dtype;

    use super::*;

    fn tensors(sizes: &[u64]) -> Vec<TensorInfo> {
        let tensor = |(index, bytes): (usize, &u64)| TensorInfo {
            name: format!("t{index}"),
            dtype: Dtype::U8,
            shape: vec![usize::try_from(*bytes).unwrap()],
            bytes: *bytes,
        };
        sizes.iter().enumerate().map(tensor).collect()
    }

    #[test]
    fn every_tensor_has_a_sample_and_a_large_one_several_none_beyond_its_tensor() {
        let sizes = [0, 1, SAMPLE_BYTES, SAMPLE_BYTES + 1, STRIDE_BYTES, 5 * STRIDE_BYTES + 7];
        let found = samples(&tensors(&sizes), 100);
        let mut expected = vec![0, 1, 1, 1, 1, 6];
        let mut at = 100;
        for (bytes, count) in sizes.iter().zip(&mut expected) {
            let inside = |&&(start, size): &&(u64, usize)| at <= start && start + size as u64 <= at + bytes;
            assert_eq!(found.iter().filter(inside).count(), *count, "{bytes}");
            at += bytes;
        }
        assert_eq!(found.len(), expected.iter().sum::<usize>());
        assert!(found.windows(2).all(|pair| pair[0].0 + pair[0].1 as u64 <= pair[1].0));
    }

    #[test]
    fn of_a_file_no_more_is_read_than_may_be_from_all_over_it() {
        for (count, bytes) in [(100_000, 600), (3, 50 << 30), (5_000, 100_000)] {
            let found = samples(&tensors(&vec![bytes; count]), 0);
            let read: usize = found.iter().map(|(_, size)| size).sum();
            assert!(read as u64 <= 4 << 20, "{count}");
            let all = bytes * count as u64;
            assert!(found.len() > 4_000 && found.last().unwrap().0 > all / 100 * 98, "{count}");
            assert!(count > 5_000 || found.len() >= count, "each tensor has one");
        }
    }

    /// Writes a model of one file with two matrices, each of this value, at a time of long ago.
    fn write(folder: &Path, config: &str, values: [u8; 2]) {
        let rows = |name: &str, at: usize| {
            format!("\"{name}\":{{\"dtype\":\"U8\",\"shape\":[9000],\"data_offsets\":[{at},{}]}}", at + 9000)
        };
        let header = format!("{{{},{}}}", rows("a", 0), rows("b", 9000));
        let data = values.map(|value| vec![value; 9000]).concat();
        let weights = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
        for (name, bytes) in [("model.safetensors", &weights[..]), ("config.json", config.as_bytes())] {
            fs::write(folder.join(name), bytes).unwrap();
            let file = fs::File::options().write(true).open(folder.join(name)).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
        }
    }

    fn content(folder: &Path) -> ContentHash {
        let weights = super::super::inspect(folder).unwrap();
        let mut files = ModelFiles::fake("m");
        files.config = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        let hashes: Vec<_> =
            weights.files.iter().map(|file| file.content(&file.open().unwrap()).unwrap()).collect();
        ContentHash::new(&files, &hashes)
    }

    #[test]
    fn a_folder_whose_files_have_the_same_names_sizes_and_times_and_other_content_is_another_model() {
        let folder = tempfile::tempdir().unwrap();
        let of = |config: &str, values| {
            write(folder.path(), config, values);
            content(folder.path())
        };
        let first = of(r#"{"rope_theta": 1}"#, [1, 2]);
        assert_eq!(of(r#"{"rope_theta": 1}"#, [1, 2]), first);
        let others = [
            of(r#"{"rope_theta": 2}"#, [1, 2]),
            of(r#"{"rope_theta": 1}"#, [1, 3]),
            of(r#"{"rope_theta": 1}"#, [3, 2]),
            of(r#"{"rope_theta": 1}"#, [2, 1]),
        ];
        assert!(!others.contains(&first));
        assert_eq!(first.to_string().len(), 64);
    }
}
