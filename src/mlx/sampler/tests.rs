//! Draws against a plain definition of the filters, in f64 and one row at a time.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::backend::{LogitEdit, SlotId, Span, SpanKind};

/// Above [`CUT_MAX`], so that candidates are cut.
const VOCABULARY: usize = 3000;

/// Bound of the rounding in a running sum of `VOCABULARY` probabilities in f32.
const SUM_ERROR: f32 = 2e-5;

fn sample() -> Sample {
    Sample {
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        typical_p: 1.0,
        uniform: 0.5,
        edits: vec![],
        xtc: None,
        top_logprobs: None,
        allow: Allow::All,
    }
}

fn step(samples: &[Sample]) -> Step {
    let spans = samples.iter().zip(0..).map(|(sample, slot)| Span {
        slot: SlotId { slab: 0, slot },
        start: 0,
        tokens: vec![0],
        kind: SpanKind::Decode,
        outputs: vec![RowOutput { row: 0, want: Want::Sample(sample.clone()) }],
    });
    Step { spans: spans.collect() }
}

fn results(logits: &[f32], samples: &[Sample]) -> Vec<RowResult> {
    results_among(logits, samples, dim(logits.len()))
}

/// Draws among the first `vocabulary` tokens.
fn results_among(logits: &[f32], samples: &[Sample], vocabulary: i32) -> Vec<RowResult> {
    let rows: Vec<f32> = samples.iter().flat_map(|_| logits.iter().copied()).collect();
    let logits = Array::from_slice(&rows, &[dim(samples.len()), dim(logits.len())]);
    let step = step(samples);
    draw(&step, &logits, vocabulary).unwrap().read(&step).unwrap()
}

fn drawn(logits: &[f32], samples: &[Sample]) -> Vec<usize> {
    let token = |result: RowResult| match result {
        RowResult::Token(token, _) => token as usize,
        other => panic!("{other:?}"),
    };
    results(logits, samples).into_iter().map(token).collect()
}

/// Returns the tokens of locally typical sampling by its definition, `more` or fewer of them.
fn typical(logits: &[f32], typical_p: f32, more: isize) -> Vec<bool> {
    let whole: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    let log: Vec<f64> = logits.iter().map(|&logit| f64::from(logit) - whole.ln()).collect();
    let entropy: f64 = log.iter().map(|log| -log.exp() * log).sum();
    let far = |id: usize| (-log[id] - entropy).abs();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| far(a).total_cmp(&far(b)));
    let mut nearer = 0.0;
    let within = order.iter().take_while(|&&id| {
        let is_wanted = nearer < f64::from(typical_p);
        nearer += log[id].exp();
        is_wanted
    });
    let last = within.count().saturating_add_signed(more).clamp(1, order.len()) - 1;
    let farthest = far(order[last]);
    (0..logits.len()).map(|id| far(id) <= farthest).collect()
}

/// Returns the weights of all tokens, by the filters' definitions; typical_p keeps `more` or fewer.
fn weights(logits: &[f32], sample: &Sample, more: isize) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let likelihood = |kept: &[bool]| {
        let mass = |id: usize| if kept[id] { f64::from(logits[id]).exp() } else { 0.0 };
        let whole: f64 = (0..logits.len()).map(mass).sum();
        (0..logits.len()).map(|id| mass(id) / whole).collect::<Vec<f64>>()
    };
    let mut kept = vec![true; logits.len()];
    if sample.typical_p < 1.0 {
        kept = typical(logits, sample.typical_p, more);
        order.sort_by_key(|&id| !kept[id]);
    }
    let all = likelihood(&kept);
    if sample.top_p < 1.0 {
        let (mut above, mut last) = (0.0, f32::INFINITY);
        for &id in &order {
            // What is as likely as the last one belongs to the nucleus too.
            kept[id] &= above < f64::from(sample.top_p) || logits[id] >= last;
            last = if kept[id] { logits[id] } else { last };
            above += all[id];
        }
    }
    for id in 0..kept.len() {
        kept[id] &= all[id] >= f64::from(sample.min_p) * all[order[0]];
    }
    if let Some(xtc) = &sample.xtc {
        let now = likelihood(&kept);
        let likely = |id: &usize| now[*id] > f64::from(xtc.threshold);
        let least = (0..kept.len()).filter(likely).map(|id| now[id]).fold(f64::INFINITY, f64::min);
        for id in 0..kept.len() {
            kept[id] &= now[id] <= least || xtc.spared.contains(&u32::try_from(id).unwrap());
        }
    }
    if sample.top_k > 0 {
        let ranked: Vec<usize> = order.iter().copied().filter(|&id| kept[id]).collect();
        for &id in ranked.iter().skip(sample.top_k as usize) {
            kept[id] = false;
        }
    }
    let heated = |id: usize| (f64::from(logits[id]) / f64::from(sample.temperature)).exp();
    (0..kept.len()).map(|id| if kept[id] { heated(id) } else { 0.0 }).collect()
}

