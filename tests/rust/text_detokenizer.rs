//! Streamed decoding against decoding at once, for every kind of decoder, on small tokenizers made here.
//! The tokenizers crate's own decode is the reference.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::LazyLock;

use mlxd::hub::read_text_files;
use mlxd::text::{TextError, TextFiles, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Tokens of byte-level BPE: stand-ins for parts of characters, invalid bytes, words, and added tokens.
const BYTE_LEVEL: &[&str] = &[
    "a", "Ġ", "Ġb", "Ċ", "ð", "Ł", "ĺ", "Ģ", "ðŁĺ", "Ã", "©", "Ã©", "ÿ", "æĹ¥", "Ġæ", "Ĺ", "¥", "é", "x y",
    "日",
];
/// Tokens of SentencePiece models.
const SENTENCE_PIECE: &[&str] = &[
    "▁",
    "▁▁",
    "▁a",
    "b",
    "▁日本",
    "<0xE6>",
    "<0x97>",
    "<0xA5>",
    "<0xF0>",
    "<0x9F>",
    "<0x0A>",
    "<0xff>",
    "<0xZZ>",
    "é",
    "<0xE69>",
    " ",
    "c▁",
];
/// Tokens of WordPiece models.
const WORD_PIECE: &[&str] =
    &["un", "##able", "##s", ".", ",", "don", "'", "n't", "日", "do not", "[CLS]", "!"];

/// A tokenizer of these tokens, the last two of them added ones, with this decoder.
fn tokenizer(tokens: &[&str], decoder: &Value) -> (tempfile::TempDir, Tokenizer, tokenizers::Tokenizer) {
    made(tokens, &json!({ "decoder": decoder }))
}

/// The same with these steps.
fn made(tokens: &[&str], steps: &Value) -> (tempfile::TempDir, Tokenizer, tokenizers::Tokenizer) {
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    let added: Vec<Value> = ["<|end|>", "<|a b|>"]
        .iter()
        .enumerate()
        .map(|(n, token)| {
            json!({"id": tokens.len() + n, "content": token, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": n == 0})
        })
        .collect();
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": steps["normalizer"], "pre_tokenizer": steps["pre_tokenizer"], "post_processor": null,
        "decoder": steps["decoder"],
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, file.to_string()).unwrap();
    let ours = Tokenizer::new(&read_text_files(folder.path()).unwrap()).unwrap();
    let reference = tokenizers::Tokenizer::from_file(path).unwrap();
    (folder, ours, reference)
}

fn replace(pattern: &str, content: &str) -> Value {
    json!({"type": "Replace", "pattern": {"String": pattern}, "content": content})
}

fn strip(start: usize, stop: usize) -> Value {
    json!({"type": "Strip", "content": " ", "start": start, "stop": stop})
}

fn sequence(stages: &[Value]) -> Value {
    json!({"type": "Sequence", "decoders": stages})
}

fn metaspace(scheme: &str) -> Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true})
}

/// Tokens, decoder, our tokenizer, the reference.
type Case = (&'static [&'static str], Value, Tokenizer, tokenizers::Tokenizer);

/// One tokenizer for each decoder.
static ALL: LazyLock<Vec<Case>> = LazyLock::new(|| {
    let load = |(tokens, decoder)| {
        let (_folder, ours, reference) = tokenizer(tokens, &decoder);
        (tokens, decoder, ours, reference)
    };
    decoders().into_iter().map(load).collect()
});

