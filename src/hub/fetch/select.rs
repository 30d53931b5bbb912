//! Which files of a repo are downloaded: what a loader of safetensors reads, nothing else. Never code,
//! pickles, or the same weights in a second format.

use std::collections::BTreeSet;

use super::FetchError;
use super::api::Listed;
use crate::hub::inspect::{INDEX, is_weight_file};

/// Folder of chat templates for special uses.
const TEMPLATES: &str = "additional_chat_templates/";

/// Files of tokenizers that are not JSON.
const TOKENIZERS: [&str; 6] = [
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "merges.txt",
    "vocab.txt",
];

/// Indexes of weights in other formats; the weights are not downloaded.
const FOREIGN_INDEXES: [&str; 4] = [
    "pytorch_model.bin.index.json",
    "tf_model.h5.index.json",
    "flax_model.msgpack.index.json",
    "consolidated.safetensors.index.json",
];

/// Formats of weights that are told by name when a repo has no other.
const FOREIGN: [&str; 7] = [".bin", ".gguf", ".onnx", ".pt", ".pth", ".h5", ".msgpack"];

/// Returns the index of a repo's weights, if there is one: it decides which weights are needed.
pub(super) fn index(files: &[Listed]) -> Option<&Listed> {
    files.iter().find(|file| file.path == INDEX)
}

/// Checks what can be told from the list of files alone, before anything is written.
///
/// # Errors
/// `Unsupported` if the repo has no config, or no weights that could be loaded.
pub(super) fn check(repo: &str, files: &[Listed]) -> Result<(), FetchError> {
    let unsupported = |why: String| Err(FetchError::Unsupported { repo: repo.to_owned(), why });
    if !files.iter().any(|file| file.path == "config.json") {
        return unsupported("has no config.json: it is not a model in Hugging Face layout".into());
    }
    // An index may name any.
    let has_index = index(files).is_some();
    let is_weight = |file: &Listed| is_plain(&file.path) && (has_index || is_weight_file(&file.path));
    if files.iter().any(is_weight) { Ok(()) } else { unsupported(without_weights(files)) }
}

/// Returns the files to download; `named` are those that the index names, none without an index.
///
/// # Errors
/// `Unsupported` if there are no weights that could be loaded, or one that the index names is missing.
pub(super) fn wanted(
    repo: &str,
    files: &[Listed],
    named: Option<&BTreeSet<String>>,
) -> Result<Vec<Listed>, FetchError> {
    let unsupported = |why: String| FetchError::Unsupported { repo: repo.to_owned(), why };
    let weights = weights(files, named).map_err(unsupported)?;
    if weights.is_empty() {
        return Err(unsupported(without_weights(files)));
    }
    let small = files.iter().filter(|file| is_small(&file.path)).cloned();
    Ok(small.chain(weights).collect())
}

/// The weights: those that the index names, unless none of them is there, as the loader chooses. Some of them
/// are not a model.
fn weights(files: &[Listed], named: Option<&BTreeSet<String>>) -> Result<Vec<Listed>, String> {
    let plain = || files.iter().filter(|file| is_plain(&file.path));
    let named = named.into_iter().flatten();
    let found = named.map(|name| plain().find(|file| file.path == *name).ok_or(name));
    let (there, missing): (Vec<_>, Vec<_>) = found.partition(Result::is_ok);
    if there.is_empty() {
        return Ok(plain().filter(|file| is_weight_file(&file.path)).cloned().collect());
    }
    let count = there.len() + missing.len();
    match missing.into_iter().find_map(Result::err) {
        Some(name) => Err(format!("has no {name}, which its index names among {count} files")),
        None => Ok(there.into_iter().flatten().cloned().collect()),
    }
}

fn is_plain(path: &str) -> bool {
    path.ends_with(".safetensors") && !path.contains('/')
}

/// Whether a file is a config, tokenizer or template.
pub(super) fn is_small(path: &str) -> bool {
    if let Some(template) = path.strip_prefix(TEMPLATES) {
        return template.ends_with(".jinja") && !template.contains('/');
    }
    !path.contains('/')
        && !path.starts_with('.')
        && (path.ends_with(".json") && !FOREIGN_INDEXES.contains(&path)
            || path.ends_with(".jinja")
            || path.ends_with(".tiktoken")
            || TOKENIZERS.contains(&path))
}

