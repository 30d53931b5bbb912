//! From logits to tokens, for all rows of a step together. Filters and their order are mlx-lm's
//! (sample_utils.py): logit bias, penalties; then on the log-probabilities top_p, min_p, top_k; then the
//! temperature. A token is drawn by inverting the cumulative distribution at a number that the host gives,
//! so that a row's token does not depend on its neighbours.
//!
//! Rows are grouped by how much has to be sorted: nothing (greedy, or no filter but min_p), the `top_k`
//! largest, or everything (top_p without top_k).

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::{TryIndexOp, argmax_axis};
use mlx_rs::{Array, Dtype, ops};

use crate::backend::{Sample, SpanOutput, SpanResult, Step, TokenLogprobs};
use crate::device::dim;

/// Above this `top_k`, sorting everything costs no more than cutting first.
const CUT_MAX: u32 = 1024;

/// Tokens and log-probabilities of a step, being computed.
#[derive(Debug)]
pub(crate) struct Drawn {
    /// Whether the logits of each row are finite, `[rows]`, bool.
    finite: Array,
    groups: Vec<GroupDrawn>,
}

/// Rows that were treated alike.
#[derive(Debug)]
struct GroupDrawn {
    /// Indices of the rows.
    rows: Vec<usize>,
    /// `[rows]`, int32.
    tokens: Array,
    logprobs: Option<LogprobArrays>,
}

/// Raw log-probabilities of a group.
#[derive(Debug)]
struct LogprobArrays {
    /// Of the chosen tokens, `[rows]`.
    chosen: Array,
    /// The `top` likeliest tokens, best first: ids and values, `[rows, top]`.
    top: Option<(Array, Array, usize)>,
}

/// How a row's token comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// It is given.
    Given,
    Greedy,
    /// Drawn from all tokens, but for min_p.
    Free,
    /// Drawn from so many largest.
    Sorted(u32),
}

/// One row of logits and what is wanted of it.
struct Row<'a> {
    way: Way,
    sample: Option<&'a Sample>,
    given: u32,
    top: Option<u32>,
}

fn way(sample: &Sample, vocabulary: u32) -> Way {
    if sample.temperature == 0.0 {
        Way::Greedy
    } else if sample.top_k > 0 && sample.top_k <= CUT_MAX.min(vocabulary) {
        Way::Sorted(sample.top_k.next_power_of_two().min(vocabulary))
    } else if sample.top_p < 1.0 || sample.top_k > 0 {
        Way::Sorted(vocabulary)
    } else {
        Way::Free
    }
}

/// The rows of a step, in the order of their logits.
fn rows(step: &Step, vocabulary: u32) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for span in &step.spans {
        match &span.output {
            SpanOutput::None => {}
            SpanOutput::Sample(sample) => rows.push(Row {
                way: way(sample, vocabulary),
                sample: Some(&**sample),
                given: 0,
                top: sample.top_logprobs,
            }),
            SpanOutput::Score { next, top, .. } => rows.extend(next.iter().map(|&given| Row {
                way: Way::Given,
                sample: None,
                given,
                top: Some(*top),
            })),
        }
    }
    rows
}

fn column(values: &[f32]) -> Array {
    Array::from_slice(values, &[dim(values.len()), 1])
}

/// Draws a token for every row of `logits` `[rows, vocabulary]`.
pub(crate) fn draw(step: &Step, logits: &Array) -> Result<Drawn> {
    let logits = &logits.as_dtype(Dtype::Float32)?;
    let rows = rows(step, logits.dim(1).unsigned_abs());
    let finite = logits.sum_axis(-1, None)?.is_finite()?;
    let edited = edit(logits, &rows)?;
    let mut ways: Vec<Way> = rows.iter().map(|row| row.way).collect();
    ways.sort_unstable();
    ways.dedup();
    let groups = ways.into_iter().map(|way| {
        let members: Vec<usize> = (0..rows.len()).filter(|&row| rows[row].way == way).collect();
        let group: Vec<&Row<'_>> = members.iter().map(|&row| &rows[row]).collect();
        let tokens = draw_group(way, &group, &select(&edited, &members)?)?;
        let top = group.iter().filter_map(|row| row.top).max();
        let logprobs = top.map(|top| logprobs(&select(logits, &members)?, &tokens, top)).transpose()?;
        Ok(GroupDrawn { rows: members, tokens, logprobs })
    });
    let groups = groups.collect::<Result<Vec<_>>>()?;
    Ok(Drawn { finite, groups })
}

/// Some rows of `logits`.
fn select(logits: &Array, rows: &[usize]) -> Result<Array> {
    if rows.len() == logits.dim(0).unsigned_abs() as usize {
        return Ok(logits.clone());
    }
    let rows: Vec<i32> = rows.iter().map(|&row| dim(row)).collect();
    logits.take_axis(Array::from_slice(&rows, &[dim(rows.len())]), 0)
}