/// Whether `token` is where the running sum passes the uniform number, in the order of its draw method.
fn is_right(logits: &[f32], sample: &Sample, token: usize) -> bool {
    // Sums in f32 decide whether the nucleus, or what is typical, ends one token earlier or later.
    let nudged = |by: f32| Sample { top_p: sample.top_p + by, ..sample.clone() };
    let (nucleus, is_typical) = (sample.top_p < 1.0, sample.typical_p < 1.0);
    let sizes = if is_typical { &[0, -1, 1, -2, 2][..] } else { &[0] };
    sizes.iter().any(|&more| {
        is_drawn(logits, sample, token, more)
            || nucleus
                && [-SUM_ERROR, SUM_ERROR].into_iter().any(|by| is_drawn(logits, &nudged(by), token, more))
    })
}

fn is_drawn(logits: &[f32], sample: &Sample, token: usize, more: isize) -> bool {
    let weights = weights(logits, sample, more);
    let mut order: Vec<usize> = (0..logits.len()).collect();
    if method(sample, u32::try_from(logits.len()).unwrap()) != DrawMethod::Free {
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    }
    let whole: f64 = weights.iter().sum();
    let before: f64 = order.iter().take_while(|&&id| id != token).map(|&id| weights[id]).sum();
    let (low, high) = (before / whole, (before + weights[token]) / whole);
    let uniform = f64::from(sample.uniform);
    // Of two tokens that are as far from the entropy, either may be the last.
    let error = f64::from(if sample.typical_p < 1.0 { 100.0 * SUM_ERROR } else { SUM_ERROR });
    weights[token] > 0.0 && low - error <= uniform && uniform <= high + error
}

/// Logits, peaked or flat; few are equal.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    let spread = prop_oneof![Just(0.5f32), Just(3.0), Just(12.0)];
    (spread, any::<u64>()).prop_map(|(spread, seed)| {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            #[allow(clippy::cast_precision_loss, reason = "random bits")]
            let unit = (state >> 40) as f32 / (1u32 << 24) as f32;
            unit
        };
        (0..VOCABULARY).map(|_| spread * (next() + next() + next() - 1.5)).collect()
    })
}

