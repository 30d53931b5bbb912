//! Drawing from filtered distributions: the filters, and the token at which the cumulative distribution of
//! the remaining tokens passes a row's uniform number. Rows of a group are `[rows, candidates]`.
//!
//! typical_p comes first. The order of the others is mlx-lm's (sample_utils.py): top_p, min_p, XTC, top_k,
//! all on the distribution at temperature 1, then the temperature.

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, Dtype, ops};

use super::{Row, wants_nucleus};
use crate::backend::{Sample, Xtc};
use crate::mlx::dim;

/// Returns a value of each row, `[rows, 1]`.
fn column(rows: &[&Row<'_>], value: impl Fn(&Sample) -> f32) -> Array {
    let values: Vec<f32> = rows.iter().map(|row| row.sample.map_or(0.0, &value)).collect();
    Array::from_slice(&values, &[dim(values.len()), 1])
}

fn uniform(sample: &Sample) -> f32 {
    sample.uniform
}

fn temperature(sample: &Sample) -> f32 {
    sample.temperature
}

/// Returns the distance below the largest logit that min_p allows; infinite if it is off.
fn min_p_floor(sample: &Sample) -> f32 {
    if sample.min_p > 0.0 { sample.min_p.ln() } else { f32::NEG_INFINITY }
}

/// Returns the mass of top_p's nucleus; infinite if it is off, since rounded probabilities may add up to more
/// than 1.
fn nucleus(sample: &Sample) -> f32 {
    if sample.top_p < 1.0 { sample.top_p } else { f32::INFINITY }
}

/// Returns the mass of top_p's nucleus where the candidates have to have it; else none.
fn doubtful_nucleus(sample: &Sample) -> f32 {
    if wants_nucleus(sample) { sample.top_p } else { f32::NEG_INFINITY }
}

fn typical_p(sample: &Sample) -> f32 {
    sample.typical_p
}

fn xtc_threshold(sample: &Sample) -> f32 {
    sample.xtc.as_ref().map_or(f32::INFINITY, |xtc| xtc.threshold)
}

fn has_xtc(rows: &[&Row<'_>]) -> bool {
    rows.iter().any(|row| row.sample.is_some_and(|sample| sample.xtc.is_some()))
}

fn zero() -> Array {
    Array::from_f32(0.0)
}

/// Returns the column at which the running sum of `weights` passes `uniform` of the whole, `[rows, 1]`.
fn invert(weights: &Array, uniform: &Array) -> Result<Array> {
    let sums = weights.cumsum(-1, None, None)?;
    let target = sums.try_index((.., -1..))?.multiply(uniform)?;
    let passed = sums.le(target)?.as_dtype(Dtype::Int32)?.sum_axis(-1, true)?;
    ops::minimum(passed, Array::from_int(weights.dim(1) - 1))
}

/// Keeps the tokens whose surprisal is nearest to the distribution's entropy, as many as have the wanted mass
/// (locally typical sampling, Meister et al. 2022, <https://arxiv.org/abs/2202.00666>), and those that are as
/// near as the last of them. Returns logits, infinitely low for the others, and whether the `n` nearest were
/// enough, `[rows]`.
pub(super) fn keep_typical(rows: &[&Row<'_>], logits: &Array, n: i32) -> Result<(Array, Array)> {
    let log = logits.subtract(logits.logsumexp_axis(-1, true)?)?;
    let mass = log.exp()?;
    // What is infinitely unlikely has no part in the entropy, and 0 times infinity is not a number.
    let parts = ops::select(mass.gt(zero())?, mass.multiply(&log)?, zero())?;
    let entropy = parts.sum_axis(-1, true)?.negative()?;
    let nearness = log.add(entropy)?.abs()?.negative()?;
    let (ids, nearest) = largest(&nearness, n)?;
    let nearer = mass.take_along_axis(ids, -1)?.cumsum(-1, None, false)?;
    let wanted = column(rows, typical_p);
    let enough = nearer.try_index((.., -1..))?.ge(&wanted)?;
    let last =
        ops::select(nearer.lt(wanted)?, nearest, Array::from_f32(f32::INFINITY))?.min_axis(-1, true)?;
    let kept = ops::select(nearness.ge(last)?, logits, Array::from_f32(f32::NEG_INFINITY))?;
    Ok((kept, enough.reshape(&[-1])?))
}

/// Draws from all tokens that min_p and XTC leave. Returns ids `[rows]`.
pub(super) fn draw_free(rows: &[&Row<'_>], logits: &Array) -> Result<Array> {
    let below = logits.subtract(logits.max_axis(-1, true)?)?;
    let mut kept = below.ge(column(rows, min_p_floor))?;
    if has_xtc(rows) {
        let mass = ops::select(&kept, below.exp()?, zero())?;
        let likelihood = mass.divide(mass.sum_axis(-1, true)?)?;
        let removed = spare_by_id(rows, &xtc_removed(rows, &likelihood)?)?;
        kept = kept.logical_and(removed.logical_not()?)?;
    }
    let weights = below.divide(column(rows, temperature))?.exp()?;
    let weights = ops::select(kept, weights, zero())?;
    invert(&weights, &column(rows, uniform))?.reshape(&[-1])
}

/// Returns the `n` largest of each row, best first: ids (int32) and values, `[rows, n]`.
pub(super) fn largest(x: &Array, n: i32) -> Result<(Array, Array)> {
    let size = x.dim(1);
    let ids = if n < size {
        let ids = ops::argpartition_axis(x, size - n, -1)?.try_index((.., size - n..))?;
        let order = ops::argsort_axis(x.take_along_axis(&ids, -1)?.negative()?, -1)?;
        ids.take_along_axis(order, -1)?
    } else {
        ops::argsort_axis(x.negative()?, -1)?
    };
    let values = x.take_along_axis(&ids, -1)?;
    Ok((ids.as_dtype(Dtype::Int32)?, values))
}

/// Draws from the `n` largest of each row. Returns ids `[rows]`, and whether `n` were enough, `[rows]`: only
/// top_p may need more.
pub(super) fn draw_sorted(rows: &[&Row<'_>], logits: &Array, n: i32) -> Result<(Array, Array)> {
    let (ids, sorted) = largest(logits, n)?;
    let total = logits.logsumexp_axis(-1, true)?;
    let mass = sorted.subtract(&total)?.exp()?;
    let above = mass.cumsum(-1, None, false)?;
    let nucleus_mass = column(rows, nucleus);
    let enough = above.try_index((.., -1..))?.ge(column(rows, doubtful_nucleus))?;
    let kept = above.lt(nucleus_mass)?;
    // Candidates that are as likely as the last one of the nucleus belong to it too.
    let last = ops::select(&kept, &sorted, Array::from_f32(f32::INFINITY))?.min_axis(-1, true)?;
    let below = sorted.subtract(sorted.try_index((.., ..1))?)?;
    let mut kept = sorted.ge(last)?.logical_and(below.ge(column(rows, min_p_floor))?)?;
    if has_xtc(rows) {
        let whole = kept_mass(rows, logits, &total, &ops::select(&kept, &mass, zero())?)?;
        let likelihood = ops::select(&kept, mass.divide(whole)?, zero())?;
        let removed = xtc_removed(rows, &likelihood)?.logical_and(is_spared(rows, &ids)?.logical_not()?)?;
        kept = kept.logical_and(removed.logical_not()?)?;
    }
    let ranks = kept.as_dtype(Dtype::Int32)?.cumsum(-1, None, false)?;
    let limits: Vec<i32> =
        rows.iter().map(|row| row.sample.map_or(n, |s| if s.top_k > 0 { dim(s.top_k) } else { n })).collect();
    let kept = kept.logical_and(ranks.lt(Array::from_slice(&limits, &[dim(limits.len()), 1]))?)?;
    let weights = below.divide(column(rows, temperature))?.exp()?;
    let weights = ops::select(kept, weights, zero())?;
    let place = invert(&weights, &column(rows, uniform))?;
    Ok((ids.take_along_axis(place, -1)?.reshape(&[-1])?, enough.reshape(&[-1])?))
}

/// Returns the mass that top_p and min_p leave, `[rows, 1]`: top_p leaves at most the candidates, min_p may
/// leave more.
fn kept_mass(rows: &[&Row<'_>], logits: &Array, total: &Array, candidates: &Array) -> Result<Array> {
    let below = logits.subtract(logits.max_axis(-1, true)?)?;
    let all = logits.subtract(total)?.exp()?;
    let all = ops::select(below.ge(column(rows, min_p_floor))?, all, zero())?.sum_axis(-1, true)?;
    let has_nucleus = column(rows, nucleus).lt(Array::from_f32(1.0))?;
    ops::select(has_nucleus, candidates.sum_axis(-1, true)?, all)
}

/// Returns the tokens that XTC removes, spared ones included: all that pass the threshold but the least
/// likely of them.
fn xtc_removed(rows: &[&Row<'_>], likelihood: &Array) -> Result<Array> {
    let likely = likelihood.gt(column(rows, xtc_threshold))?;
    let least = ops::select(likely, likelihood, Array::from_f32(f32::INFINITY))?.min_axis(-1, true)?;
    likelihood.gt(least)
}

/// Returns the spared tokens of each row, `[rows, longest]`; -1 where a row has fewer.
fn spared(rows: &[&Row<'_>]) -> (Vec<i32>, [i32; 2]) {
    let of = |row: &Row<'_>| -> Vec<i32> {
        let xtc: Option<&Xtc> = row.sample.and_then(|sample| sample.xtc.as_ref());
        xtc.map_or_else(Vec::new, |xtc| xtc.spared.iter().map(|&id| dim(id)).collect())
    };
    let lists: Vec<Vec<i32>> = rows.iter().map(|row| of(row)).collect();
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let padded =
        lists.iter().flat_map(|list| list.iter().copied().chain(std::iter::repeat(-1)).take(longest));
    (padded.collect(), [dim(rows.len()), dim(longest)])
}

/// Returns whether each candidate is a spared token.
fn is_spared(rows: &[&Row<'_>], ids: &Array) -> Result<Array> {
    let (spared, [count, longest]) = spared(rows);
    let spared = Array::from_slice(&spared, &[count, 1, longest]);
    ids.expand_dims(-1)?.eq(spared)?.any_axis(-1, None)
}

/// Clears spared tokens in `removed` `[rows, vocabulary]`.
fn spare_by_id(rows: &[&Row<'_>], removed: &Array) -> Result<Array> {
    let (spared, shape) = spared(rows);
    // Where a row has fewer, token 0 keeps its value.
    let real: Vec<bool> = spared.iter().map(|&id| id >= 0).collect();
    let ids: Vec<i32> = spared.iter().map(|&id| id.max(0)).collect();
    let (real, ids) = (Array::from_slice(&real, &shape), Array::from_slice(&ids, &shape));
    let had = removed.take_along_axis(&ids, -1)?.logical_and(real.logical_not()?)?;
    removed.put_along_axis(&ids, had, -1)
}
