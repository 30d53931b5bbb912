//! The folder of a converted model while it is made: beside its destination, under a hidden name, until it is
//! complete and on disk; then it takes its own name. If it is never finished it vanishes, and the destination
//! is as it was.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::super::HubError;
use super::super::read::{TOKENIZER_BYTES_MAX, open_regular};
use super::shards::WeightsWriter;
use crate::hub::TensorInfo;
use crate::hub::folder::{free_bytes, names};

/// A folder that takes its name when it is complete, and vanishes if it never is.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    out: PathBuf,
    overwrite: bool,
}

impl Draft {
    /// Makes the hidden folder beside `out`. `out` may be an empty folder, or, to be replaced, a model's; it
    /// is never `source`, nor in it, nor around it.
    ///
    /// # Errors
    /// `Io`: with the kind `AlreadyExists` if `out` has files and may not be replaced, `InvalidInput` if it
    /// overlaps with `source` or names no folder.
    pub fn new(source: &Path, out: &Path, overwrite: bool) -> Result<Self, HubError> {
        if overlaps(source, out) {
            return Err(refusal(out, io::ErrorKind::InvalidInput, "is the source, or in it, or around it"));
        }
        // Through a link, so that the weights come to where it leads.
        let out = match fs::symlink_metadata(out) {
            Ok(found) if found.is_symlink() => out.canonicalize().map_err(HubError::io(out))?,
            _ => out.to_path_buf(),
        };
        if out.exists() && !is_empty(&out)? {
            check_replaced(&out, overwrite)?;
        }
        let path = beside(&out, "partial")?;
        fs::create_dir_all(&path).map_err(HubError::io(&path))?;
        Ok(Self { path, out, overwrite })
    }

    /// Lays out the weight files for these tensors, of `parameters` elements in all.
    ///
    /// # Errors
    /// `Io`: with the kind `StorageFull` if the disk has less room than the tensors need.
    pub fn weights(&self, tensors: &[TensorInfo], parameters: u64) -> Result<WeightsWriter, HubError> {
        let needed: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
        check_room(&self.path, needed)?;
        let (writer, index) = WeightsWriter::new(&self.path, tensors, parameters)?;
        self.json(super::super::inspect::INDEX, &index, true)?;
        Ok(writer)
    }

    /// Writes a JSON file, `pretty` if people read it.
    ///
    /// # Errors
    /// `Io`.
    pub fn json(&self, name: &str, value: &Value, pretty: bool) -> Result<(), HubError> {
        let path = self.path.join(name);
        let text = if pretty { serde_json::to_vec_pretty(value) } else { serde_json::to_vec(value) };
        let text = text.map_err(|error| HubError::io(&path)(error.into()))?;
        let mut file = File::create_new(&path).map_err(HubError::io(&path))?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(HubError::io(&path))
    }

    /// Copies what a model has besides config and weights: tokenizer, templates, generation config, other
    /// JSON, licences. No code, no pickles, no folders, nothing hidden.
    ///
    /// # Errors
    /// `Damaged` for a file that is none or is too large, `Io`.
    pub fn copy_others(&self, source: &Path) -> Result<(), HubError> {
        const TEMPLATES: &str = "additional_chat_templates";
        for name in names(source).map_err(HubError::io(source))? {
            if is_other(&name) {
                copy(&source.join(&name), &self.path.join(&name))?;
            }
        }
        let templates = source.join(TEMPLATES);
        if templates.is_dir() {
            let to = self.path.join(TEMPLATES);
            fs::create_dir(&to).map_err(HubError::io(&to))?;
            let names = names(&templates).map_err(HubError::io(&templates))?;
            for name in names.iter().filter(|name| name.ends_with(".jinja")) {
                copy(&templates.join(name), &to.join(name))?;
            }
        }
        Ok(())
    }

    /// Puts the folder in its place. What has come there meanwhile is treated as what was there before.
    ///
    /// # Errors
    /// `Io`. The destination is then as it was, unless the error names the hidden folder of the model that
    /// was replaced, or the system could not say that the new name is on disk: then it is the new model.
    pub fn finish(self) -> Result<(), HubError> {
        let sync = |path: &Path| File::open(path)?.sync_all();
        sync(&self.path).map_err(HubError::io(&self.path))?;
        let old = match fs::rename(&self.path, &self.out) {
            Ok(()) => None,
            // The rename takes the place of an empty folder and of no other.
            Err(error) if is_taken(&error) => Some(self.replace()?),
            Err(error) => return Err(HubError::io(&self.out)(error)),
        };
        let parent = self.out.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync(parent.unwrap_or(Path::new("."))).map_err(HubError::io(&self.out))?;
        old.map_or(Ok(()), |old| fs::remove_dir_all(&old).map_err(HubError::io(&old)))
    }