fn decoders() -> Vec<(&'static [&'static str], Value)> {
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let (fallback, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    let word_piece = |cleanup: bool| json!({"type": "WordPiece", "prefix": "##", "cleanup": cleanup});
    vec![
        (BYTE_LEVEL, byte_level.clone()),
        (BYTE_LEVEL, sequence(&[byte_level, strip(1, 0)])),
        (SENTENCE_PIECE, sequence(&[replace("▁", " "), fallback.clone(), fuse.clone(), strip(1, 0)])),
        (SENTENCE_PIECE, sequence(&[replace("▁", " "), fallback.clone(), fuse.clone()])),
        (SENTENCE_PIECE, sequence(&[fallback.clone(), metaspace("always")])),
        (SENTENCE_PIECE, sequence(&[fallback, fuse, replace("▁", " ")])),
        (SENTENCE_PIECE, metaspace("first")),
        (SENTENCE_PIECE, metaspace("never")),
        (SENTENCE_PIECE, sequence(&[replace("▁", " "), strip(1, 0)])),
        (WORD_PIECE, word_piece(true)),
        (WORD_PIECE, word_piece(false)),
        (WORD_PIECE, Value::Null),
    ]
}

/// The stream's parts; each is whole characters by its type.
fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut detokenizer = tokenizer.detokenizer();
    let mut parts: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
    parts.push(detokenizer.finish());
    parts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn deltas_concatenate_to_the_whole_decode(ids in prop::collection::vec(0u32..26, 0..40)) {
        for (tokens, decoder, ours, reference) in ALL.iter() {
            let parts = stream(ours, &ids);
            let whole = ours.decode(&ids).unwrap();
            prop_assert_eq!(parts.concat(), whole.as_str(), "{}", decoder);
            // The tokenizers crate drops every space of a first token, not only that before the text.
            let inner_space = |token: &str| token.chars().skip(1).any(|c| c == '▁');
            let first = ids.iter().find(|id| (**id as usize) < tokens.len() + 2);
            let first = first.and_then(|id| tokens.get(*id as usize));
            if decoder.to_string().contains("Metaspace") && first.is_some_and(|token| inner_space(token)) {
                continue;
            }
            let theirs = reference.decode(&ids, false).unwrap();
            // A run of <0xNN> that is not UTF-8 is U+FFFD throughout for the tokenizers crate, valid
            // characters in it included; here, as in mlx-lm, only what is not a character is.
            if !theirs.contains('\u{fffd}') || *tokens == BYTE_LEVEL {
                prop_assert_eq!(whole, theirs, "{}", decoder);
            }
        }
    }

    #[test]
    fn a_prompt_and_its_output_are_the_text_of_all_their_tokens(
        ids in prop::collection::vec(0u32..26, 1..30), at in 0usize..30,
    ) {
        for (_, decoder, ours, _) in ALL.iter() {
            let (prompt, output) = ids.split_at(at.min(ids.len()));
            let prompt_text = ours.decode(prompt).unwrap();
            let whole = ours.decode(&ids).unwrap();
            // A prompt that ends within a character has no text of its own.
            let expected = whole.strip_prefix(&prompt_text).filter(|_| !prompt_text.ends_with('\u{fffd}'));
            let Some(expected) = expected else { continue };
            let mut detokenizer = ours.detokenizer_after(prompt);
            let mut text: String = output.iter().map(|&id| detokenizer.push(id)).collect();
            text.push_str(&detokenizer.finish());
            prop_assert_eq!(text, expected, "{}", decoder);
        }
    }

    #[test]
    fn emitted_text_is_never_taken_back(ids in prop::collection::vec(0u32..26, 0..30)) {
        for (_, _, ours, _) in ALL.iter() {
            let whole = ours.decode(&ids).unwrap();
            let mut out = String::new();
            for part in stream(ours, &ids) {
                out.push_str(&part);
                prop_assert!(whole.starts_with(&out), "{:?} of {:?}", out, whole);
            }
        }
    }
}

/// Words with the space that SentencePiece writes before them, and without.
pub(crate) const WORDS: &[&str] = &[
    "<unk>",
    "▁The",
    "▁capital",
    "▁of",
    "▁France",
    "▁is",
    "▁Paris",
    ".",
    "The",
    "capital",
    "▁",
    "is",
    "▁in▁the▁box",
    "\n",
];

/// Steps of tokenizers that put a space before every text, in their three notations, and of one that does
/// not.
fn prefixing() -> Vec<Value> {
    let fuse = json!({"type": "Fuse"});
    let legacy = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    let replaced = sequence(&[replace("▁", " "), fuse.clone(), strip(1, 0)]);
    vec![
        json!({"normalizer": legacy, "decoder": replaced}),
        metaspace_first(),
        json!({"pre_tokenizer": metaspace("always"), "decoder": sequence(&[metaspace("always")])}),
        json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [metaspace("first")]}, "decoder": replaced}),
        json!({"pre_tokenizer": metaspace("never"), "decoder": metaspace("never")}),
    ]
}

/// A tokenizer whose words are single tokens.
fn words(steps: &Value) -> Tokenizer {
    load(&words_file(steps).to_string()).unwrap()
}

/// The steps that put a space before the first text only.
pub(crate) fn metaspace_first() -> Value {
    json!({"pre_tokenizer": metaspace("first"), "decoder": metaspace("first")})
}

/// The file of a tokenizer whose words are single tokens, and one more for the end.
pub(crate) fn words_file(steps: &Value) -> Value {
    let vocab: Vec<Value> = WORDS.iter().map(|word| json!([word, -1.0])).collect();
    let end = json!({"id": WORDS.len(), "content": "<|end|>", "single_word": false, "lstrip": false,
                     "rstrip": false, "normalized": false, "special": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [end], "post_processor": null,
        "normalizer": steps["normalizer"], "pre_tokenizer": steps["pre_tokenizer"], "decoder": steps["decoder"],
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab},
    })
}

