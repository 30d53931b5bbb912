//! Weight files as mlx-lm writes them (utils.py, `save_model`): `model.safetensors`, or shards of at most 5
//! GiB with an index. Their headers are written first, so that tensors go to their places one by one, in any
//! order and in pieces.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::super::HubError;
use crate::hub::TensorInfo;

/// Bytes of a shard's tensors, but for a tensor that is larger.
const SHARD_BYTES_MAX: u64 = 5 << 30;

/// Writes tensors to their places.
#[derive(Debug)]
pub struct WeightsWriter {
    files: Vec<(PathBuf, File)>,
    places: BTreeMap<String, Place>,
    /// Bytes of all tensors.
    bytes: u64,
}

/// Where a tensor goes.
#[derive(Clone, Copy, Debug)]
struct Place {
    file: usize,
    offset: u64,
    bytes: u64,
}

impl WeightsWriter {
    /// Creates the files with their headers in `folder`; returns the index beside.
    pub(super) fn new(
        folder: &Path,
        tensors: &[TensorInfo],
        parameters: u64,
    ) -> Result<(Self, Value), HubError> {
        let shards = shards(tensors, SHARD_BYTES_MAX);
        let (mut files, mut places) = (Vec::new(), BTreeMap::new());
        let mut map = BTreeMap::new();
        for (number, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => "model.safetensors".to_owned(),
                count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            let path = folder.join(&name);
            let file = File::create_new(&path).map_err(HubError::io(&path))?;
            let header = header(shard).map_err(|error| HubError::io(&path)(error.into()))?;
            file.write_all_at(&header, 0).map_err(HubError::io(&path))?;
            let mut offset = header.len() as u64;
            for tensor in *shard {
                places.insert(tensor.name.clone(), Place { file: number, offset, bytes: tensor.bytes });
                offset += tensor.bytes;
                map.insert(tensor.name.as_str(), name.clone());
            }
            files.push((path, file));
        }
        let bytes = tensors.iter().map(|tensor| tensor.bytes).sum();
        let index = json!({
            "metadata": {"total_size": bytes, "total_parameters": parameters},
            "weight_map": map,
        });
        Ok((Self { files, places, bytes }, index))
    }

    /// Returns the bytes of all tensors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the number of tensors.
    #[must_use]
    pub fn tensors_count(&self) -> usize {
        self.places.len()
    }

    /// Writes a part of a tensor, from the element at byte `at` on.
    ///
    /// # Errors
    /// `Io`.
    ///
    /// # Panics
    /// The tensor was not announced, or has no such bytes: a model that looks whole must not be written.
    pub fn write(&self, tensor: &str, at: u64, bytes: &[u8]) -> Result<(), HubError> {
        let place = self.places.get(tensor);
        let place =
            place.filter(|place| at.checked_add(bytes.len() as u64).is_some_and(|end| end <= place.bytes));
        #[allow(clippy::expect_used, reason = "a defect of ours, which would leave zeros in the file")]
        let Place { file, offset, .. } = place.expect("a tensor's bytes have a place");
        let (path, file) = &self.files[*file];
        file.write_all_at(bytes, offset + at).map_err(HubError::io(path))
    }

    /// Puts everything on disk.
    ///
    /// # Errors
    /// `Io`.
    pub fn finish(self) -> Result<(), HubError> {
        self.files.iter().try_for_each(|(path, file)| file.sync_all().map_err(HubError::io(path)))
    }
}

/// Cuts tensors into shards of at most `bytes_max`, in their order; at least one.
fn shards(tensors: &[TensorInfo], bytes_max: u64) -> Vec<&[TensorInfo]> {
    let (mut shards, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (at, tensor) in tensors.iter().enumerate() {
        if at > start && bytes + tensor.bytes > bytes_max {
            shards.push(&tensors[start..at]);
            (start, bytes) = (at, 0);
        }
        bytes += tensor.bytes;
    }
    shards.push(&tensors[start..]);
    shards
}

/// Returns the header of a file: its length, then JSON.
fn header(tensors: &[TensorInfo]) -> serde_json::Result<Vec<u8>> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({"format": "mlx"}));
    let mut offset = 0;
    for TensorInfo { name, dtype, shape, bytes } in tensors {
        let entry = json!({
            "dtype": dtype.to_string(),
            "shape": shape,
            "data_offsets": [offset, offset + bytes],
        });
        entries.insert(name.clone(), entry);
        offset += bytes;
    }
    let mut header = vec![0; 8];
    serde_json::to_writer(&mut header, &entries)?;
    // Spaces align the data, as every writer of the format does.
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = (header.len() - 8) as u64;
    header[..8].copy_from_slice(&length.to_le_bytes());
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::{Dtype, inspect};

    fn tensor(name: &str, length: usize) -> TensorInfo {
        TensorInfo { name: name.into(), dtype: Dtype::U8, shape: vec![length], bytes: length as u64 }
    }

    #[test]
    fn shards_are_full_and_a_tensor_is_never_cut() {
        let tensors = [tensor("a", 3), tensor("b", 4), tensor("c", 11), tensor("d", 1), tensor("e", 9)];
        let names = |shard: &[TensorInfo]| shard.iter().map(|t| t.name.clone()).collect::<String>();
        let cut: Vec<String> = shards(&tensors, 10).into_iter().map(names).collect();
        assert_eq!(cut, ["ab", "c", "de"]);
        assert_eq!(shards(&[], 10).len(), 1);
    }

    #[test]
    fn tensors_written_in_pieces_and_in_any_order_are_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = [tensor("a", 3), tensor("b", 4)];
        let (writer, index) = WeightsWriter::new(folder.path(), &tensors, 7).unwrap();
        assert_eq!(index["weight_map"]["b"], "model.safetensors");
        assert_eq!(index["metadata"], json!({"total_size": 7, "total_parameters": 7}));
        writer.write("b", 2, &[6, 7]).unwrap();
        writer.write("a", 0, &[1, 2, 3]).unwrap();
        writer.write("b", 0, &[4, 5]).unwrap();
        writer.finish().unwrap();
        assert_eq!(inspect(folder.path()).unwrap().tensors_count, 2);
        let bytes = std::fs::read(folder.path().join("model.safetensors")).unwrap();
        assert_eq!(bytes[bytes.len() - 7..], [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    #[should_panic(expected = "a tensor's bytes have a place")]
    fn bytes_beyond_a_tensor_are_a_defect() {
        let folder = tempfile::tempdir().unwrap();
        let (writer, _) = WeightsWriter::new(folder.path(), &[tensor("a", 3)], 3).unwrap();
        drop(writer.write("a", 2, &[0, 0]));
    }
}