    /// Takes the place of a folder with files, and returns where that is now.
    fn replace(&self) -> Result<PathBuf, HubError> {
        check_replaced(&self.out, self.overwrite)?;
        let old = beside(&self.out, "old")?;
        fs::rename(&self.out, &old).map_err(HubError::io(&self.out))?;
        if let Err(error) = fs::rename(&self.path, &self.out) {
            // The first error is what the caller must hear; the old folder is back or under its hidden name.
            let _ = fs::rename(&old, &self.out);
            return Err(HubError::io(&self.out)(error));
        }
        Ok(old)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // After `finish` it is gone; before, nobody can use it.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Returns whether one path, links resolved, is the other or holds it.
fn overlaps(source: &Path, out: &Path) -> bool {
    let Ok(source) = source.canonicalize() else { return false };
    // What does not exist yet has a real parent, or a parent that does not exist either.
    let real = out.ancestors().find_map(|known| {
        let rest = out.strip_prefix(known).ok()?;
        let known = if known.as_os_str().is_empty() { Path::new(".") } else { known };
        Some(known.canonicalize().ok()?.join(rest))
    });
    real.is_some_and(|out| {
        source == out || source.is_dir() && out.starts_with(&source) || source.starts_with(out)
    })
}

/// Fails if the disk of a folder has less than `needed` bytes.
fn check_room(folder: &Path, needed: u64) -> Result<(), HubError> {
    // A file system that does not say gets the benefit of the doubt; the write will tell.
    let Ok(available) = free_bytes(folder) else { return Ok(()) };
    if needed <= available {
        return Ok(());
    }
    let why = format!("the weights need {needed} bytes, and the disk has {available}");
    Err(HubError::io(folder)(io::Error::new(io::ErrorKind::StorageFull, why)))
}

/// Returns whether a file is copied: no config, whose quantization changes, and no index of weights.
fn is_other(name: &str) -> bool {
    let ending = Path::new(name).extension().and_then(OsStr::to_str).unwrap_or_default();
    let is_known = matches!(ending, "json" | "jinja" | "model" | "tiktoken" | "txt");
    let is_licence = ["LICENSE", "LICENCE", "NOTICE"].iter().any(|start| name.starts_with(start));
    name != "config.json" && !name.ends_with(".index.json") && (is_known || is_licence)
}

/// Copies a regular file of a bounded size; a folder is left.
fn copy(from: &Path, to: &Path) -> Result<(), HubError> {
    if from.is_dir() {
        return Ok(());
    }
    let Some((file, _)) = open_regular(from)? else { return Ok(()) };
    let mut copied = File::create_new(to).map_err(HubError::io(to))?;
    let bytes = io::copy(&mut file.take(TOKENIZER_BYTES_MAX + 1), &mut copied).map_err(HubError::io(to))?;
    if bytes > TOKENIZER_BYTES_MAX {
        return Err(HubError::damaged(from, format!("is larger than {TOKENIZER_BYTES_MAX} bytes")));
    }
    copied.sync_all().map_err(HubError::io(to))
}

fn refusal(out: &Path, kind: io::ErrorKind, why: &str) -> HubError {
    HubError::io(out)(io::Error::new(kind, why))
}

/// Fails unless a folder with files may be replaced.
fn check_replaced(out: &Path, overwrite: bool) -> Result<(), HubError> {
    let refuse = |why| Err(refusal(out, io::ErrorKind::AlreadyExists, why));
    if !overwrite {
        return refuse("exists and has files in it");
    }
    // Whoever names a wrong folder must not lose it.
    if !out.join("config.json").is_file() {
        return refuse("is not a model's folder, so it is not replaced");
    }
    Ok(())
}

/// Returns whether a rename found a folder with files in its way; systems call it either.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists)
}

fn is_empty(folder: &Path) -> Result<bool, HubError> {
    Ok(fs::read_dir(folder).map_err(HubError::io(folder))?.next().is_none())
}

/// A hidden name beside `out` that is free. Model roots skip hidden names.
fn beside(out: &Path, what: &str) -> Result<PathBuf, HubError> {
    let Some(name) = out.file_name() else {
        return Err(refusal(out, io::ErrorKind::InvalidInput, "names no folder"));
    };
    let process = std::process::id();
    let free = (0..1000)
        .map(|i| out.with_file_name(format!(".{}.{what}-{process}-{i}", name.to_string_lossy())))
        .find(|path| !path.exists());
    free.ok_or_else(|| HubError::io(out)(io::Error::from(io::ErrorKind::AlreadyExists)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overlaps_with_the_source_is_refused_whatever_it_is_called() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("config.json"), "{}").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&source, &link).unwrap();
        for out in [source.clone(), link.clone(), link.join("new/inner"), folder.path().to_path_buf()] {
            for overwrite in [false, true] {
                let error = Draft::new(&source, &out, overwrite).unwrap_err().to_string();
                assert!(error.contains("is the source"), "{}: {error}", out.display());
            }
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        drop(Draft::new(&source, &folder.path().join("source-too"), false).unwrap());
    }

    #[test]
    fn what_comes_to_the_destination_meanwhile_is_not_lost() {
        let folder = tempfile::tempdir().unwrap();
        let (source, out) = (folder.path().join("source"), folder.path().join("out"));
        for (overwrite, why) in [(false, "has files in it"), (true, "not a model's folder")] {
            let draft = Draft::new(&source, &out, overwrite).unwrap();
            draft.json("config.json", &Value::Null, true).unwrap();
            fs::create_dir(&out).unwrap();
            fs::write(out.join("letter.txt"), "dear").unwrap();
            let error = draft.finish().unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no hidden folder stays");
            assert_eq!(fs::read_to_string(out.join("letter.txt")).unwrap(), "dear");
            fs::remove_dir_all(&out).unwrap();
        }
    }

    #[test]
    fn an_empty_folder_and_a_model_that_come_meanwhile_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (source, out) = (folder.path().join("source"), folder.path().join("out"));
        for (overwrite, file) in [(false, None), (true, Some("config.json"))] {
            let draft = Draft::new(&source, &out, overwrite).unwrap();
            draft.json("new.json", &Value::Null, true).unwrap();
            fs::create_dir(&out).unwrap();
            if let Some(file) = file {
                fs::write(out.join(file), "{}").unwrap();
            }
            draft.finish().unwrap();
            assert_eq!(names(&out).unwrap(), ["new.json"]);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no hidden folder stays");
            fs::remove_dir_all(&out).unwrap();
        }
    }

