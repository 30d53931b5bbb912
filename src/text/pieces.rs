//! The bytes that each token adds to a decoded text, computed once when the tokenizer loads.
//!
//! A `tokenizer.json` decoder is a chain of stages. The supported ones depend either on one token at a time
//! (and on whether it is the first), or on the ends of the whole text; so a decode is a concatenation of
//! table entries, read as UTF-8. `Detokenizer` does that one token at a time. Chains with other stages are
//! refused at load. Where the tokens are those of byte-level BPE and the decoder is not, the tokens are
//! right: some files were converted with the decoder of another tokenizer.

use serde_json::Value;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::{Decoder as _, Tokenizer};

/// Limit of token ids in the table: no vocabulary comes near it, and a hostile id must not cost memory.
const ID_MAX: u32 = 1 << 24;

/// Drops up to `start` and `stop` characters at the ends of a text, if they are `content`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Strip {
    pub(super) content: char,
    pub(super) start: usize,
    pub(super) stop: usize,
}

#[derive(Debug)]
enum Stage {
    /// A stage of the tokenizers crate that maps tokens one to one.
    Tokens(Box<DecoderWrapper>),
    /// Tokens `<0xNN>` are the byte NN.
    ByteFallback,
    /// The printable characters of byte-level BPE stand for bytes.
    ByteLevel,
    /// A character stands for a space; the one that was put before the text is dropped, if there was one.
    Metaspace {
        replacement: char,
        prefixed: bool,
    },
    Strip(Strip),
}

/// The stages of a decoder.
#[derive(Debug, Default)]
pub(super) struct Stages {
    stages: Vec<Stage>,
    /// The strip of the whole text.
    strip: Option<Strip>,
    /// Whether spaces separate tokens, as in the tokenizers crate without a decoder.
    spaced: bool,
}

impl Stages {
    /// Splits a tokenizer's decoder into its stages; the error names a stage that is not supported.
    pub(super) fn new(tokenizer: &Tokenizer) -> Result<Self, String> {
        let mut flat = Vec::new();
        if let Some(decoder) = tokenizer.get_decoder() {
            flatten(serde_json::to_value(decoder).map_err(|error| error.to_string())?, &mut flat);
        }
        if !flat.iter().any(|stage| stage["type"] == "ByteLevel") && is_byte_level(tokenizer) {
            return Ok(Self { stages: vec![Stage::ByteLevel], ..Self::default() });
        }
        if tokenizer.get_decoder().is_none() {
            return Ok(Self { spaced: true, ..Self::default() });
        }
        let mut this = Self::default();
        let mut fused = false;
        for stage in flat {
            let kind = stage["type"].as_str().unwrap_or_default().to_owned();
            match kind.as_str() {
                "Fuse" => fused = true,
                "ByteLevel" if !fused => {
                    this.stages.push(Stage::ByteLevel);
                    fused = true;
                }
                "ByteFallback" if !fused => this.stages.push(Stage::ByteFallback),
                "Strip" if !fused => this.stages.push(Stage::Strip(strip_of(&stage)?)),
                "Strip" if this.strip.is_none() => this.strip = Some(strip_of(&stage)?),
                "Replace" if !fused || replaces_one_character(&stage) => {
                    this.stages.push(tokens_stage(stage)?);
                }
                "Metaspace" if !fused => this.stages.push(metaspace(&stage)?),
                "WordPiece" if !fused => this.stages.push(tokens_stage(stage)?),
                _ => return Err(format!("the decoder {kind} (in this place)")),
            }
        }
        Ok(this)
    }

    /// Returns the strip of the whole text.
    pub(super) fn strip(&self) -> Option<Strip> {
        self.strip
    }

    /// Returns the bytes of a token at the start of a text.
    pub(super) fn first(&self, token: String) -> Vec<u8> {
        self.pieces(vec![token]).pop().unwrap_or_default()
    }

    /// Returns the bytes of every token after the start of a text.
    fn later(&self, tokens: impl Iterator<Item = String>) -> impl Iterator<Item = Vec<u8>> {
        // Some stages treat the first token of a text differently, so another token comes first here.
        let all = std::iter::once("x".to_owned()).chain(tokens).collect();
        self.pieces(all)
            .into_iter()
            .skip(1)
            .map(|piece| if self.spaced { [b" ".as_slice(), &piece].concat() } else { piece })
    }

    fn pieces(&self, mut tokens: Vec<String>) -> Vec<Vec<u8>> {
        let mut bytes: Vec<Option<u8>> = vec![None; tokens.len()];
        let mut byte_level = false;
        for stage in &self.stages {
            match stage {
                // One to one by construction; a stage that fails leaves the tokens as they are.
                Stage::Tokens(stage) => match stage.decode_chain(tokens.clone()) {
                    Ok(decoded) if decoded.len() == tokens.len() => tokens = decoded,
                    Ok(_) | Err(_) => {}
                },
                Stage::ByteFallback => {
                    for (byte, token) in bytes.iter_mut().zip(&tokens) {
                        *byte = byte.or_else(|| fallback_byte(token));
                    }
                }
                Stage::ByteLevel => byte_level = true,
                Stage::Metaspace { replacement, prefixed } => {
                    for (index, token) in tokens.iter_mut().enumerate() {
                        let first = index == 0 && *prefixed;
                        let rest = first.then(|| token.strip_prefix(*replacement)).flatten();
                        *token = rest.unwrap_or(token).replace(*replacement, " ");
                    }
                }
                Stage::Strip(strip) => {
                    for token in &mut tokens {
                        *token = strip.apply(token).to_owned();
                    }
                }
            }
        }
        let piece = |(token, byte): (String, Option<u8>)| match byte {
            Some(byte) => vec![byte],
            None if byte_level => byte_level_bytes(&token),
            None => token.into_bytes(),
        };
        tokens.into_iter().zip(bytes).map(piece).collect()
    }
}