fn any_sample() -> impl Strategy<Value = Sample> {
    let xtc = (0.0f32..=0.5, prop::collection::vec(0..50u32, 0..3));
    let filters = (
        prop_oneof![Just(1.0f32), 0.05f32..0.99],
        prop_oneof![Just(0u32), 1u32..60, Just(2000)],
        prop_oneof![Just(0.0f32), 0.001f32..0.5],
        prop_oneof![2 => Just(1.0f32), 1 => 0.05f32..0.99],
        prop::option::of(xtc),
    );
    (filters, 0.3f32..2.0, 0u32..1 << 23).prop_map(|(filters, temperature, bits)| {
        let (top_p, top_k, min_p, typical_p, xtc) = filters;
        let xtc = xtc.map(|(threshold, spared)| Xtc { threshold, spared: Arc::from(spared) });
        #[allow(clippy::cast_precision_loss, reason = "23 bits are exact")]
        let uniform = bits as f32 / (1u32 << 23) as f32;
        Sample { temperature, top_p, top_k, min_p, typical_p, uniform, xtc, ..sample() }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn rows_with_different_filters_are_each_drawn_as_defined(
        logits in logits(),
        samples in prop::collection::vec(any_sample(), 1..6),
    ) {
        for (sample, token) in samples.iter().zip(drawn(&logits, &samples)) {
            prop_assert!(is_right(&logits, sample, token), "{sample:?} drew {token}");
            let alone = drawn(&logits, std::slice::from_ref(sample))[0];
            prop_assert_eq!(alone, token, "alone as among others");
        }
    }
}

#[test]
fn what_is_as_likely_as_the_last_of_a_nucleus_belongs_to_it() {
    let logits: Vec<f32> = [2.0, 1.0, 1.0].into_iter().chain([-20.0; 5]).collect();
    // Two tokens have 0.79 of the mass. Of all three the first has 0.58, of two 0.73.
    let sample = Sample { top_p: 0.6, uniform: 0.7, ..sample() };
    let token = drawn(&logits, std::slice::from_ref(&sample))[0];
    assert!([1, 2].contains(&token), "{token}");
}

#[test]
fn what_is_typical_need_not_be_most_likely() {
    // The entropy is 1.75 bits; surprisals are 1, 2, 3 and 3.
    let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|mass| mass.ln()).collect();
    let at = |typical_p, uniform| Sample { typical_p, uniform, ..sample() };
    let kept = |typical_p| {
        let samples: Vec<Sample> = [0.01, 0.3, 0.6, 0.99].map(|uniform| at(typical_p, uniform)).into();
        let mut tokens = drawn(&logits, &samples);
        tokens.dedup();
        tokens
    };
    assert_eq!(kept(0.2), [1]);
    assert_eq!(kept(0.6), [0, 1]);
    assert_eq!(kept(0.8), [0, 1, 3], "those that are as near as the last");
    let greedy = Sample { temperature: 0.0, ..at(0.2, 0.5) };
    assert_eq!(drawn(&logits, &[greedy, at(0.2, 0.9), at(1.0, 0.01)]), [0, 1, 0], "each row by itself");
}

#[test]
fn what_is_typical_beyond_the_candidates_is_drawn_from_all_tokens() {
    let logits: Vec<f32> = (0..3000u16).map(|id| -1e-4 * f32::from(id)).collect();
    let late = Sample { typical_p: 0.9, uniform: 0.98, ..sample() };
    let with_nucleus = Sample { top_p: 0.9, ..late.clone() };
    let few = Sample { typical_p: 0.2, ..late.clone() };
    let samples = [late, with_nucleus, few];
    for (sample, token) in samples.iter().zip(drawn(&logits, &samples)) {
        assert!(is_right(&logits, sample, token), "{sample:?} drew {token}");
        assert_eq!(drawn(&logits, std::slice::from_ref(sample)), [token]);
    }
}

#[test]
fn a_nucleus_beyond_the_candidates_is_drawn_from_all_tokens() {
    // Nearly flat: the nucleus is nearly everything.
    let logits: Vec<f32> = (0..3000u16).map(|id| -1e-4 * f32::from(id)).collect();
    let late = Sample { top_p: 0.99, uniform: 0.98, top_logprobs: Some(1), ..sample() };
    let first = Sample { top_p: 0.99, uniform: 0.0, ..sample() };
    let tokens = drawn(&logits, &[late.clone(), first]);
    assert!(is_right(&logits, &late, tokens[0]) && tokens[0] > 2000, "{tokens:?}");
    assert_eq!(tokens[1], 0);
}

#[test]
fn rows_that_only_pad_the_vocabulary_are_neither_drawn_nor_listed() {
    // The largest logits are beyond the vocabulary.
    let logits: Vec<f32> = (0..8u8).map(f32::from).collect();
    let greedy = Sample { temperature: 0.0, top_logprobs: Some(20), ..sample() };
    let free = Sample { uniform: 0.999_999, ..greedy.clone() };
    let sorted = Sample { temperature: 1.0, top_k: 7, ..free.clone() };
    let nucleus = Sample { temperature: 1.0, top_p: 0.999, ..free.clone() };
    let samples = [greedy, Sample { temperature: 1.0, ..free }, sorted, nucleus];
    for result in results_among(&logits, &samples, 5) {
        let RowResult::Token(token, Some(logprobs)) = result else { panic!("{result:?}") };
        assert!(token < 5);
        let ids: Vec<u32> = logprobs.top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [4, 3, 2, 1, 0]);
        let mass: f32 = logprobs.top.iter().map(|(_, logprob)| logprob.exp()).sum();
        assert!((mass - 1.0).abs() < 1e-5);
    }
}

#[test]
fn xtc_removes_the_most_likely_tokens_except_spared_ones() {
    let mut logits = vec![-20.0; VOCABULARY];
    (logits[5], logits[6], logits[7]) = (2.0, 1.9, 1.8);
    let xtc = |spared: &[u32]| Some(Xtc { threshold: 0.1, spared: spared.into() });
    for top_k in [0, 2] {
        let at = |uniform, xtc| Sample { uniform, xtc, top_k, ..sample() };
        let tokens = drawn(&logits, &[at(0.01, xtc(&[])), at(0.01, xtc(&[5])), at(0.01, None)]);
        assert_eq!(tokens, [7, 5, 5], "top_k {top_k}");
    }
}

