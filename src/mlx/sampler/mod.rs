//! From logits to tokens, for all rows of a step together: bias and penalties, filters (`filter`), then a
//! draw. A token is drawn by inverting the cumulative distribution at a number that the host gives, so that a
//! row's token does not depend on its neighbours.
//!
//! Rows are grouped by the number of logits that must be sorted: none (greedy, or no filter but min_p), or
//! the candidates that can matter, which are cut out first; and by whether typical_p filters them before.
//! The size of top_p's nucleus, or of typical_p's set, is known only afterwards: the rare row with too few
//! candidates is drawn once more, from all tokens, when the step is read.

mod filter;

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::{TryIndexOp, argmax_axis};
use mlx_rs::transforms::eval;
use mlx_rs::{Array, Dtype, ops};

use crate::backend::{Allow, RowOutput, RowResult, Sample, Step, TokenLogprobs, TokenSet, Want, Xtc};
use crate::mlx::dim;
use filter::{draw_free, draw_sorted, keep_typical, largest};

/// Most candidates that are cut out before they are sorted; with more, sorting everything costs no more. Also
/// the candidates of top_p, and of typical_p, at first: a confident model's nucleus has tens of tokens.
const CUT_MAX: u32 = 1024;

/// Temperature below which the most likely token is taken: any other one has no probability in single
/// precision, and a quotient by less would not be finite.
const TEMPERATURE_MIN: f32 = 1e-30;

/// Tokens and log-probabilities of a step that is being computed.
#[derive(Debug)]
pub(crate) struct Drawn {
    /// Whether the logits of each row are finite, biases and penalties included, `[rows]`, bool.
    finite: Array,
    groups: Vec<GroupDrawn>,
}

/// Rows that are drawn by one method.
#[derive(Debug)]
struct GroupDrawn {
    /// Indices of the rows.
    rows: Vec<usize>,
    /// Drawn tokens `[rows]`, int32.
    tokens: Array,
    logprobs: Option<LogprobArrays>,
    check: Option<CandidateCheck>,
}

/// Rows that may have too few candidates.
#[derive(Debug)]
struct CandidateCheck {
    /// Whether they were enough, `[rows]`, bool.
    enough: Array,
    /// Logits of the group `[rows, vocabulary]`, raw and edited.
    raw: Array,
    edited: Array,
}

/// Raw log-probabilities of a group.
#[derive(Debug)]
struct LogprobArrays {
    /// Log-probabilities of the chosen tokens, `[rows]`.
    chosen: Array,
    /// Ids and values of the `top` most likely tokens, best first, `[rows, top]`.
    top: Option<(Array, Array, usize)>,
}

/// How a row's token is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum DrawMethod {
    /// It is given.
    Given,
    Greedy,
    /// Drawn from all tokens that min_p and XTC leave.
    Free,
    /// Drawn from this number of largest logits.
    Sorted(u32),
}

/// What is done with the rows of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Way {
    method: DrawMethod,
    /// Whether they are drawn from what typical_p leaves.
    is_typical: bool,
    /// Most candidates that are cut out before they are sorted.
    cut_max: u32,
}

/// One row of logits, and the request for it.
struct Row<'a> {
    way: Way,
    sample: Option<&'a Sample>,
    given: u32,
    top: Option<u32>,
}

impl Row<'_> {
    /// Returns the tokens that it is drawn from; None is all.
    fn mask(&self) -> Option<&TokenSet> {
        match &self.sample?.allow {
            Allow::These(tokens) => Some(tokens),
            Allow::All | Allow::Awaited => None,
        }
    }
}

impl Way {
    fn of(sample: &Sample, vocabulary: u32) -> Self {
        let method = method(sample, vocabulary);
        let is_typical = sample.typical_p < 1.0 && method != DrawMethod::Greedy;
        Self { method, is_typical, cut_max: CUT_MAX.min(vocabulary) }
    }

