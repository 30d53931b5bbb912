//! Rebuilds the Hugging Face tokenizer of a GGUF file: its vocabulary and merges, its special tokens, and the
//! configs that name them. What stands around the merges is the business of `pretokenizer`, merges that
//! follow from scores that of `sentencepiece`.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::super::HubError;
use super::gguf::Gguf;
use super::pretokenizer::{BYTE, CONTROL, UNUSED, USER_DEFINED, pre};
use super::sentencepiece;

/// The tokenizer's files.
#[derive(Debug)]
pub(super) struct Tokenizer {
    /// `tokenizer.json`
    pub(super) tokenizer: Value,
    /// `tokenizer_config.json`
    pub(super) config: Value,
    /// `generation_config.json`
    pub(super) generation: Value,
    /// Length of the vocabulary, fillers included.
    pub(super) tokens_count: usize,
}

/// Builds the files.
///
/// # Errors
/// `Unsupported` for unknown kinds of tokenizers and pre-tokenizers, `Damaged` if tokens, merges, scores and
/// special ids contradict each other.
pub(super) fn build(gguf: &Gguf, context_length: u64) -> Result<Tokenizer, HubError> {
    let is_sentencepiece = match gguf.text("tokenizer.ggml.model")? {
        Some("gpt2") => false,
        Some("llama") => true,
        None => return Err(HubError::unsupported("the GGUF file has no tokenizer")),
        Some(other) => {
            let why = format!(
                "the GGUF file's tokenizer is of the kind {other:?}, which cannot be rebuilt from it (\"gpt2\" \
                 and \"llama\" can): the model needs the tokenizer.json of its original"
            );
            return Err(HubError::unsupported(why));
        }
    };
    let tokens = gguf.texts("tokenizer.ggml.tokens")?;
    let kinds = gguf.ints("tokenizer.ggml.token_type")?;
    if kinds.len() != tokens.len() {
        return Err(gguf.damaged("has not as many token types as tokens"));
    }
    let vocab = vocab(gguf, tokens, kinds)?;
    let pre = if is_sentencepiece {
        sentencepiece::pre(gguf)?
    } else {
        pre(gguf.text("tokenizer.ggml.pre")?.unwrap_or("default"))?
    };
    let mut model = json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": null,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": is_sentencepiece,
        "byte_fallback": is_sentencepiece && kinds.contains(&BYTE),
        "ignore_merges": pre.ignore_merges,
        "vocab": in_order(tokens, kinds),
    });
    if is_sentencepiece {
        model["unk_token"] = special(gguf, tokens, "unknown")?.map_or(Value::Null, |(_, text)| json!(text));
        model["merges"] = Value::Array(sentencepiece::merges(gguf, (tokens, kinds), &vocab)?);
    } else {
        model["merges"] = Value::Array(merges(gguf, &vocab)?);
    }
    let added = added_tokens(tokens, kinds);
    let add_bos = gguf.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(pre.add_bos);
    let add_eos = gguf.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let bos = special(gguf, tokens, "bos")?.filter(|_| add_bos);
    let eos = special(gguf, tokens, "eos")?.filter(|_| add_eos);
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": pre.normalizer,
        "pre_tokenizer": pre.splitter,
        "post_processor": post_processor(pre.post, bos, eos),
        "decoder": pre.decoder,
        "model": model,
    });
    let config = config(gguf, tokens, &added, context_length)?;
    let generation = generation_config(gguf, tokens)?;
    Ok(Tokenizer { tokenizer, config, generation, tokens_count: tokens.len() })
}

/// Fillers (`[PAD151660]`) round a vocabulary up to its tensor's size; no text becomes one.
fn is_filler(token: &str, kind: i64) -> bool {
    kind == UNUSED && token.starts_with("[PAD")
}

fn vocab<'a>(gguf: &Gguf, tokens: &'a [String], kinds: &[i64]) -> Result<HashMap<&'a str, usize>, HubError> {
    let mut vocab = HashMap::with_capacity(tokens.len());
    for (id, (token, &kind)) in tokens.iter().zip(kinds).enumerate() {
        if !is_filler(token, kind)
            && let Some(other) = vocab.insert(token.as_str(), id)
        {
            return Err(gguf.damaged(format!("has the token {token:?} twice, as {other} and {id}")));
        }
    }
    Ok(vocab)
}