#[test]
fn a_raw_prompt_and_its_output_are_one_text() {
    for steps in prefixing() {
        let tokenizer = words(&steps);
        let prompt = "The capital is";
        let ids = tokenizer.encode_prompt(prompt).unwrap();
        let output = ["▁Paris", "."].map(|word| tokenizer.token_id(word).unwrap());
        let mut detokenizer = tokenizer.detokenizer_after(&ids);
        let text: String = output.iter().map(|&id| detokenizer.push(id)).collect();
        assert_eq!(text + &detokenizer.finish(), " Paris.", "{steps}");
        assert_eq!(
            tokenizer.decode(&[&ids[..], &output].concat()).unwrap(),
            "The capital is Paris.",
            "{steps}"
        );
    }
}

#[test]
fn text_that_goes_on_gets_no_space_of_a_beginning() {
    for steps in prefixing() {
        let tokenizer = words(&steps);
        let mut ids = tokenizer.encode_prompt("The capital").unwrap();
        let mut text = "The capital".to_owned();
        for more in [" is", "capital", ".", "\n", " The", "<|end|>", "The"] {
            ids.extend(tokenizer.encode_more(more).unwrap());
            text.push_str(more);
            assert_eq!(tokenizer.decode(&ids).unwrap(), text, "{steps}");
        }
    }
}

#[test]
fn the_rest_of_a_rendered_text_is_tokenized_as_in_the_whole() {
    for steps in prefixing() {
        let tokenizer = words(&steps);
        let (old, rest) = ("The is<|end|>", "\nThe capital<|end|>The");
        let before = tokenizer.encode_rendered(old, None, None).unwrap();
        let after = tokenizer.encode_rendered(rest, None, before.last().copied()).unwrap();
        let whole = tokenizer.encode_rendered(&[old, rest].concat(), None, None).unwrap();
        assert_eq!([before, after].concat(), whole, "{steps}");
    }
}

#[test]
fn a_first_token_keeps_its_inner_spaces() {
    let tokenizer = words(&prefixing()[1]);
    let id = |word| tokenizer.token_id(word).unwrap();
    assert_eq!(tokenizer.decode(&[id("▁in▁the▁box"), id(".")]).unwrap(), "in the box.");
    assert_eq!(tokenizer.decode(&[id("."), id("▁in▁the▁box")]).unwrap(), ". in the box");
}

#[test]
fn tokens_of_byte_level_bpe_are_bytes_whatever_the_decoder() {
    let level =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let split = json!({"type": "Sequence", "pretokenizers": [level]});
    let foreign =
        sequence(&[replace("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"}), strip(1, 0)]);
    for decoder in [foreign.clone(), Value::Null, metaspace("always")] {
        let (_folder, ours, _) = made(BYTE_LEVEL, &json!({"pre_tokenizer": split, "decoder": decoder}));
        let ids = ["Ġb", "Ċ", "a", "Ã", "©"].map(|token| ours.token_id(token).unwrap());
        assert_eq!(ours.decode(&ids).unwrap(), " b\naé", "{decoder}");
        // Such a split puts a space before every text, too.
        assert_eq!(ours.decode(&ours.encode("a", false).unwrap()).unwrap(), " a");
        assert_eq!(ours.decode(&ours.encode_more("a").unwrap()).unwrap(), "a");
    }
    let alphabet: Vec<String> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().map(String::from).collect();
    let letters: Vec<&str> = alphabet.iter().map(String::as_str).chain(["Ġa"]).collect();
    let (_folder, by_vocabulary, _) = tokenizer(&letters, &foreign);
    assert_eq!(by_vocabulary.decode(&[by_vocabulary.token_id("Ġa").unwrap()]).unwrap(), " a");
    let with_words: Vec<&str> = letters.into_iter().chain(["▁a"]).collect();
    let (_folder, sentence_piece, _) = tokenizer(&with_words, &foreign);
    assert_eq!(sentence_piece.decode(&[sentence_piece.token_id("Ġa").unwrap()]).unwrap(), "Ġa");
}

#[test]
fn a_character_is_emitted_with_its_last_byte() {
    let byte_level = decoders().remove(0).1;
    let (_folder, tokenizer, _) = tokenizer(BYTE_LEVEL, &byte_level);
    let ids: Vec<u32> = ["a", "ð", "Ł", "ĺ", "Ģ", "a"].map(|token| tokenizer.token_id(token).unwrap()).into();
    assert_eq!(stream(&tokenizer, &ids), ["a", "", "", "", "😀", "a", ""]);
    assert_eq!(stream(&tokenizer, &ids[..3]), ["a", "", "", "\u{fffd}"]);
}