/// Applies biases and penalties: all edits of all rows with one gather and one scatter.
fn edit(logits: &Array, rows: &[Row<'_>]) -> Result<Array> {
    let vocabulary = logits.dim(1);
    let (mut places, mut bias, mut repetition, mut subtract) = (vec![], vec![], vec![], vec![]);
    for (row, Row { sample, .. }) in rows.iter().enumerate() {
        for edit in sample.iter().flat_map(|sample| &sample.edits) {
            places.push(dim(row) * vocabulary + dim(edit.token));
            bias.push(edit.bias);
            repetition.push(edit.repetition);
            subtract.push(edit.subtract);
        }
    }
    if places.is_empty() {
        return Ok(logits.clone());
    }
    let array = |values: &[f32]| Array::from_slice(values, &[dim(values.len())]);
    let places = Array::from_slice(&places, &[dim(places.len())]);
    let flat = logits.reshape(&[-1])?;
    let old = flat.take(&places)?.add(array(&bias))?;
    let repetition = array(&repetition);
    let penalized =
        ops::select(old.lt(Array::from_f32(0.0))?, old.multiply(&repetition)?, old.divide(&repetition)?)?;
    let new = penalized.subtract(array(&subtract))?;
    flat.put_along_axis(&places, new, 0)?.reshape(logits.shape())
}

fn draw_group(way: Way, group: &[&Row<'_>], logits: &Array) -> Result<Array> {
    match way {
        Way::Given => {
            let given: Vec<i32> = group.iter().map(|row| dim(row.given)).collect();
            Ok(Array::from_slice(&given, &[dim(given.len())]))
        }
        Way::Greedy => argmax_axis(logits, -1, None)?.as_dtype(Dtype::Int32),
        Way::Free => draw_free(group, logits),
        Way::Sorted(largest) => draw_sorted(group, logits, dim(largest)),
    }
}

fn values(group: &[&Row<'_>], value: impl Fn(&Sample) -> f32) -> Array {
    column(&group.iter().map(|row| row.sample.map_or(0.0, &value)).collect::<Vec<_>>())
}

/// Distance below the largest logit that min_p allows; all of it if it is off.
fn min_p_floor(sample: &Sample) -> f32 {
    if sample.min_p > 0.0 { sample.min_p.ln() } else { f32::NEG_INFINITY }
}

/// The column where the running sum of `weights` `[rows, n]` passes `uniform` of the whole; `[rows, 1]`.
fn invert(weights: &Array, uniform: &Array) -> Result<Array> {
    let sums = weights.cumsum(-1, None, None)?;
    let target = sums.try_index((.., -1..))?.multiply(uniform)?;
    let passed = sums.le(target)?.as_dtype(Dtype::Int32)?.sum_axis(-1, true)?;
    ops::minimum(passed, Array::from_int(weights.dim(1) - 1))
}

fn draw_free(group: &[&Row<'_>], logits: &Array) -> Result<Array> {
    let below = logits.subtract(logits.max_axis(-1, true)?)?;
    let weights = below.divide(values(group, |sample| sample.temperature))?.exp()?;
    let kept = below.ge(values(group, min_p_floor))?;
    let weights = ops::select(kept, weights, Array::from_f32(0.0))?;
    invert(&weights, &values(group, |sample| sample.uniform))?.reshape(&[-1])
}

/// The `n` largest of each row, best first: ids (int32) and values, `[rows, n]`.
fn largest(x: &Array, n: i32) -> Result<(Array, Array)> {
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

fn draw_sorted(group: &[&Row<'_>], logits: &Array, n: i32) -> Result<Array> {
    let (ids, sorted) = largest(logits, n)?;
    let mass = sorted.subtract(logits.logsumexp_axis(-1, true)?)?.exp()?;
    let above = mass.cumsum(-1, None, false)?;
    // A sum of probabilities may round to more than 1, and top_p = 1 is off.
    let nucleus = values(group, |sample| if sample.top_p < 1.0 { sample.top_p } else { f32::INFINITY });
    let kept = above.lt(nucleus)?;
    // Whatever is as likely as the last one kept is kept too.
    let infinity = Array::from_f32(f32::INFINITY);
    let last = ops::select(&kept, &sorted, infinity)?.min_axis(-1, true)?;
    let best = sorted.try_index((.., ..1))?;
    let below = sorted.subtract(&best)?;
    let kept = sorted.ge(last)?.logical_and(below.ge(values(group, min_p_floor))?)?;
    let ranks: Vec<i32> = (0..n).collect();
    let limits: Vec<i32> = group
        .iter()
        .map(|row| row.sample.map_or(0, |s| if s.top_k > 0 { dim(s.top_k) } else { n }))
        .collect();
    let ranked =
        Array::from_slice(&ranks, &[1, n]).lt(Array::from_slice(&limits, &[dim(limits.len()), 1]))?;
    let weights = below.divide(values(group, |sample| sample.temperature))?.exp()?;
    let weights = ops::select(kept.logical_and(ranked)?, weights, Array::from_f32(0.0))?;
    let place = invert(&weights, &values(group, |sample| sample.uniform))?;
    ids.take_along_axis(place, -1)?.reshape(&[-1])
}

fn logprobs(logits: &Array, tokens: &Array, top: u32) -> Result<LogprobArrays> {
    let total = logits.logsumexp_axis(-1, true)?;
    let places = tokens.reshape(&[-1, 1])?;
    let chosen = logits.take_along_axis(places, -1)?.subtract(&total)?.reshape(&[-1])?;
    let top = if top == 0 {
        None
    } else {
        let n = dim(top).min(logits.dim(1));
        let (ids, values) = largest(logits, n)?;
        Some((ids.contiguous()?, values.subtract(&total)?.contiguous()?, n.unsigned_abs() as usize))
    };
    Ok(LogprobArrays { chosen: chosen.contiguous()?, top })
}

impl Drawn {
    /// Every array that [`Drawn::read`] looks at; all are outputs of the step.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        let groups = self.groups.iter().flat_map(|group| {
            let logprobs = group.logprobs.iter().flat_map(|logprobs| {
                let top = logprobs.top.iter().flat_map(|(ids, values, _)| [ids, values]);
                std::iter::once(&logprobs.chosen).chain(top)
            });
            std::iter::once(&group.tokens).chain(logprobs)
        });
        std::iter::once(&self.finite).chain(groups).collect()
    }

    /// Waits for the step, and returns one result for each of its spans.
    pub(crate) fn read(&self, step: &Step) -> std::result::Result<Vec<SpanResult>, String> {
        let text = |error: mlx_rs::error::ConversionError| error.to_string();
        let finite = self.finite.to_vec_exact::<bool>().map_err(text)?;
        let mut rows: Vec<Option<(u32, Option<TokenLogprobs>)>> = vec![None; finite.len()];
        for group in &self.groups {
            let tokens = group.tokens.to_vec_exact::<i32>().map_err(text)?;
            let logprobs =
                group.logprobs.as_ref().map(|logprobs| logprobs.read(&tokens)).transpose().map_err(text)?;
            for (index, &row) in group.rows.iter().enumerate() {
                let logprobs = logprobs.as_ref().map(|logprobs| logprobs[index].clone());
                rows[row] = Some((tokens[index].unsigned_abs(), logprobs));
            }
        }
        let mut rows = finite.into_iter().zip(rows);
        Ok(step.spans.iter().map(|span| result(&span.output, &mut rows)).collect())
    }
}

impl LogprobArrays {
    fn read(
        &self,
        tokens: &[i32],
    ) -> std::result::Result<Vec<TokenLogprobs>, mlx_rs::error::ConversionError> {
        let chosen = self.chosen.to_vec_exact::<f32>()?;
        let (ids, values, n) = match &self.top {
            Some((ids, values, n)) => (ids.to_vec_exact::<i32>()?, values.to_vec_exact::<f32>()?, *n),
            None => (vec![], vec![], 0),
        };
        let entry = |(row, (&token, &chosen)): (usize, (&i32, &f32))| {
            let top =
                (row * n..(row + 1) * n).map(|place| (ids[place].unsigned_abs(), values[place])).collect();
            TokenLogprobs { chosen: (token.unsigned_abs(), chosen), top }
        };
        Ok(tokens.iter().zip(&chosen).enumerate().map(entry).collect())
    }
}

/// Takes a span's rows and makes its result of them.
fn result(
    output: &SpanOutput,
    rows: &mut impl Iterator<Item = (bool, Option<(u32, Option<TokenLogprobs>)>)>,
) -> SpanResult {
    match output {
        SpanOutput::None => SpanResult::None,
        SpanOutput::Sample(sample) => match rows.next() {
            Some((true, Some((token, mut logprobs)))) => {
                let top = sample.top_logprobs;
                if let (Some(logprobs), Some(top)) = (&mut logprobs, top) {
                    logprobs.top.truncate(top as usize);
                }
                SpanResult::Token(token, logprobs.filter(|_| top.is_some()))
            }
            _ => SpanResult::NotFinite,
        },
        SpanOutput::Score { next, top, .. } => {
            let scores = rows.take(next.len()).map(|(finite, drawn)| {
                let mut logprobs = drawn.filter(|_| finite)?.1?;
                logprobs.top.truncate(*top as usize);
                Some(logprobs)
            });
            scores.collect::<Option<Vec<_>>>().map_or(SpanResult::NotFinite, SpanResult::Scores)
        }
    }
}
