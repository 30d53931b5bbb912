//! From a request's sampling values to those of one token: its uniform number, and the changes that
//! biases and penalties make to single logits. Formulas are mlx-lm's (sample_utils.py).
//!
//! What penalties count is kept from token to token; a step copies the changes, one for each different token.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::dry::Dry;
use super::reading::Reader;
use crate::backend::{Allow, LogitEdit, Sample, Xtc};
use crate::cache::Transcript;
use crate::engine::api::{Barred, Penalty, Sampling};
use crate::text::Tokenizer;

/// Returns how the token after a transcript is drawn, given the changes to its logits.
pub(super) fn sample_after(
    transcript: &Transcript,
    sampling: &Sampling,
    edits: Vec<LogitEdit>,
    top_logprobs: Option<u32>,
) -> Sample {
    let position = transcript.len() as u64;
    Sample {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        typical_p: sampling.typical_p,
        uniform: uniform(sampling.seed, position),
        edits,
        xtc: xtc(sampling, position),
        top_logprobs,
        allow: Allow::All,
    }
}

/// A bias that no logit comes near, finite in 16 bits too.
const FORCING_BIAS: f32 = 30_000.0;

/// Returns how a token is drawn that has to be this one. Its log-probability is the model's.
pub(super) fn forced(token: u32, top_logprobs: Option<u32>) -> Sample {
    let edit = LogitEdit { token, bias: FORCING_BIAS, repetition: 1.0, subtract: 0.0 };
    Sample { edits: vec![edit], top_logprobs, ..Sample::default() }
}

/// Returns a draw that brings none of some tokens, in reasoning that `reader` reads.
pub(super) fn without(mut sample: Sample, barred: &Barred, reader: &Reader) -> Sample {
    let closing = barred.closing.get(reader.closing_came()).into_iter().flatten();
    let tokens: BTreeSet<u32> = barred.ends.iter().chain(closing).copied().collect();
    sample.edits.retain(|edit| !tokens.contains(&edit.token));
    let edit = |token| LogitEdit { token, bias: -FORCING_BIAS, repetition: 1.0, subtract: 0.0 };
    sample.edits.extend(tokens.into_iter().map(edit));
    sample
}

/// Separates the number that decides about XTC from the one that draws the token.
const XTC_STREAM: u64 = 0x0058_5443;

/// Returns XTC if it removes the most likely candidates this time, by a uniform number of its own.
fn xtc(sampling: &Sampling, position: u64) -> Option<Xtc> {
    let xtc = sampling.xtc.as_ref()?;
    let removes = uniform(sampling.seed ^ XTC_STREAM, position) < xtc.probability;
    removes.then(|| Xtc { threshold: xtc.threshold, spared: xtc.spared.clone() })
}

/// Returns a number in [0, 1) from seed and position alone, by two rounds of splitmix64
/// (<https://prng.di.unimi.it/splitmix64.c>). It has 23 bits, so that its product with a float is always
/// below that float.
#[allow(clippy::cast_precision_loss, reason = "23 bits are exact in f32")]
pub(in crate::engine) fn uniform(seed: u64, position: u64) -> f32 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let bits = mix(mix(seed) ^ position) >> 41;
    bits as f32 / (1u32 << 23) as f32
}

/// The changes to single logits after the tokens of a transcript that were counted.
#[derive(Clone, Debug)]
pub(super) struct Edits {
    repetition: Penalty,
    presence: Penalty,
    frequency: Penalty,
    bias: BTreeMap<u32, f32>,
    /// What the penalties that are on count, one window for each context size.
    windows: Vec<Window>,
    /// Number of tokens of the transcript that were counted.
    counted: usize,
    by_token: BTreeMap<u32, LogitEdit>,
    dry: Option<Dry>,
}

/// The last tokens of a transcript, counted.
#[derive(Clone, Debug)]
struct Window {
    /// Number of tokens; 0 is all.
    size: usize,
    counts: HashMap<u32, u32>,
}

impl Edits {
    /// Returns those of a request before its first token.
    pub(super) fn new(sampling: &Sampling, tokenizer: &Tokenizer) -> Self {
        let &Sampling { repetition, presence, frequency, .. } = sampling;
        let on = [(repetition, 1.0), (presence, 0.0), (frequency, 0.0)].into_iter();
        let on = on.filter(|(penalty, off)| penalty.value != *off);
        let mut sizes: Vec<usize> = on.map(|(penalty, _)| penalty.context_size as usize).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let windows = sizes.into_iter().map(|size| Window { size, counts: HashMap::new() }).collect();
        let mut bias = BTreeMap::new();
        for &(token, value) in &sampling.logit_bias {
            *bias.entry(token).or_insert(0.0) += value;
        }
        let (counted, by_token) = (0, BTreeMap::new());
        let dry = sampling.dry.clone().map(|dry| Dry::new(dry, tokenizer.clone()));
        let mut edits = Self { repetition, presence, frequency, bias, windows, counted, by_token, dry };
        let biased: Vec<u32> = edits.bias.keys().copied().collect();
        biased.into_iter().for_each(|token| edits.renew(token));
        edits
    }