#[test]
fn bytes_that_never_become_a_character_are_not_held_back() {
    let byte_level = decoders().remove(0).1;
    let (_folder, tokenizer, _) = tokenizer(BYTE_LEVEL, &byte_level);
    let id = tokenizer.token_id("ÿ").unwrap();
    let mut detokenizer = tokenizer.detokenizer();
    for _ in 0..100_000 {
        assert_eq!(detokenizer.push(id), "\u{fffd}");
    }
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn trailing_strip_is_held_back_and_bounded() {
    let decoder = sequence(&[replace("▁", " "), json!({"type": "Fuse"}), strip(1, 2)]);
    let (_folder, tokenizer, _) = tokenizer(SENTENCE_PIECE, &decoder);
    let id = |token| tokenizer.token_id(token).unwrap();
    let ids = [id("▁▁"), id("▁a"), id("▁▁"), id("▁"), id("b"), id("▁▁"), id("▁")];
    assert_eq!(stream(&tokenizer, &ids).concat(), "  a   b ");
    assert_eq!(tokenizer.decode(&ids).unwrap(), "  a   b ");
    assert_eq!(tokenizer.decode(&[id("▁")]).unwrap(), "");
}

#[test]
fn unknown_ids_add_nothing() {
    for (_, decoder, tokenizer, _) in ALL.iter() {
        let known = [0, 1, 2];
        let mixed = [u32::MAX, 0, tokenizer.vocabulary_size(), 1, 1 << 24, 2];
        assert_eq!(tokenizer.decode(&mixed).unwrap(), tokenizer.decode(&known).unwrap(), "{decoder}");
        assert!(tokenizer.token_bytes(u32::MAX).is_empty());
    }
}

#[test]
fn token_bytes_are_what_the_token_adds() {
    let (_folder, bpe, _) = tokenizer(BYTE_LEVEL, &decoders()[0].1);
    let bytes =
        |tokenizer: &Tokenizer, token: &str| tokenizer.token_bytes(tokenizer.token_id(token).unwrap());
    assert_eq!(bytes(&bpe, "Ġb"), b" b");
    assert_eq!(bytes(&bpe, "ðŁĺ"), [0xf0, 0x9f, 0x98]);
    assert_eq!(bytes(&bpe, "<|a b|>"), b"<|a b|>");
    let (_folder, sentence_piece, _) = tokenizer(SENTENCE_PIECE, &decoders()[2].1);
    assert_eq!(bytes(&sentence_piece, "▁a"), b" a");
    assert_eq!(bytes(&sentence_piece, "<0xff>"), [0xff]);
    assert_eq!(bytes(&sentence_piece, "<0xZZ>"), b"<0xZZ>");
}

/// All 256 stand-ins of byte-level BPE, as the tokenizers crate has them.
#[test]
fn every_byte_has_a_replacement_character() {
    let alphabet: BTreeSet<String> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().map(String::from).collect();
    let tokens: Vec<&str> = alphabet.iter().map(String::as_str).collect();
    let (_folder, ours, _) = tokenizer(&tokens, &decoders()[0].1);
    let bytes: BTreeSet<u8> = (0..256).flat_map(|id| ours.token_bytes(id)).collect();
    assert_eq!(bytes.len(), 256);
    let (_folder, ours, reference) = tokenizer(&tokens, &decoders()[0].1);
    for id in 0..256 {
        assert_eq!(ours.decode(&[id]).unwrap(), reference.decode(&[id], false).unwrap());
    }
}

fn load(file: &str) -> Result<Tokenizer, TextError> {
    let tokenizer = Some(file.as_bytes().to_vec());
    Tokenizer::new(&TextFiles { tokenizer, ..TextFiles::default() })
}

#[test]
fn damaged_files_are_errors_that_name_them() {
    let (folder, ..) = tokenizer(SENTENCE_PIECE, &decoders()[2].1);
    let file = std::fs::read_to_string(folder.path().join("tokenizer.json")).unwrap();
    for end in (0..file.len()).filter(|&end| file.is_char_boundary(end)) {
        let error = load(&file[..end]).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
    let missing = Tokenizer::new(&read_text_files(Path::new("/nowhere")).unwrap()).unwrap_err();
    assert_eq!(missing.to_string(), "tokenizer.json: is missing");
    for (decoder, word) in [
        (json!({"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": true}), "CTC"),
        (sequence(&[json!({"type": "Fuse"}), metaspace("always")]), "Metaspace"),
    ] {
        let mut changed: Value = serde_json::from_str(&file).unwrap();
        changed["decoder"] = decoder;
        let error = load(&changed.to_string()).unwrap_err();
        assert!(
            matches!(error, TextError::Unsupported { .. }) && error.to_string().contains(word),
            "{error}"
        );
    }
    let mut changed: Value = serde_json::from_str(&file).unwrap();
    changed["model"]["vocab"]["huge"] = json!(4_000_000_000_u32);
    assert!(load(&changed.to_string()).is_err());
    changed["decoder"] = json!(5);
    assert!(load(&changed.to_string()).is_err());
}
