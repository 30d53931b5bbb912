//! Reads the small files of a model's folder, each within a size limit. Every config, tokenizer and template
//! of a model comes through here, once: one set of limits and one reading of JSON for all of them.

use std::borrow::Cow;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use serde_json::Value;

use super::HubError;

/// Limit of a config or template. Real ones have a few kilobytes; a per-module quantization table takes half
/// a megabyte, a `tokenizer_config.json` that lists every added token about one.
pub(super) const CONFIG_BYTES_MAX: u64 = 8 << 20;

/// Limit of `tokenizer.json`. The largest known (Gemma 3) has 33 MB.
pub(super) const TOKENIZER_BYTES_MAX: u64 = 128 << 20;

/// How the files begin that stand for those that Git LFS has not fetched (git-lfs' docs/spec.md).
const LFS_POINTER: &[u8; 39] = b"version https://git-lfs.github.com/spec";

/// The mark before a text in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads `config.json`: always an object. Numbers that JSON cannot write stay as mlx-lm tags them
/// (`{"__float__": "Infinity"}`); [`super::config_f64`] reads both forms.
///
/// # Errors
/// `Damaged` if the file is missing, too large, not UTF-8, not JSON or not an object; `Io`.
pub(super) fn read_config(folder: &Path) -> Result<Value, HubError> {
    read_object(&folder.join("config.json"), CONFIG_BYTES_MAX)
}

/// Reads `generation_config.json`. Returns `None` if it is missing or broken, as mlx-lm does (utils.py,
/// `load_config`): it holds defaults only, and a model serves without them.
pub(super) fn read_generation_config(folder: &Path) -> Option<Value> {
    read_object(&folder.join("generation_config.json"), CONFIG_BYTES_MAX).ok()
}

/// Reads a file that must hold one JSON object of at most `bytes_max` bytes.
pub(super) fn read_object(path: &Path, bytes_max: u64) -> Result<Value, HubError> {
    let value = read_json(path, bytes_max)?.ok_or_else(|| HubError::damaged(path, "is missing"))?;
    if value.is_object() { Ok(value) } else { Err(HubError::damaged(path, "is not a JSON object")) }
}

/// Reads a file's JSON; `None` if there is no such file.
pub(super) fn read_json(path: &Path, bytes_max: u64) -> Result<Option<Value>, HubError> {
    let Some(text) = read_text(path, bytes_max)? else { return Ok(None) };
    let value = serde_json::from_str(&tagged(&text))
        .map_err(|error| HubError::damaged(path, format!("is not valid JSON: {error}")))?;
    Ok(Some(value))
}

/// Reads a file's text; `None` if there is no such file.
pub(super) fn read_text(path: &Path, bytes_max: u64) -> Result<Option<String>, HubError> {
    let Some(bytes) = read_bytes(path, bytes_max)? else { return Ok(None) };
    String::from_utf8(bytes).map(Some).map_err(|_| HubError::damaged(path, "is not UTF-8"))
}

/// Reads a file's bytes, without the mark that some editors put before them; `None` if there is no such file.
pub(super) fn read_bytes(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, HubError> {
    let Some((file, _)) = open_regular(path)? else { return Ok(None) };
    let mut bytes = Vec::new();
    // The limit bounds what is read, not the reported size: the file may grow meanwhile.
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(HubError::io(path))?;
    if bytes.len() as u64 > bytes_max {
        return Err(HubError::damaged(path, format!("is larger than {bytes_max} bytes")));
    }
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    Ok(Some(bytes))
}

/// Opens a regular file and returns it with its metadata; `None` if there is no such file. Other kinds are
/// refused: opening a named pipe would block until somebody writes to it. So is what Git LFS puts in place of
/// a file that it has not fetched.
pub(super) fn open_regular(path: &Path) -> Result<Option<(File, fs::Metadata)>, HubError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => {
            // If a pipe took its place since, the open would wait for a writer.
            let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
            let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
            let file = file.map_err(HubError::io(path))?;
            let metadata = file.metadata().map_err(HubError::io(path))?;
            if !metadata.is_file() {
                return Err(HubError::damaged(path, "is not a regular file"));
            }
            let mut start = [0; LFS_POINTER.len()];
            if file.read_exact_at(&mut start, 0).is_ok() && start == *LFS_POINTER {
                return Err(HubError::damaged(path, "is a Git LFS pointer: the file itself was not fetched"));
            }
            Ok(Some((file, metadata)))
        }
        Ok(_) => Err(HubError::damaged(path, "is not a regular file")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if fs::symlink_metadata(path).is_ok() {
                return Err(HubError::damaged(path, "is a link that leads nowhere"));
            }
            Ok(None)
        }
        Err(error) => Err(HubError::io(path)(error)),
    }
}