    #[test]
    fn a_link_is_written_through_unless_it_leads_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let (source, out) = (folder.path().join("source"), folder.path().join("out"));
        std::os::unix::fs::symlink("elsewhere", &out).unwrap();
        assert!(Draft::new(&source, &out, true).is_err());
        fs::create_dir(folder.path().join("elsewhere")).unwrap();
        let draft = Draft::new(&source, &out, false).unwrap();
        draft.json("new.json", &Value::Null, true).unwrap();
        draft.finish().unwrap();
        assert!(fs::symlink_metadata(&out).unwrap().is_symlink());
        assert_eq!(names(&folder.path().join("elsewhere")).unwrap(), ["new.json"]);
    }

    #[test]
    fn folders_among_the_other_files_are_left() {
        let folder = tempfile::tempdir().unwrap();
        let (source, out) = (folder.path().join("source"), folder.path().join("out"));
        fs::create_dir_all(source.join("LICENSES/more.txt")).unwrap();
        fs::write(source.join("tokenizer.json"), "{}").unwrap();
        let draft = Draft::new(&source, &out, false).unwrap();
        draft.copy_others(&source).unwrap();
        draft.finish().unwrap();
        assert_eq!(names(&out).unwrap(), ["tokenizer.json"]);
    }

    #[test]
    fn more_than_the_disk_has_is_refused_before_the_first_byte() {
        let folder = tempfile::tempdir().unwrap();
        let error = check_room(folder.path(), u64::MAX).unwrap_err();
        assert!(matches!(&error, HubError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull));
        assert!(error.to_string().contains("the disk has"));
        assert!(check_room(folder.path(), 1).is_ok());
    }

    #[test]
    fn code_and_pickles_are_not_copied() {
        for copied in ["tokenizer.json", "chat_template.jinja", "tokenizer.model", "merges.txt", "LICENSE"] {
            assert!(is_other(copied), "{copied}");
        }
        for left in ["config.json", "model.safetensors.index.json", "modeling_x.py", "pytorch_model.bin"] {
            assert!(!is_other(left), "{left}");
        }
    }
}