    fn given(vocabulary: u32) -> Self {
        Self { method: DrawMethod::Given, is_typical: false, cut_max: CUT_MAX.min(vocabulary) }
    }

    /// Returns the way for rows that had too few candidates: they get all tokens.
    fn among_all(self, vocabulary: u32) -> Self {
        let method = match self.method {
            DrawMethod::Sorted(_) => DrawMethod::Sorted(vocabulary),
            method @ (DrawMethod::Given | DrawMethod::Greedy | DrawMethod::Free) => method,
        };
        Self { method, cut_max: vocabulary, ..self }
    }
}

fn method(sample: &Sample, vocabulary: u32) -> DrawMethod {
    let candidates = if sample.temperature < TEMPERATURE_MIN {
        return DrawMethod::Greedy;
    } else if wants_nucleus(sample) {
        CUT_MAX
    } else if sample.top_k > 0 {
        sample.top_k.saturating_add(xtc_removes_at_most(sample.xtc.as_ref()))
    } else {
        return DrawMethod::Free;
    };
    let cut = candidates.checked_next_power_of_two().filter(|&cut| cut <= CUT_MAX.min(vocabulary));
    DrawMethod::Sorted(cut.unwrap_or(vocabulary))
}

/// Whether the whole nucleus of top_p must be known: nothing else bounds it, or XTC needs its mass.
fn wants_nucleus(sample: &Sample) -> bool {
    sample.top_p < 1.0 && (sample.top_k == 0 || sample.xtc.is_some())
}

/// Returns the most tokens that XTC can remove: those with at least its threshold's probability. top_k counts
/// without them.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates, as is wanted")]
fn xtc_removes_at_most(xtc: Option<&Xtc>) -> u32 {
    xtc.map_or(0, |xtc| xtc.threshold.recip().ceil() as u32)
}

/// Returns the rows of a step, in the order of their logits.
fn rows(step: &Step, vocabulary: u32) -> Vec<Row<'_>> {
    outputs(step)
        .map(|want| match want {
            Want::Sample(sample) => Row {
                way: Way::of(sample, vocabulary),
                sample: Some(sample),
                given: 0,
                top: sample.top_logprobs,
            },
            Want::Score { next, top } => {
                Row { way: Way::given(vocabulary), sample: None, given: *next, top: Some(*top) }
            }
        })
        .collect()
}

/// Returns what the rows of a step return, in the order of their logits.
fn outputs(step: &Step) -> impl Iterator<Item = &Want> {
    step.spans.iter().flat_map(|span| &span.outputs).map(|RowOutput { want, .. }| want)
}

