//! The tokens of a tokenizer as bytes, in the form that masks are computed from. Made once for each
//! tokenizer: that takes a tenth of a second for 128,000 tokens.

use std::fmt;

use llguidance::ParserFactory;
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie,
};

use super::Refusal;
use crate::text::Tokenizer;

/// Most bytes of a token that a grammar allows; the trie has room for 1,024. Longer ones are runs of spaces.
const TOKEN_BYTES_MAX: usize = 1000;

/// Most tokens: the trie numbers them in 22 bits.
const TOKENS_MAX: u32 = 1 << 21;

/// What the trie puts before the name of a token that stands for no text; no UTF-8 text has it.
pub(super) const MARK: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// A tokenizer's tokens.
pub struct Vocabulary {
    pub(super) factory: ParserFactory,
    /// Whether there is a token that ends an output.
    pub(super) has_end: bool,
    /// Number of tokens.
    pub(super) size: u32,
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary").field("size", &self.size).finish_non_exhaustive()
    }
}

impl Vocabulary {
    /// Makes the vocabulary of the first `size` tokens of a tokenizer, of which `ends` end an output. Control
    /// tokens stand for no text: a grammar allows one only where it names it.
    ///
    /// # Errors
    /// There are too many tokens.
    pub fn new(tokenizer: &Tokenizer, size: u32, ends: &[u32]) -> Result<Self, Refusal> {
        if size > TOKENS_MAX {
            return Err(Refusal::unsupported("", "vocabulary", &format!("at most {TOKENS_MAX} tokens")));
        }
        let ends: Vec<u32> = ends.iter().copied().filter(|id| *id < size).collect();
        let words: Vec<Vec<u8>> = (0..size).map(|id| word(tokenizer, id, &ends)).collect();
        let first = ends.first().copied().unwrap_or(INVALID_TOKEN);
        let trie = TokTrie::from(&TokRxInfo::new(size, first), &words);
        let trie = if ends.is_empty() { trie } else { trie.with_eos_tokens(&ends) };
        let env: TokEnv = std::sync::Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new(
            &env,
            InferenceCapabilities::default(),
            &llguidance::earley::SlicedBiasComputer::general_slices(),
        )
        .map_err(|error| Refusal::unsupported("", "vocabulary", &error.to_string()))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory, has_end: !ends.is_empty(), size })
    }
}

/// Returns what the trie knows a token by; nothing if no grammar allows it.
fn word(tokenizer: &Tokenizer, id: u32, ends: &[u32]) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    if bytes.len() > TOKEN_BYTES_MAX {
        return Vec::new();
    }
    if tokenizer.is_control(id) || ends.contains(&id) {
        // A name that no text has, even if the token has none.
        return [&[MARK], &bytes[..]].concat();
    }
    // A lone byte of this value is in no UTF-8 text, and would pass for the mark.
    if bytes.first() == Some(&MARK) { Vec::new() } else { bytes }
}