impl Strip {
    fn apply(self, text: &str) -> &str {
        let start = text.chars().take(self.start).take_while(|&c| c == self.content).count();
        let text = &text[start * self.content.len_utf8()..];
        let stop = text.chars().rev().take(self.stop).take_while(|&c| c == self.content).count();
        &text[..text.len() - stop * self.content.len_utf8()]
    }
}

/// The bytes of every token after the start of a text, by id.
#[derive(Debug)]
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// By id: the end of its bytes in `bytes`.
    ends: Vec<usize>,
}

impl Pieces {
    /// Tabulates the ids below `size`; `token` returns the token of an id, `None` for an unused one.
    pub(super) fn new(
        stages: &Stages,
        size: u32,
        token: impl Fn(u32) -> Option<String>,
    ) -> Result<Self, String> {
        if size > ID_MAX {
            return Err(format!("a token id of {}", size - 1));
        }
        let (ids, tokens): (Vec<u32>, Vec<String>) =
            (0..size).filter_map(|id| Some((id, token(id)?))).unzip();
        let mut this = Self { bytes: Vec::new(), ends: Vec::new() };
        for (id, piece) in ids.into_iter().zip(stages.later(tokens.into_iter())) {
            this.ends.resize(id as usize, this.bytes.len());
            this.bytes.extend_from_slice(&piece);
            this.ends.push(this.bytes.len());
        }
        Ok(this)
    }

    /// Returns the bytes of an id; none for an unknown one.
    pub(super) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..end]
    }

    /// Returns the most bytes that a token adds.
    pub(super) fn longest(&self) -> usize {
        let starts = std::iter::once(&0).chain(&self.ends);
        self.ends.iter().zip(starts).map(|(end, start)| end - start).max().unwrap_or(0)
    }
}

fn flatten(stage: Value, into: &mut Vec<Value>) {
    match stage {
        Value::Object(mut map) if map.get("type").is_some_and(|kind| kind == "Sequence") => {
            if let Some(Value::Array(stages)) = map.remove("decoders") {
                stages.into_iter().for_each(|stage| flatten(stage, into));
            }
        }
        other => into.push(other),
    }
}

fn tokens_stage(stage: Value) -> Result<Stage, String> {
    serde_json::from_value(stage)
        .map(|stage| Stage::Tokens(Box::new(stage)))
        .map_err(|error| error.to_string())
}

fn metaspace(stage: &Value) -> Result<Stage, String> {
    let replacement = stage["replacement"].as_str().and_then(|text| text.chars().next());
    let replacement = replacement.ok_or("the decoder Metaspace with such arguments")?;
    Ok(Stage::Metaspace { replacement, prefixed: stage["prepend_scheme"] != "never" })
}

fn strip_of(stage: &Value) -> Result<Strip, String> {
    let count = |name: &str| stage[name].as_u64().and_then(|count| usize::try_from(count).ok());
    let content = stage["content"].as_str().and_then(|content| content.chars().next());
    match (content, count("start"), count("stop")) {
        (Some(content), Some(start), Some(stop)) => Ok(Strip { content, start, stop }),
        _ => Err("the decoder Strip with such arguments".to_owned()),
    }
}

/// Returns whether a stage replaces one character, which does the same before and after tokens are joined.
fn replaces_one_character(stage: &Value) -> bool {
    stage["pattern"]["String"].as_str().is_some_and(|pattern| pattern.chars().count() == 1)
}

/// Returns whether the tokens are those of byte-level BPE: text is split into its letters, or the vocabulary
/// has all of them and no token of SentencePiece.
fn is_byte_level(tokenizer: &Tokenizer) -> bool {
    let steps = (tokenizer.get_normalizer(), tokenizer.get_pre_tokenizer());
    let steps = serde_json::to_value(steps).unwrap_or_default();
    names_byte_level(&steps) || {
        let letters = || (0..=u8::MAX).map(byte_letter);
        letters().all(|letter| tokenizer.token_to_id(&letter.to_string()).is_some())
            && !tokenizer.get_vocab(false).keys().any(|token| token.starts_with('▁'))
    }
}

fn names_byte_level(steps: &Value) -> bool {
    match steps {
        Value::Object(step) => {
            step.get("type").is_some_and(|kind| kind == "ByteLevel") || step.values().any(names_byte_level)
        }
        Value::Array(steps) => steps.iter().any(names_byte_level),
        _ => false,
    }
}

fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// Returns the bytes that a token's characters stand for; a token with other characters, such as an added
/// token with a space, is its own bytes.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    token.chars().map(byte_level_byte).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Returns the character that stands for a byte in byte-level BPE.
fn byte_letter(byte: u8) -> char {
    let code = match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
        0..=0x20 => u32::from(byte) + 0x100,
        0x7f..=0xa0 => u32::from(byte) - 0x7f + 0x121,
        0xad => 0x143,
    };
    char::from_u32(code).unwrap_or_default()
}

/// Returns the byte that a character stands for in byte-level BPE (GPT-2's `bytes_to_unicode`): printable
/// Latin-1 for itself, and U+0100 and up for the 68 other bytes in their order.
fn byte_level_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}