#[test]
fn a_temperature_next_to_zero_takes_the_most_likely_token() {
    let logits = [1.0, 3.0, 2.999, -40.0];
    for temperature in [1e-45, 1e-39, 1e-31, 1e-30, 1e-20] {
        for (top_p, min_p) in [(1.0, 0.0), (0.5, 0.0), (1.0, 0.1)] {
            let sample = Sample { temperature, top_p, min_p, uniform: 0.999, ..sample() };
            assert_eq!(drawn(&logits, &[sample]), [1], "{temperature:e}, top_p {top_p}, min_p {min_p}");
        }
    }
}

#[test]
fn logits_that_penalties_drive_beyond_numbers_end_that_row_alone() {
    let edit = LogitEdit { token: 1, bias: 0.0, repetition: 1e-38, subtract: 0.0 };
    let driven = Sample { edits: vec![edit], ..sample() };
    let [driven, alone] = &results(&[1.0, 30.0, 2.0], &[driven, sample()])[..] else { panic!("two rows") };
    assert_eq!(*driven, RowResult::NotFinite);
    assert!(matches!(alone, RowResult::Token(..)));
}

/// A row that may draw only these tokens.
fn among(sample: Sample, tokens: &[usize]) -> Sample {
    let mut words = vec![0; VOCABULARY.div_ceil(32)];
    tokens.iter().for_each(|token| words[token / 32] |= 1 << (token % 32));
    Sample { allow: Allow::These(words.into()), ..sample }
}

#[test]
fn masked_rows_draw_what_they_may_and_the_others_as_without_them() {
    let logits: Vec<f32> = (0..VOCABULARY).map(|token| ((token * 7919) % 1000) as f32 / 150.0).collect();
    let greedy = Sample { temperature: 0.0, top_logprobs: Some(2), ..sample() };
    let nucleus = Sample { temperature: 1.5, top_p: 0.95, ..sample() };
    let kinds =
        [greedy, sample(), Sample { top_k: 5, ..sample() }, Sample { min_p: 0.2, ..sample() }, nucleus];
    for uniform in [0.0, 0.3, 0.999_999] {
        for allowed in [vec![2999], vec![0, 31, 32, 2998], (0..VOCABULARY).step_by(3).collect()] {
            let free: Vec<Sample> = kinds.iter().map(|kind| Sample { uniform, ..kind.clone() }).collect();
            let masked: Vec<Sample> = free.iter().map(|sample| among(sample.clone(), &allowed)).collect();
            let both: Vec<Sample> = free.iter().chain(&masked).cloned().collect();
            let together = drawn(&logits, &both);
            assert_eq!(together[..free.len()], drawn(&logits, &free), "free rows");
            for (place, token) in together[free.len()..].iter().enumerate() {
                assert!(allowed.contains(token), "{token} of {allowed:?} by {:?}", masked[place]);
                assert_eq!(drawn(&logits, &masked[place..=place]), [*token], "alone");
            }
            let best = *allowed.iter().max_by(|a, b| logits[**a].total_cmp(&logits[**b])).unwrap();
            assert_eq!(logits[together[free.len()]], logits[best], "greedy takes the most likely");
        }
    }
}

#[test]
fn logprobs_are_of_the_raw_distribution_with_a_mask_too() {
    let logits: Vec<f32> = (0..VOCABULARY).map(|token| (token % 17) as f32 / 4.0).collect();
    let plain = Sample { temperature: 0.0, top_logprobs: Some(3), ..sample() };
    let chosen = |sample: Sample| match results(&logits, &[sample]).pop().unwrap() {
        RowResult::Token(token, logprobs) => (token, logprobs.unwrap()),
        other => panic!("{other:?}"),
    };
    let (_, free) = chosen(plain.clone());
    let (token, masked) = chosen(among(plain, &[1]));
    assert_eq!((token, masked.top), (1, free.top));
    assert!(masked.chosen.1 < free.chosen.1);
}

#[test]
fn a_mask_does_not_hide_logits_that_are_not_finite() {
    let mut logits = vec![1.0; VOCABULARY];
    logits[5] = f32::NAN;
    assert_eq!(results(&logits, &[among(sample(), &[3])]), [RowResult::NotFinite]);
}
