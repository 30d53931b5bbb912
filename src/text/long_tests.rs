//! Tokens of pieces against those of the whole text, for the splits that real tokenizers make.

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::parting::UNPARTED_BYTES_MAX;
use super::*;
use crate::text::TextFiles;

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A byte-level tokenizer with some merges, a beginning and an end, and one added token.
fn tokenizer(pre_tokenizer: &Value) -> Tokenizer {
    let letters = (33..=126).chain(161..=172).chain(174..=323).filter_map(char::from_u32);
    let mut vocab: Vec<String> = letters.map(String::from).collect();
    let merges =
        [["t", "h"], ["th", "e"], ["Ġ", "the"], ["Ġ", "a"], ["0", "0"], ["Ġ", "Ġ"], ["Ċ", "Ċ"], ["!", "!"]];
    vocab.extend(merges.iter().map(|pair| pair.concat()));
    let size = vocab.len();
    let vocab: serde_json::Map<String, Value> =
        vocab.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added = |at: usize, content: &str| {
        json!({ "id": size + at, "content": content, "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false })
    };
    let special = |name: &str, id: usize| json!({ "id": name, "ids": [size + id], "tokens": [name] });
    let file = json!({
        "version": "1.0",
        "added_tokens": [added(0, "<s>"), added(1, "</s>"), added(2, "<|im_start|>")],
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } },
                       { "SpecialToken": { "id": "</s>", "type_id": 0 } }],
            "pair": [],
            "special_tokens": { "<s>": special("<s>", 0), "</s>": special("</s>", 1) },
        },
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "vocab": vocab, "merges": merges },
    });
    let tokenizer = Some(file.to_string().into_bytes());
    Tokenizer::new(&TextFiles { tokenizer, ..TextFiles::default() }).unwrap()
}

fn byte_level(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

fn split(regex: &str) -> Value {
    let split =
        json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false });
    json!({ "type": "Sequence", "pretokenizers": [split, byte_level(false)] })
}

fn digits() -> Value {
    json!({ "type": "Sequence", "pretokenizers": [{ "type": "Digits", "individual_digits": true }, byte_level(true)] })
}

/// A tokenizer as SentencePiece's models are converted, with some merges, those of `more`, and a token for
/// each byte.
fn sentence_piece(normalizers: &[Value], pre_tokenizer: &Value, more: &[[&str; 2]]) -> Tokenizer {
    let merges = [
        ["t", "h"],
        ["th", "e"],
        ["▁", "the"],
        ["▁", "t"],
        ["▁t", "h"],
        ["a", "b"],
        ["ab", "a"],
        ["b", "a"],
        ["▁", "▁"],
        ["▁▁", "▁▁"],
        ["▁", "a"],
        ["!", "!"],
        ["\n", "\n"],
        ["e", "."],
    ];
    let merges: Vec<[&str; 2]> = merges.iter().chain(more).copied().collect();
    let mut vocab: Vec<String> = ["<unk>", "<s>", "</s>", "<tool>"].map(String::from).into();
    vocab.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    vocab.extend("▁theab!\n.xyz日".chars().map(String::from));
    vocab.extend(merges.iter().map(|pair| pair.concat()));
    let vocab: serde_json::Map<String, Value> =
        vocab.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added: Vec<Value> = ["<unk>", "<s>", "</s>", "<tool>"]
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({ "id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false })
        })
        .collect();
    let file = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": pre_tokenizer,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" },
            { "type": "Fuse" }, { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ] },
        "model": { "type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>", "fuse_unk": true,
                   "byte_fallback": true },
    });
    let tokenizer = Some(file.to_string().into_bytes());
    Tokenizer::new(&TextFiles { tokenizer, ..TextFiles::default() }).unwrap()
}

fn replace() -> Value {
    json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" })
}

fn metaspace(scheme: &str) -> Value {
    json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true })
}

/// As Llama 2, Gemma and newer conversions have them.
fn sentence_pieces(more: &[[&str; 2]]) -> [Tokenizer; 4] {
    let prepend = json!({ "type": "Prepend", "prepend": "▁" });
    let split = json!({ "type": "Split", "pattern": { "String": " " }, "behavior": "MergedWithPrevious",
                        "invert": false });
    [
        sentence_piece(&[prepend, replace()], &Value::Null, more),
        sentence_piece(&[replace()], &split, more),
        sentence_piece(&[], &metaspace("first"), more),
        sentence_piece(&[], &metaspace("always"), more),
    ]
}

fn in_pieces(mut encoding: Encoding) -> (Vec<u32>, usize) {
    let (mut pieces, mut is_done) = (0, false);
    while !is_done {
        let before = encoding.token_count();
        is_done = encoding.advance().unwrap();
        pieces += usize::from(encoding.token_count() > before);
    }
    (encoding.into_ids(), pieces)
}

/// About `bytes` bytes out of `parts`, in an order that never repeats.
fn mixed(parts: &[&str], bytes: usize) -> String {
    let (mut text, mut state) = (String::new(), 7_u32);
    while text.len() < bytes {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        text.push_str(parts[(state >> 16) as usize % parts.len()]);
    }
    text
}