    /// Counts the tokens of a transcript up to its first `tokens`. What was counted stays so.
    pub(super) fn count(&mut self, transcript: &Transcript, tokens: usize) {
        if self.windows.is_empty() {
            return;
        }
        for place in self.counted..tokens {
            let token_at = |place: usize| {
                #[cfg(test)]
                tests::READ.with(|read| read.set(read.get() + 1));
                transcript.tokens(place..place + 1).next()
            };
            for index in 0..self.windows.len() {
                let window = &mut self.windows[index];
                let gone = (window.size > 0 && place >= window.size).then(|| place - window.size);
                let (new, gone) = (token_at(place), gone.and_then(token_at));
                new.into_iter().for_each(|token| window.add(token));
                gone.into_iter().for_each(|token| window.remove(token));
                new.into_iter().chain(gone).for_each(|token| self.renew(token));
            }
        }
        self.counted = self.counted.max(tokens);
    }

    /// Returns the changes after a transcript, all of whose tokens were counted.
    pub(super) fn after(&mut self, transcript: &Transcript) -> Vec<LogitEdit> {
        let penalties = self.dry.as_mut().map(|dry| dry.penalties(transcript)).unwrap_or_default();
        let mut edits: Vec<LogitEdit> = self.by_token.values().copied().collect();
        let known = edits.len();
        for (token, subtract) in penalties {
            match edits[..known].binary_search_by_key(&token, |edit| edit.token) {
                Ok(place) => edits[place].subtract += subtract,
                Err(_) => edits.push(LogitEdit { token, bias: 0.0, repetition: 1.0, subtract }),
            }
        }
        edits.sort_by_key(|edit| edit.token);
        edits
    }

    /// Returns how often a penalty counts a token; 0 if the penalty is off.
    fn occurrences(&self, penalty: Penalty, token: u32) -> u32 {
        let window = self.windows.iter().find(|window| window.size == penalty.context_size as usize);
        window.and_then(|window| window.counts.get(&token)).copied().unwrap_or(0)
    }

    #[allow(clippy::cast_precision_loss, reason = "counts of tokens are far below 2^24")]
    fn renew(&mut self, token: u32) {
        let occurs = |penalty| self.occurrences(penalty, token) > 0;
        let repetition = if occurs(self.repetition) { self.repetition.value } else { 1.0 };
        let once = if occurs(self.presence) { self.presence.value } else { 0.0 };
        let each = self.frequency.value * self.occurrences(self.frequency, token) as f32;
        let bias = self.bias.get(&token).copied();
        let edit = LogitEdit { token, bias: bias.unwrap_or(0.0), repetition, subtract: once + each };
        if bias.is_none() && (edit.repetition, edit.subtract) == (1.0, 0.0) {
            self.by_token.remove(&token);
        } else {
            self.by_token.insert(token, edit);
        }
    }
}

impl Window {
    fn add(&mut self, token: u32) {
        *self.counts.entry(token).or_insert(0) += 1;
    }

    fn remove(&mut self, token: u32) {
        if let Some(count) = self.counts.get_mut(&token) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&token);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::engine::api::DrySampling;

    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(crate::engine::tests::tokenizer);

    thread_local! {
        /// Number of tokens that were read from transcripts on this thread.
        pub(super) static READ: Cell<usize> = const { Cell::new(0) };
    }

    fn after(tokens: &[u32]) -> Transcript {
        Transcript::new(tokens.to_vec().into())
    }

    fn edits(transcript: &Transcript, sampling: &Sampling) -> Vec<LogitEdit> {
        let mut edits = Edits::new(sampling, &TOKENIZER);
        edits.count(transcript, transcript.len());
        edits.after(transcript)
    }

