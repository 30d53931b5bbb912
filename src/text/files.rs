//! The small JSON files of a model folder that the text modules read.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::Value;

use super::TextError;

/// Returns the bytes of a file; `None` if it does not exist.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, TextError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Io { path: path.to_owned(), source }),
    }
}

/// Returns the JSON of a file; `None` if it does not exist.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>, TextError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    let value =
        serde_json::from_slice(&bytes).map_err(|source| TextError::Json { path: path.to_owned(), source })?;
    Ok(Some(value))
}