/// The vocabulary as an object, in the order of ids.
fn in_order(tokens: &[String], kinds: &[i64]) -> Value {
    let entries = tokens.iter().zip(kinds).enumerate();
    let real = entries.filter(|(_, (token, kind))| !is_filler(token, **kind));
    Value::Object(real.map(|(id, (token, _))| (token.clone(), json!(id))).collect::<Map<_, _>>())
}

fn merges(gguf: &Gguf, vocab: &HashMap<&str, usize>) -> Result<Vec<Value>, HubError> {
    let split = |merge: &String| {
        // The first character belongs to the left part even if it is a space.
        let border = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let (left, right) = border.map(|at| (&merge[..at], &merge[at + 1..]))?;
        let known = [left, right, &format!("{left}{right}")].iter().all(|token| vocab.contains_key(token));
        known.then(|| json!([left, right]))
    };
    let merges = gguf.texts("tokenizer.ggml.merges")?;
    let checked = merges.iter().map(|merge| {
        split(merge).ok_or_else(|| gguf.damaged(format!("the merge {merge:?} is not of known tokens")))
    });
    checked.collect()
}

fn added_tokens(tokens: &[String], kinds: &[i64]) -> Vec<Value> {
    let entries = tokens.iter().zip(kinds).enumerate();
    let added = entries.filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED));
    added
        .map(|(id, (token, kind))| {
            json!({
                "id": id,
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": *kind == CONTROL,
            })
        })
        .collect()
}

/// A special token's id and text, if the file names one.
fn special<'a>(gguf: &Gguf, tokens: &'a [String], name: &str) -> Result<Option<(usize, &'a str)>, HubError> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    let Some(id) = gguf.uint(&key)? else {
        return Ok(None);
    };
    let found = usize::try_from(id).ok().and_then(|id| Some((id, tokens.get(id)?.as_str())));
    found.map(Some).ok_or_else(|| gguf.damaged(format!("{key} is {id}, beyond the vocabulary")))
}

fn post_processor(post: Value, bos: Option<(usize, &str)>, eos: Option<(usize, &str)>) -> Value {
    if bos.is_none() && eos.is_none() {
        return post;
    }
    let part = |sequence: &str, kind: u32| {
        let token = |token: Option<(usize, &str)>| {
            token.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": kind}}))
        };
        let text = json!({"Sequence": {"id": sequence, "type_id": kind}});
        [token(bos), Some(text), token(eos)].into_iter().flatten().collect::<Vec<_>>()
    };
    let tokens: Map<_, _> = bos
        .iter()
        .chain(&eos)
        .map(|(id, text)| ((*text).to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let pair = [part("A", 0), part("B", 1)].concat();
    let template = json!({
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": pair,
        "special_tokens": tokens,
    });
    if post.is_null() { template } else { json!({"type": "Sequence", "processors": [post, template]}) }
}

/// The class is the one that takes `tokenizer.json` as it is; named classes build parts of it anew.
fn config(gguf: &Gguf, tokens: &[String], added: &[Value], context_length: u64) -> Result<Value, HubError> {
    let mut decoder = Map::new();
    for token in added {
        let mut entry = token.as_object().cloned().unwrap_or_default();
        if let Some(id) = entry.shift_remove("id") {
            decoder.insert(id.to_string(), Value::Object(entry));
        }
    }
    let mut config = json!({
        "add_prefix_space": false,
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": false,
        "model_max_length": context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    for (key, name) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        if let Some((_, text)) = special(gguf, tokens, name)? {
            config[key] = json!(text);
        }
    }
    if let Some(template) = gguf.text("tokenizer.chat_template")? {
        config["chat_template"] = json!(template);
    }
    Ok(config)
}

/// Ends of generation: of the text, of a turn and of a message, as far as the file tells them apart.
fn generation_config(gguf: &Gguf, tokens: &[String]) -> Result<Value, HubError> {
    let mut config = json!({});
    let mut ends = Vec::new();
    for name in ["eos", "eot", "eom"] {
        if let Some((id, _)) = special(gguf, tokens, name)?
            && !ends.contains(&id)
        {
            ends.push(id);
        }
    }
    if let Some((id, _)) = special(gguf, tokens, "bos")? {
        config["bos_token_id"] = json!(id);
    }
    match ends.as_slice() {
        [] => {}
        [end] => config["eos_token_id"] = json!(end),
        ends => config["eos_token_id"] = json!(ends),
    }
    if let Some((id, _)) = special(gguf, tokens, "padding")? {
        config["pad_token_id"] = json!(id);
    }
    Ok(config)
}