    fn plain() -> Sampling {
        let off = |value| Penalty { value, context_size: 20 };
        Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            typical_p: 1.0,
            seed: 7,
            repetition: off(1.0),
            presence: off(0.0),
            frequency: off(0.0),
            logit_bias: vec![],
            xtc: None,
            dry: None,
        }
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_and_depend_on_seed_and_position() {
        let drawn: Vec<f32> = (0..10_000).map(|position| uniform(7, position)).collect();
        assert!(drawn.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = drawn.iter().sum::<f32>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        assert_eq!(uniform(7, 3), drawn[3]);
        assert_ne!(uniform(8, 3), drawn[3]);
    }

    #[test]
    fn without_penalties_no_logit_is_edited() {
        assert!(edits(&after(&[1, 2, 3]), &plain()).is_empty());
    }

    #[test]
    fn penalties_count_what_lies_in_their_context() {
        let mut sampling = plain();
        sampling.repetition = Penalty { value: 1.5, context_size: 2 };
        sampling.presence = Penalty { value: 0.5, context_size: 3 };
        sampling.frequency = Penalty { value: 0.25, context_size: 0 };
        sampling.logit_bias = vec![(9, -2.0)];
        let expected = [
            LogitEdit { token: 4, bias: 0.0, repetition: 1.5, subtract: 0.5 + 2.0 * 0.25 },
            LogitEdit { token: 5, bias: 0.0, repetition: 1.5, subtract: 0.5 + 2.0 * 0.25 },
            LogitEdit { token: 9, bias: -2.0, repetition: 1.0, subtract: 0.0 },
        ];
        assert_eq!(edits(&after(&[4, 5, 5, 4]), &sampling), expected);
    }

    #[test]
    fn dry_adds_to_what_other_penalties_subtract() {
        let mut sampling = plain();
        sampling.presence = Penalty { value: 0.5, context_size: 0 };
        let breakers = [].into();
        let (multiplier, base, allowed_length, context_size) = (0.8, 2.0, 2, 0);
        sampling.dry = Some(DrySampling { multiplier, base, allowed_length, context_size, breakers });
        let subtracted: Vec<(u32, f32)> = edits(&after(&[4, 5, 6, 4, 5]), &sampling)
            .into_iter()
            .map(|edit| (edit.token, edit.subtract))
            .collect();
        assert_eq!(subtracted, [(4, 0.5), (5, 0.5), (6, 1.3)]);
        assert_eq!(edits(&after(&[7, 8]), &Sampling { presence: plain().presence, ..sampling }), []);
    }

    #[test]
    fn a_token_costs_the_same_however_long_the_context_of_a_penalty() {
        for (context_size, reads) in [(0, 1000), (1000, 1000), (10, 1990)] {
            let mut sampling = plain();
            for (penalty, value) in [
                (&mut sampling.repetition, 1.5),
                (&mut sampling.presence, 0.5),
                (&mut sampling.frequency, 0.25),
            ] {
                *penalty = Penalty { value, context_size };
            }
            let transcript = after(&[7; 1000]);
            let mut edits = Edits::new(&sampling, &TOKENIZER);
            READ.set(0);
            for tokens in 1..=1000 {
                edits.count(&transcript, tokens);
            }
            assert_eq!(READ.get(), reads, "{context_size}");
        }
    }

    proptest! {
        #[test]
        fn what_is_counted_token_by_token_is_what_a_count_of_all_gives(
            tokens in prop::collection::vec(0..6u32, 1..60),
            steps in prop::collection::vec(1..9usize, 60),
            sizes in [0..9u32, 0..9, 0..9],
        ) {
            let mut sampling = plain();
            sampling.repetition = Penalty { value: 1.5, context_size: sizes[0] };
            sampling.presence = Penalty { value: 0.5, context_size: sizes[1] };
            sampling.frequency = Penalty { value: -0.25, context_size: sizes[2] };
            sampling.logit_bias = vec![(2, -2.0)];
            let transcript = after(&tokens);
            let mut kept = Edits::new(&sampling, &TOKENIZER);
            let mut end = 0;
            for step in steps {
                end = (end + step).min(tokens.len());
                kept.count(&transcript, end);
                // A context that is computed again counts nothing twice.
                kept.count(&transcript, end / 2);
                let expected = edits(&after(&tokens[..end]), &sampling);
                prop_assert_eq!(kept.by_token.values().copied().collect::<Vec<_>>(), expected);
            }
            let recent = |size: u32| {
                let size = if size == 0 { tokens.len() } else { size as usize };
                &tokens[tokens.len().saturating_sub(size)..]
            };
            for edit in edits(&transcript, &sampling) {
                prop_assert_eq!(edit.repetition == 1.5, recent(sizes[0]).contains(&edit.token));
                let once = if recent(sizes[1]).contains(&edit.token) { 0.5 } else { 0.0 };
                let each = recent(sizes[2]).iter().filter(|token| **token == edit.token);
                let each: f32 = each.map(|_| -0.25).sum();
                prop_assert_eq!(edit.subtract, once + each);
            }
        }
    }
}