/// Draws one of the first `vocabulary` tokens for every row of `logits` `[rows, at least vocabulary]`.
pub(crate) fn draw(step: &Step, logits: &Array, vocabulary: i32) -> Result<Drawn> {
    let logits = if vocabulary < logits.dim(1) {
        &logits.try_index((.., ..vocabulary))?.as_dtype(Dtype::Float32)?
    } else {
        &logits.as_dtype(Dtype::Float32)?
    };
    let rows = rows(step, logits.dim(1).unsigned_abs());
    let edited = edit(logits, &rows)?;
    let finite = edited.sum_axis(-1, None)?.is_finite()?;
    // Rows with a mask are apart: the others have no array for it.
    let kind = |row: &Row<'_>| (row.way, row.mask().is_some());
    let mut kinds: Vec<(Way, bool)> = rows.iter().map(kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let groups = kinds.into_iter().map(|(way, is_masked)| {
        let members: Vec<usize> =
            (0..rows.len()).filter(|&row| kind(&rows[row]) == (way, is_masked)).collect();
        let group: Vec<&Row<'_>> = members.iter().map(|&row| &rows[row]).collect();
        let (raw, edited) = (select(logits, &members)?, select(&edited, &members)?);
        let edited = if is_masked { masked(&group, &edited)? } else { edited };
        let (tokens, enough) = draw_group(way, &group, &edited)?;
        let logprobs = group_logprobs(&group, &raw, &tokens)?;
        let check = enough.map(|enough| CandidateCheck { enough, raw, edited });
        Ok(GroupDrawn { rows: members, tokens, logprobs, check })
    });
    let groups = groups.collect::<Result<Vec<_>>>()?;
    Ok(Drawn { finite, groups })
}

/// Returns some rows of `logits`.
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

/// The bits of every byte, lowest first.
const BITS: [[bool; 8]; 256] = {
    let mut bits = [[false; 8]; 256];
    let mut place = 0;
    while place < 256 * 8 {
        bits[place / 8][place % 8] = (place / 8) >> (place % 8) & 1 == 1;
        place += 1;
    }
    bits
};

/// Returns the logits of a group, without those of tokens that its rows may not draw.
fn masked(group: &[&Row<'_>], logits: &Array) -> Result<Array> {
    let vocabulary = logits.dim(1).unsigned_abs() as usize;
    let mut kept: Vec<bool> = Vec::with_capacity((group.len() + 1) * vocabulary);
    for (row, end) in group.iter().zip(1..) {
        let words = row.mask().map_or(&[][..], |mask| mask);
        for byte in words.iter().flat_map(|word| word.to_le_bytes()) {
            kept.extend_from_slice(&BITS[usize::from(byte)]);
        }
        kept.resize(end * vocabulary, false);
    }
    let kept = Array::from_slice(&kept, logits.shape());
    ops::select(kept, logits, Array::from_f32(f32::NEG_INFINITY))
}

/// Returns ids `[rows]`, and whether there were enough candidates, where that is not certain.
fn draw_group(way: Way, group: &[&Row<'_>], logits: &Array) -> Result<(Array, Option<Array>)> {
    if !way.is_typical {
        return draw_by(way.method, group, logits);
    }
    let (logits, near) = keep_typical(group, logits, dim(way.cut_max))?;
    let (ids, enough) = draw_by(way.method, group, &logits)?;
    if dim(way.cut_max) == logits.dim(1) {
        return Ok((ids, enough));
    }
    let enough = enough.map_or_else(|| Ok(near.clone()), |enough| enough.logical_and(&near))?;
    Ok((ids, Some(enough)))
}

fn draw_by(method: DrawMethod, group: &[&Row<'_>], logits: &Array) -> Result<(Array, Option<Array>)> {
    match method {
        DrawMethod::Given => {
            let given: Vec<i32> = group.iter().map(|row| dim(row.given)).collect();
            Ok((Array::from_slice(&given, &[dim(given.len())]), None))
        }
        DrawMethod::Greedy => Ok((argmax_axis(logits, -1, None)?.as_dtype(Dtype::Int32)?, None)),
        DrawMethod::Free => Ok((draw_free(group, logits)?, None)),
        DrawMethod::Sorted(candidates) => {
            let (ids, enough) = draw_sorted(group, logits, dim(candidates))?;
            let wants = |row: &&Row<'_>| row.sample.is_some_and(wants_nucleus);
            let in_doubt = dim(candidates) < logits.dim(1) && group.iter().any(wants);
            Ok((ids, in_doubt.then_some(enough)))
        }
    }
}

fn group_logprobs(group: &[&Row<'_>], logits: &Array, tokens: &Array) -> Result<Option<LogprobArrays>> {
    let top = group.iter().filter_map(|row| row.top).max();
    top.map(|top| logprobs(logits, tokens, top)).transpose()
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

impl GroupDrawn {
    /// Returns the arrays that are read of it.
    fn arrays(&self) -> impl Iterator<Item = &Array> {
        let logprobs = self.logprobs.iter().flat_map(|logprobs| {
            let top = logprobs.top.iter().flat_map(|(ids, values, _)| [ids, values]);
            std::iter::once(&logprobs.chosen).chain(top)
        });
        let enough = self.check.iter().map(|check| &check.enough);
        std::iter::once(&self.tokens).chain(logprobs).chain(enough)
    }
}

impl Drawn {
    /// Returns every array that [`Drawn::read`] reads; all are outputs of the step.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        std::iter::once(&self.finite).chain(self.groups.iter().flat_map(GroupDrawn::arrays)).collect()
    }

    /// Waits for the step, and returns one result for each of its rows with an output.
    pub(crate) fn read(&self, step: &Step) -> std::result::Result<Vec<RowResult>, String> {
        let text = |error: mlx_rs::error::ConversionError| error.to_string();
        let finite = self.finite.to_vec_exact::<bool>().map_err(text)?;
        let mut rows: Vec<Option<(u32, Option<TokenLogprobs>)>> = vec![None; finite.len()];
        for group in self.groups.iter().chain(&self.redraw(step, &finite)?) {
            let tokens = group.tokens.to_vec_exact::<i32>().map_err(text)?;
            let logprobs =
                group.logprobs.as_ref().map(|logprobs| logprobs.read(&tokens)).transpose().map_err(text)?;
            for (index, &row) in group.rows.iter().enumerate() {
                let logprobs = logprobs.as_ref().map(|logprobs| logprobs[index].clone());
                rows[row] = Some((tokens[index].unsigned_abs(), logprobs));
            }
        }
        let rows = finite.into_iter().zip(rows).map(|(finite, drawn)| drawn.filter(|_| finite));
        Ok(outputs(step).zip(rows).map(|(want, drawn)| result(want, drawn)).collect())
    }

    /// Draws rows with too few candidates once more, from all tokens.
    fn redraw(&self, step: &Step, finite: &[bool]) -> std::result::Result<Vec<GroupDrawn>, String> {
        let mut redrawn = Vec::new();
        for group in &self.groups {
            let Some(CandidateCheck { enough, raw, edited }) = &group.check else { continue };
            let enough = enough.to_vec_exact::<bool>().map_err(|error| error.to_string())?;
            let vocabulary = raw.dim(1).unsigned_abs();
            let all = rows(step, vocabulary);
            let too_few = |&(place, &row): &(usize, &usize)| !enough[place] && finite[row];
            let (places, members): (Vec<usize>, Vec<usize>) =
                group.rows.iter().enumerate().filter(too_few).unzip();
            if members.is_empty() {
                continue;
            }
            let subset: Vec<&Row<'_>> = members.iter().map(|&row| &all[row]).collect();
            let draw = || {
                let raw = select(raw, &places)?;
                let way = subset[0].way.among_all(vocabulary);
                let (tokens, _) = draw_group(way, &subset, &select(edited, &places)?)?;
                let logprobs = group_logprobs(&subset, &raw, &tokens)?;
                let group = GroupDrawn { rows: members.clone(), tokens, logprobs, check: None };
                eval(group.arrays())?;
                Ok(group)
            };
            redrawn.push(draw().map_err(|error: mlx_rs::error::Exception| error.to_string())?);
        }
        Ok(redrawn)
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

/// Returns a row's result; None is drawn where its logits are not finite.
fn result(want: &Want, drawn: Option<(u32, Option<TokenLogprobs>)>) -> RowResult {
    let cut = |mut logprobs: TokenLogprobs, top: u32| {
        logprobs.top.truncate(top as usize);
        logprobs
    };
    match (want, drawn) {
        (Want::Sample(sample), Some((token, logprobs))) => {
            let logprobs = logprobs.zip(sample.top_logprobs).map(|(logprobs, top)| cut(logprobs, top));
            RowResult::Token(token, logprobs)
        }
        (Want::Score { top, .. }, Some((_, Some(logprobs)))) => RowResult::Score(cut(logprobs, *top)),
        (Want::Sample(_), None) | (Want::Score { .. }, _) => RowResult::NotFinite,
    }
}

#[cfg(test)]
mod tests;