#[test]
fn a_long_text_in_pieces_gives_the_tokens_of_the_whole() {
    let parts = [
        "the",
        " the",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "a",
        "'s",
        "'re ",
        "0",
        "000",
        "12345 ",
        "!!",
        "…",
        "日本",
        "é",
        "e\u{301}",
        "😀",
        "<|im_start|>",
        "<|im_",
        "end</s>",
        "   x",
        "-----",
        "word ",
    ];
    for pre_tokenizer in [split(GPT2), split(LLAMA3), byte_level(true), digits()] {
        let tokenizer = tokenizer(&pre_tokenizer);
        for count in [1, 7, parts.len()] {
            let text = mixed(&parts[..count], 3 * PIECE_BYTES + 11);
            // A single word cannot be parted.
            let (ids, pieces) = in_pieces(Encoding::of_more(&tokenizer, text.clone()));
            assert!(ids == tokenizer.encode(&text, false).unwrap(), "{count} {pre_tokenizer}");
            assert_eq!(pieces > 1, count > 1, "{count} {pre_tokenizer}");
            let (ids, _) = in_pieces(Encoding::of_prompt(&tokenizer, text.clone()));
            assert!(ids == tokenizer.encode_prompt(&text).unwrap(), "{count} {pre_tokenizer}");
        }
    }
}

#[test]
fn a_run_that_cannot_be_parted_is_refused_when_it_is_too_long() {
    let tokenizer = tokenizer(&split(GPT2));
    let mut encoding = Encoding::of_more(&tokenizer, "a".repeat(UNPARTED_BYTES_MAX * 2));
    let refused = loop {
        match encoding.advance() {
            Ok(is_done) => assert!(!is_done && encoding.token_count() == 0),
            Err(refused) => break refused,
        }
    };
    assert!(matches!(refused, TextError::Encode(why) if why.contains("to part them")));
}

#[test]
fn a_run_that_cannot_be_parted_says_how_long_it_is_before_it_is_tokenized() {
    let tokenizer = tokenizer(&split(GPT2));
    let bytes = 9 * PIECE_BYTES;
    let mut encoding = Encoding::of_more(&tokenizer, "a".repeat(bytes));
    loop {
        let said = encoding.next_bytes();
        let is_done = encoding.advance().unwrap();
        // A text of one piece and a bit is not parted.
        assert_eq!(is_done, encoding.token_count() > 0);
        if is_done {
            assert!(said * 3 / 2 >= bytes, "{said} of {bytes}");
            break;
        }
    }
}

#[test]
fn a_tokenizer_that_looks_back_gets_the_whole_text() {
    for stage in [
        json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true }),
        split(r"(?<=a)b"),
    ] {
        let tokenizer = tokenizer(&stage);
        assert_eq!(tokenizer.token_bytes_max(), None);
        let text = mixed(&["the ", "a", "b "], 3 * PIECE_BYTES);
        assert_eq!(in_pieces(Encoding::of_more(&tokenizer, text)).1, 1);
    }
}

#[test]
fn the_longest_token_bounds_the_bytes_of_a_token() {
    assert_eq!(tokenizer(&split(GPT2)).token_bytes_max(), Some("<|im_start|>".len()));
}

#[test]
fn a_long_text_with_marks_is_not_parted_at_one() {
    let tokenizer = tokenizer(&split(LLAMA3));
    let mark = Some('\u{e000}');
    let text = mixed(&["[\u{e000}INST]", "<\u{e000}|im_start|>", "the"], 3 * PIECE_BYTES);
    let rendered = Rendered { text: text.clone(), mark };
    let (ids, pieces) = in_pieces(Encoding::of_rendered(&tokenizer, rendered, None));
    assert!(pieces > 1 && ids == tokenizer.encode_rendered(&text, mark, None).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]

    #[test]
    fn words_in_pieces_give_the_tokens_of_the_whole(
        words in vec(prop::sample::select(vec![
            "the", " the", " ", "  ", "    ", "\n", "\n\n", "a", "ab", "aba ", "▁", "▁the", "a▁", "!!", "e.", "é",
            "日本", "😀", "<tool>", "<to", " </s> ", "\t", "<tool>the ", "xyz ",
        ]), 3..12),
        last in prop::sample::select(vec![None, Some(2), Some(300)]),
    ) {
        let text = mixed(&words, 3 * PIECE_BYTES) + " the";
        for tokenizer in sentence_pieces(&[]) {
            let (ids, _) = in_pieces(Encoding::of_more(&tokenizer, text.clone()));
            prop_assert!(ids == tokenizer.encode_more(&text).unwrap());
            let (ids, _) = in_pieces(Encoding::of_prompt(&tokenizer, text.clone()));
            prop_assert!(ids == tokenizer.encode_prompt(&text).unwrap());
            let mark = Some('\u{e000}');
            let marked = text.replace("<to", "<\u{e000}to");
            let rendered = Rendered { text: marked.clone(), mark };
            let (ids, _) = in_pieces(Encoding::of_rendered(&tokenizer, rendered, last));
            prop_assert!(ids == tokenizer.encode_rendered(&marked, mark, last).unwrap());
        }
    }
}

#[test]
fn words_of_sentence_piece_are_taken_in_pieces() {
    let text = mixed(&["the ", "aba", "the.\n", "<tool> "], 4 * PIECE_BYTES);
    for tokenizer in sentence_pieces(&[]) {
        let (ids, pieces) = in_pieces(Encoding::of_more(&tokenizer, text.clone()));
        assert!(pieces >= 4 && ids == tokenizer.encode_more(&text).unwrap(), "{pieces}");
        assert_eq!(tokenizer.token_bytes_max(), Some(3 * "<tool>".len()));
    }
}

#[test]
fn words_are_not_parted_where_a_token_joins_them() {
    let text = mixed(&["the ", "aba ", "the.\n"], 3 * PIECE_BYTES);
    for tokenizer in sentence_pieces(&[["a", "▁"]]) {
        assert_eq!(in_pieces(Encoding::of_more(&tokenizer, text.clone())).1, 1);
    }
}