/// Tags the numbers that Python writes and JSON does not have, as mlx-lm tags them.
fn tagged(text: &str) -> Cow<'_, str> {
    const NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !NUMBERS.iter().any(|number| text.contains(number)) {
        return Cow::Borrowed(text);
    }
    let (mut out, mut rest, mut quoted) = (String::with_capacity(text.len()), text, false);
    while let Some(next) = rest.chars().next() {
        let number = NUMBERS.iter().find(|number| !quoted && rest.starts_with(**number));
        let taken = match (number, next) {
            (Some(number), _) => {
                out.push_str(&format!("{{\"__float__\": \"{number}\"}}"));
                number.len()
            }
            // An escaped character, a quote above all.
            (None, '\\') if quoted => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, '"') => {
                quoted = !quoted;
                1
            }
            (None, other) => other.len_utf8(),
        };
        if number.is_none() {
            out.push_str(&rest[..taken]);
        }
        rest = &rest[taken..];
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::super::config_f64;
    use super::*;

    fn why(content: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), content).unwrap();
        match read_config(folder.path()) {
            Ok(value) => panic!("read {value}"),
            Err(HubError::Damaged { file, why }) => {
                assert_eq!(file, "config.json");
                why
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn broken_configs_say_what_is_wrong() {
        assert_eq!(why(b"{\"a\": \"\xff\"}"), "is not UTF-8");
        assert_eq!(why(b"[1]"), "is not a JSON object");
        assert!(why(b"{").contains("not valid JSON"));
        assert!(why(b"").contains("not valid JSON"));
        assert!(why("[".repeat(100_000).as_bytes()).contains("recursion"));
        let limit = usize::try_from(CONFIG_BYTES_MAX).unwrap();
        assert!(why(&vec![b' '; limit + 1]).contains("larger than"));
        assert!(matches!(read_config(Path::new("/nonexistent")), Err(HubError::Damaged { .. })));
    }

    #[test]
    fn a_folder_in_place_of_the_file_is_damage() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("config.json")).unwrap();
        assert!(matches!(read_config(folder.path()), Err(HubError::Damaged { .. })));
    }

    #[test]
    fn numbers_as_python_writes_them_are_read() {
        let text = r#"{"a": [0.0, Infinity], "b": "\"Infinity", "c": -Infinity, "NaN": NaN}"#;
        let value: Value = serde_json::from_str(&tagged(text)).unwrap();
        assert_eq!(config_f64(&value["a"][1]), Some(f64::INFINITY));
        assert_eq!(value["b"], "\"Infinity");
        assert_eq!(config_f64(&value["c"]), Some(f64::NEG_INFINITY));
        assert!(config_f64(&value["NaN"]).is_some_and(f64::is_nan));
    }

    #[test]
    fn a_byte_order_mark_is_left_out_of_the_text() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        fs::write(&path, "\u{feff}{\"a\": 1}").unwrap();
        assert_eq!(read_config(folder.path()).unwrap()["a"], 1);
        assert_eq!(read_bytes(&path, 100).unwrap().unwrap()[0], b'{');
    }

    #[test]
    fn what_git_lfs_has_not_fetched_is_named() {
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n";
        assert_eq!(why(pointer.as_bytes()), "is a Git LFS pointer: the file itself was not fetched");
    }

    #[test]
    fn a_link_that_leads_nowhere_is_not_a_missing_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::os::unix::fs::symlink("/nonexistent", &path).unwrap();
        let error = read_bytes(&path, 100).unwrap_err();
        assert_eq!(error.to_string(), "tokenizer.json: is a link that leads nowhere");
    }

    #[test]
    fn a_pipe_in_place_of_a_file_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        let error = read_bytes(&path, 100).unwrap_err();
        assert_eq!(error.to_string(), "tokenizer.json: is not a regular file");
    }

    #[test]
    fn a_broken_generation_config_counts_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read_generation_config(folder.path()).is_none());
        fs::write(folder.path().join("generation_config.json"), "{,").unwrap();
        assert!(read_generation_config(folder.path()).is_none());
        fs::write(folder.path().join("generation_config.json"), "{\"top_p\": 0.9}").unwrap();
        assert!(read_generation_config(folder.path()).is_some());
    }
}
