//! Text to token ids, in the steps of the tokenizers crate: added tokens are found, what lies between them is
//! normalized, split and tokenized. The steps are taken here because that crate cannot be told two things:
//! that a text goes on where another one ended, so that it gets none of the space that some tokenizers put
//! before a text; and that characters which look like a control token are only text.

use serde_json::Value;
use tokenizers::{Model as _, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizer as _};
use tokenizers::{PreTokenizerWrapper, Tokenizer};

use super::TextError;

/// What stands before a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Before {
    /// Nothing: it is the beginning.
    Nothing,
    /// An added token, such as the end of a message.
    Token,
    /// Other text.
    Text,
}

/// The steps between the added tokens and the model.
#[derive(Debug, Default)]
struct Steps {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
}

/// An encoder and its variants for text that goes on.
#[derive(Debug)]
pub(super) struct Encoder {
    tokenizer: Tokenizer,
    /// Steps for a text's first section after an added token; none if they are the tokenizer's own.
    after_token: Option<Steps>,
    /// The same after other text.
    after_text: Option<Steps>,
    /// Ids that the tokenizer's post-processor puts before and after a text that stands alone.
    around: (Vec<u32>, Vec<u32>),
}

impl Encoder {
    /// Makes an encoder; the error says which step cannot be taken apart.
    pub(super) fn new(tokenizer: Tokenizer) -> Result<Self, String> {
        let after_token = variant(&tokenizer, false)?;
        let after_text = variant(&tokenizer, true)?;
        let around = around(&tokenizer);
        Ok(Self { tokenizer, after_token, after_text, around })
    }

    /// Returns the tokenizer as its file describes it.
    pub(super) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Returns the ids that go before and after a text that stands alone, as `tokenizer.json` says.
    pub(super) fn around(&self) -> (&[u32], &[u32]) {
        (&self.around.0, &self.around.1)
    }

    /// Returns the ids of a text. Added tokens that are written in it become those tokens, unless `mark`
    /// stands in them; the marks are dropped.
    ///
    /// # Errors
    /// The tokenizer has neither a token for a part of the text nor an unknown token.
    pub(super) fn encode(
        &self,
        text: &str,
        before: Before,
        mark: Option<char>,
    ) -> Result<Vec<u32>, TextError> {
        let own = (self.tokenizer.get_normalizer(), self.tokenizer.get_pre_tokenizer());
        let variant = match before {
            Before::Nothing => None,
            Before::Token => self.after_token.as_ref(),
            Before::Text => self.after_text.as_ref(),
        };
        let end = if variant.is_some() { self.first_section(text) } else { 0 };
        let (section, rest) = text.split_at(end);
        let mut ids = Vec::new();
        if let Some(Steps { normalizer, pre_tokenizer }) = variant.filter(|_| !section.is_empty()) {
            ids = self.run(section, (normalizer.as_ref(), pre_tokenizer.as_ref()), mark)?;
        }
        if !rest.is_empty() {
            ids.extend(self.run(rest, own, mark)?);
        }
        Ok(ids)
    }

    fn run(
        &self,
        text: &str,
        (normalizer, pre_tokenizer): (Option<&NormalizerWrapper>, Option<&PreTokenizerWrapper>),
        mark: Option<char>,
    ) -> Result<Vec<u32>, TextError> {
        let refuse = |error: tokenizers::Error| TextError::Encode(error.to_string());
        let mut parts = self.tokenizer.get_added_vocabulary().extract_and_normalize(normalizer, text);
        if let Some(mark) = mark {
            let unmarked = parts.split(|_, mut part| {
                part.filter(|c| c != mark);
                Ok(std::iter::once(part))
            });
            unmarked.map_err(refuse)?;
        }
        if let Some(pre_tokenizer) = pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut parts).map_err(refuse)?;
        }
        let model = self.tokenizer.get_model();
        parts.tokenize(|part| model.tokenize(part.get())).map_err(refuse)?;
        let encoding = parts.into_encoding(None, 0, OffsetType::None).map_err(refuse)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Returns the length of the text before the first added token, in bytes.
    fn first_section(&self, text: &str) -> usize {
        let added = self.tokenizer.get_added_vocabulary();
        let parts = added.extract_and_normalize::<NormalizerWrapper>(None, text);
        let parts = parts.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let mut tokens = parts.iter().filter(|(_, _, tokens)| tokens.is_some());
        tokens.next().map_or(text.len(), |(_, (start, _), _)| *start)
    }
}

/// Returns the steps without the space that they put before a text: after other text without any such space,
/// after an added token only without that of a text's beginning. `None` if they put none.
fn variant(tokenizer: &Tokenizer, after_text: bool) -> Result<Option<Steps>, String> {
    let failed = |error: serde_json::Error| error.to_string();
    let normalizer = serde_json::to_value(tokenizer.get_normalizer()).map_err(failed)?;
    let pre_tokenizer = serde_json::to_value(tokenizer.get_pre_tokenizer()).map_err(failed)?;
    let without = |step: &Value| without_space(step.clone(), after_text).unwrap_or(Value::Null);
    let (changed_normalizer, changed_pre_tokenizer) = (without(&normalizer), without(&pre_tokenizer));
    if changed_normalizer == normalizer && changed_pre_tokenizer == pre_tokenizer {
        return Ok(None);
    }
    Ok(Some(Steps {
        normalizer: serde_json::from_value(changed_normalizer).map_err(failed)?,
        pre_tokenizer: serde_json::from_value(changed_pre_tokenizer).map_err(failed)?,
    }))
}

/// Returns a step, as `tokenizer.json` writes it, without the space that it puts before a text; `None` if it
/// does nothing else.
fn without_space(mut step: Value, after_text: bool) -> Option<Value> {
    let kind = step["type"].as_str().unwrap_or_default().to_owned();
    match kind.as_str() {
        "Sequence" => {
            for list in ["normalizers", "pretokenizers"] {
                if let Some(Value::Array(steps)) = step.get_mut(list) {
                    let all = std::mem::take(steps).into_iter();
                    steps.extend(all.filter_map(|step| without_space(step, after_text)));
                }
            }
        }
        "Prepend" if after_text => return None,
        "Metaspace" if after_text || step["prepend_scheme"] == "first" => {
            step["prepend_scheme"] = "never".into();
        }
        "ByteLevel" if after_text && step.get("add_prefix_space").is_some() => {
            step["add_prefix_space"] = false.into();
        }
        _ => {}
    }
    Some(step)
}

/// Returns the ids that the post-processor puts before and after a text.
fn around(tokenizer: &Tokenizer) -> (Vec<u32>, Vec<u32>) {
    let ids = |text: &str, special| {
        tokenizer
            .encode_fast(text, special)
            .map_or_else(|_| Vec::new(), |encoding| encoding.get_ids().to_vec())
    };
    let (plain, whole) = (ids("a", false), ids("a", true));
    let at = whole.windows(plain.len().max(1)).position(|part| part == plain);
    match at {
        Some(at) => (whole[..at].to_vec(), whole[at + plain.len()..].to_vec()),
        // No token for "a": an empty text shows them together, and what is put around it comes first.
        None => (ids("", true), Vec::new()),
    }
}