fn without_weights(files: &[Listed]) -> String {
    let foreign = files.iter().find(|file| FOREIGN.iter().any(|ending| file.path.ends_with(ending)));
    foreign.map_or_else(
        || "has no safetensors file".to_owned(),
        |file| format!("has no model*.safetensors; {} is in a format that is not loaded", file.path),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(paths: &[&str], named: Option<&[&str]>) -> Result<Vec<String>, String> {
        let files: Vec<Listed> = paths.iter().map(|path| Listed::of(path, 1)).collect();
        let named = named.map(|named| named.iter().map(|name| (*name).to_owned()).collect());
        let chosen = check("a/b", &files).and_then(|()| wanted("a/b", &files, named.as_ref()));
        let chosen = chosen.map_err(|error| error.to_string())?;
        Ok(chosen.into_iter().map(|file| file.path).collect())
    }

    #[test]
    fn only_what_a_loader_reads_is_downloaded() {
        let found = chosen(
            &[
                ".gitattributes",
                "README.md",
                "config.json",
                "modeling_x.py",
                "model.safetensors",
                "consolidated.safetensors",
                "pytorch_model.bin",
                "pytorch_model.bin.index.json",
                "x.gguf",
                "onnx/model.onnx",
                "onnx/config.json",
                "tokenizer.json",
                "tokenizer.model",
                "merges.txt",
                "notes.txt",
                "chat_template.jinja",
                "additional_chat_templates/tool_use.jinja",
                "additional_chat_templates/a/b.jinja",
                "original/model.safetensors",
                "adapter_model.safetensors",
                "training_args.bin",
                ".hidden.json",
            ],
            None,
        );
        let expected = [
            "config.json",
            "tokenizer.json",
            "tokenizer.model",
            "merges.txt",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
            "model.safetensors",
        ];
        assert_eq!(found.unwrap(), expected);
    }

    #[test]
    fn the_index_decides_which_weights_are_needed() {
        let paths = [
            "config.json",
            INDEX,
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ];
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        assert_eq!(chosen(&paths, Some(&shards)).unwrap()[2..], shards);
        assert_eq!(chosen(&paths, Some(&["weights-1.safetensors"])).unwrap().len(), 5, "a stale index");
        let odd = ["config.json", INDEX, "weights.00.safetensors"];
        assert_eq!(chosen(&odd, Some(&["weights.00.safetensors"])).unwrap()[2], "weights.00.safetensors");
        assert!(chosen(&["config.json", INDEX, "x"], Some(&["../x", "a/b.safetensors"])).is_err());
    }

    #[test]
    fn a_repo_without_a_file_that_its_index_names_is_refused() {
        let paths = ["config.json", INDEX, "model-1.safetensors", "model-3.safetensors"];
        let named = ["model-1.safetensors", "model-2.safetensors", "model-3.safetensors"];
        let why = chosen(&paths, Some(&named)).unwrap_err();
        assert_eq!(why, "a/b has no model-2.safetensors, which its index names among 3 files");
        assert!(chosen(&paths, Some(&["model-1.safetensors", "x/model-3.safetensors"])).is_err());
    }

    #[test]
    fn a_repo_with_an_index_is_refused_by_its_list_alone() {
        let files = |paths: &[&str]| paths.iter().map(|path| Listed::of(path, 1)).collect::<Vec<_>>();
        for paths in [&["config.json", INDEX, "pytorch_model.bin"][..], &[INDEX, "model.safetensors"]] {
            assert!(check("a/b", &files(paths)).is_err(), "{paths:?}");
        }
        assert!(check("a/b", &files(&["config.json", INDEX, "weights.safetensors"])).is_ok());
        assert!(check("a/b", &files(&["config.json", "weights.safetensors"])).is_err());
    }

    #[test]
    fn a_repo_without_weights_is_refused_by_what_it_has() {
        let why = chosen(&["config.json", "model.Q4_K.gguf"], None).unwrap_err();
        assert_eq!(why, "a/b has no model*.safetensors; model.Q4_K.gguf is in a format that is not loaded");
        assert!(chosen(&["model.safetensors"], None).unwrap_err().contains("has no config.json"));
        assert!(chosen(&["config.json"], None).unwrap_err().contains("has no safetensors file"));
    }
}
