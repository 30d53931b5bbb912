//! From a request's sampling values to those of one token: its uniform number, and the changes that
//! biases and penalties make to single logits. Formulas are mlx-lm's (sample_utils.py).

use std::collections::BTreeMap;

use crate::backend::{LogitEdit, Sample, Xtc};
use crate::cache::Transcript;
use crate::engine::api::{Penalty, Sampling};

/// Returns how the token after a transcript is drawn.
pub(super) fn sample_after(
    transcript: &Transcript,
    sampling: &Sampling,
    top_logprobs: Option<u32>,
) -> Sample {
    let position = transcript.len() as u64;
    Sample {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        uniform: uniform(sampling.seed, position),
        edits: edits(sampling, transcript),
        xtc: xtc(sampling, position),
        top_logprobs,
    }
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
fn uniform(seed: u64, position: u64) -> f32 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let bits = mix(mix(seed) ^ position) >> 41;
    bits as f32 / (1u32 << 23) as f32
}

/// Returns the tokens that a penalty applies to.
fn recent(penalty: Penalty, transcript: &Transcript) -> impl Iterator<Item = u32> {
    let size = penalty.context_size as usize;
    transcript.last(if size == 0 { transcript.len() } else { size })
}

#[allow(clippy::cast_precision_loss, reason = "counts of tokens are far below 2^24")]
fn edits(sampling: &Sampling, transcript: &Transcript) -> Vec<LogitEdit> {
    let mut edits: BTreeMap<u32, LogitEdit> = BTreeMap::new();
    let mut edit = |token: u32, change: &dyn Fn(&mut LogitEdit)| {
        change(edits.entry(token).or_insert(LogitEdit { token, bias: 0.0, repetition: 1.0, subtract: 0.0 }));
    };
    for &(token, bias) in &sampling.logit_bias {
        edit(token, &|edit| edit.bias += bias);
    }
    let Sampling { repetition, presence, frequency, .. } = *sampling;
    if repetition.value != 1.0 {
        for token in recent(repetition, transcript) {
            edit(token, &|edit| edit.repetition = repetition.value);
        }
    }
    if presence.value != 0.0 {
        let mut seen: Vec<u32> = recent(presence, transcript).collect();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            edit(token, &|edit| edit.subtract += presence.value);
        }
    }
    if frequency.value != 0.0 {
        for token in recent(frequency, transcript) {
            edit(token, &|edit| edit.subtract += frequency.value);
        }
    }
    edits.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(tokens: &[u32]) -> Transcript {
        Transcript::new(tokens.to_vec().into())
    }

    fn plain() -> Sampling {
        let off = |value| Penalty { value, context_size: 20 };
        Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 7,
            repetition: off(1.0),
            presence: off(0.0),
            frequency: off(0.0),
            logit_bias: vec![],
            xtc: None,
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
        assert!(sample_after(&after(&[1, 2, 3]), &plain(), None).edits.is_empty());
    }

    #[test]
    fn penalties_count_what_lies_in_their_context() {
        let mut sampling = plain();
        sampling.repetition = Penalty { value: 1.5, context_size: 2 };
        sampling.presence = Penalty { value: 0.5, context_size: 3 };
        sampling.frequency = Penalty { value: 0.25, context_size: 0 };
        sampling.logit_bias = vec![(9, -2.0)];
        let edits = sample_after(&after(&[4, 5, 5, 4]), &sampling, None).edits;
        let expected = [
            LogitEdit { token: 4, bias: 0.0, repetition: 1.5, subtract: 0.5 + 2.0 * 0.25 },
            LogitEdit { token: 5, bias: 0.0, repetition: 1.5, subtract: 0.5 + 2.0 * 0.25 },
            LogitEdit { token: 9, bias: -2.0, repetition: 1.0, subtract: 0.0 },
        ];
        assert_eq!(edits, expected);
    }
}
