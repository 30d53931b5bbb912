//! The special tokens of a model folder: what goes around a raw prompt, and what ends a sequence.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use mlxd::text::eos_token_ids;
use serde_json::{Value, json};

use crate::text_template::{folder, tokenizer};

#[test]
fn a_raw_prompt_gets_special_tokens_once() {
    let config = |extra: Value| {
        let mut config = json!({"bos_token": "<s>", "eos_token": "</s>"});
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let folder = folder(&[("tokenizer_config.json", config)]);
        tokenizer(folder.path())
    };
    let plain = config(json!({}));
    assert_eq!(
        plain.encode("hello world hello", false).unwrap(),
        [1, 2, 1],
        "the file's truncation is not ours"
    );
    assert_eq!(plain.encode_prompt("hello").unwrap(), [3, 1]);
    assert_eq!(plain.encode_prompt("<s>hello").unwrap(), [3, 1]);
    assert_eq!(plain.encode_prompt("nothing").unwrap(), [3, 0]);
    assert_eq!(plain.encode_prompt("").unwrap(), [3]);
    assert_eq!((plain.bos_token(), plain.eos_token_id(), plain.vocabulary_size()), (Some("<s>"), Some(4), 6));
    let without = config(json!({"add_bos_token": false}));
    assert_eq!(without.encode_prompt("hello").unwrap(), [1]);
    let both = config(json!({"add_bos_token": true, "add_eos_token": true}));
    assert_eq!(both.encode_prompt("hello").unwrap(), [3, 1, 4]);
    for silent in
        [json!({"add_eos_token": false}), json!({"add_bos_token": null}), json!({"add_bos_token": true})]
    {
        assert_eq!(config(silent).encode_prompt("hello").unwrap(), [3, 1], "as tokenizer.json says");
    }
}

#[test]
fn eos_ids_are_those_of_all_files() {
    let named = folder(&[("tokenizer_config.json", json!({"eos_token": "</s>"}))]);
    let tokenizer_with_eos = tokenizer(named.path());
    let ids = |generation: Value, config: Value| {
        eos_token_ids(&config, Some(&generation), &tokenizer_with_eos, None)
    };
    assert_eq!(ids(json!({"eos_token_id": [9, 7]}), json!({"eos_token_id": [7, 8]})), [4, 7, 8, 9]);
    assert_eq!(ids(json!({}), json!({"eos_token_id": 8})), [4, 8]);
    assert_eq!(ids(json!({}), json!({"eos_token_id": [4, -1, null]})), [4]);
    assert_eq!(ids(json!({}), json!({"text_config": {"eos_token_id": 5}})), [4, 5]);
    let bare = folder(&[]);
    assert!(eos_token_ids(&json!({}), None, &tokenizer(bare.path()), None).is_empty());
    assert_eq!(eos_token_ids(&json!({"eos_token_id": 8}), None, &tokenizer(bare.path()), Some(5)), [5, 8]);
}
