//! A step as a model's forward sees it: every span's tokens on one axis, and where each token's KV cache
//! is. Tokens that decode in one slab form a *group*, so that a layer writes their keys and values with
//! one update and attends with one launch; longer spans attend one by one.

use std::collections::BTreeSet;

use mlx_rs::Array;

use crate::backend::{Span, SpanOutput, Step};
use crate::mlx::cuda::Places;
use crate::mlx::dim;
use crate::mlx::ffi::AttentionSpan;
use crate::mlx::kv::KvShape;

/// The tokens of one step, packed.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Token ids `[tokens]`, int32.
    pub(crate) tokens: Array,
    /// The position of each token in its sequence.
    pub(crate) positions: Vec<i32>,
    /// The windows of the model's layers, each once.
    pub(crate) windows: Vec<i32>,
    /// Slabs with tokens of the step.
    pub(crate) slabs: Vec<u32>,
    /// All spans, with their slabs by place in `slabs`.
    pub(crate) spans: Vec<AttentionSpan>,
    /// One per slab with decoding sequences. Groups and chunks are empty where everything takes the spans.
    pub(crate) groups: Vec<Group>,
    /// Spans of more than one token.
    pub(crate) chunks: Vec<Chunk>,
    /// Rows `[rows]` whose logits are wanted, int32; None if no row is.
    pub(crate) outputs: Option<Array>,
}

/// Sequences of one slab that decode one token each.
#[derive(Debug)]
pub(crate) struct Group {
    /// The slab.
    pub(crate) slab: u32,
    /// First of its rows in the packed tokens.
    pub(crate) row: i32,
    /// How many rows.
    pub(crate) rows: i32,
    /// Where the keys and values go.
    pub(crate) write: GroupWrite,
    /// The slots `[rows]`, int32.
    pub(crate) slots_in_use: Array,
    /// Slots from the slab's front that the launch covers.
    pub(crate) slots: i32,
    /// Positions from the front that the launch covers.
    pub(crate) length: i32,
    /// What is seen, for each of the batch's windows; none where attention takes the spans.
    pub(crate) views: Vec<View>,
    /// For slots that are covered but do not decode: which row stands in for each slot, and which slot
    /// each row's answer is at. None when rows and slots are the same.
    pub(crate) spread: Option<(Array, Array)>,
    /// Slots and positions for our own attention on CUDA, where it is used.
    pub(crate) places: Option<Places>,
}

/// What queries see of their slots.
#[derive(Debug)]
pub(crate) struct View {
    /// The first position that any of them sees.
    pub(crate) from: i32,
    /// Which of the positions from there on each sees, bool: `[slots, 1, 1, positions]` for a group, `[rows,
    /// positions]` for a chunk. None if a group sees all, or a chunk what comes before each of its rows.
    pub(crate) mask: Option<Array>,
}

/// The places of a group's new keys and values.
#[derive(Debug)]
pub(crate) enum GroupWrite {
    /// One row: slot and position. A slice update, five times faster on the CPU than a scatter of one.
    One(i32, i32),
    /// Slots `[rows]` and positions `[rows]`, int32.
    Many(Array, Array),
}

/// A span of several tokens of one sequence.
#[derive(Debug)]
pub(crate) struct Chunk {
    /// Its slab.
    pub(crate) slab: u32,
    /// Its slot.
    pub(crate) slot: i32,
    /// First of its rows in the packed tokens.
    pub(crate) row: i32,
    /// How many rows.
    pub(crate) rows: i32,
    /// Position of the first one.
    pub(crate) start: i32,
    /// What is seen, for each of the batch's windows.
    pub(crate) views: Vec<View>,
}

fn ints(values: &[i32]) -> Array {
    Array::from_slice(values, &[dim(values.len())])
}

impl Group {
    /// The group of `spans`, all of one token, one slab, and in the order of their slots.
    fn new(spans: &[Span], row: i32, windows: &[i32], on_cuda: bool) -> Self {
        let slots: Vec<i32> = spans.iter().map(|span| dim(span.slot.slot)).collect();
        let positions: Vec<i32> = spans.iter().map(|span| dim(span.start)).collect();
        let covered = slots.last().copied().unwrap_or(0) + 1;
        let length = positions.iter().copied().max().unwrap_or(0) + 1;
        let write = match (slots.as_slice(), positions.as_slice()) {
            (&[slot], &[position]) => GroupWrite::One(slot, position),
            _ => GroupWrite::Many(ints(&slots), ints(&positions)),
        };
        let dense = dim(slots.len()) == covered;
        let spread = (!dense && !on_cuda).then(|| {
            let mut stand_in = vec![0; usize::try_from(covered).unwrap_or(0)];
            for (row, &slot) in slots.iter().enumerate() {
                stand_in[usize::try_from(slot).unwrap_or(0)] = dim(row);
            }
            (ints(&stand_in), ints(&slots))
        });
        let places = on_cuda.then(|| Places { slots: ints(&slots), positions: ints(&positions), length });
        // Places say what each row sees.
        let same = on_cuda || dense && positions.iter().all(|&position| position + 1 == length);
        // The last position of each slot; None for one that does not decode.
        let mut last = vec![None; usize::try_from(covered).unwrap_or(0)];
        for (&slot, &position) in slots.iter().zip(&positions) {
            last[usize::try_from(slot).unwrap_or(0)] = Some(position);
        }
        let views = windows.iter().map(|&window| View::of_group(&last, length, window, same));
        Self {
            slab: spans[0].slot.slab,
            row,
            rows: dim(spans.len()),
            write,
            slots_in_use: ints(&slots),
            slots: covered,
            length,
            views: views.collect(),
            spread,
            places,
        }
    }
}

/// Whether a token at `position` sees another one.
fn sees(position: i32, other: i32, window: i32) -> bool {
    other <= position && (window == 0 || other > position - window)
}

/// The first position that one at `position` sees.
fn first_seen(position: i32, window: i32) -> i32 {
    if window == 0 { 0 } else { (position + 1 - window).max(0) }
}

impl View {
    /// Each slot sees the positions up to its own; one that does not decode sees one, so that no row is empty.
    fn of_group(last: &[Option<i32>], length: i32, window: i32, same: bool) -> Self {
        let from = last.iter().flatten().map(|&last| first_seen(last, window)).min().unwrap_or(0);
        let seen = last.iter().flat_map(|last| {
            (from..length).map(move |other| last.map_or(other == from, |last| sees(last, other, window)))
        });
        let mask = (!same).then(|| {
            Array::from_slice(&seen.collect::<Vec<bool>>(), &[dim(last.len()), 1, 1, length - from])
        });
        Self { from, mask }
    }

    /// Rows from position `start` on.
    fn of_chunk(start: i32, rows: i32, window: i32) -> Self {
        let (from, end) = (first_seen(start, window), start + rows);
        let mask = (window != 0 && end > window).then(|| {
            let seen = (start..end).flat_map(|row| (from..end).map(move |other| sees(row, other, window)));
            Array::from_slice(&seen.collect::<Vec<bool>>(), &[rows, end - from])
        });
        Self { from, mask }
    }
}

impl Chunk {
    fn new(span: &Span, row: i32, windows: &[i32]) -> Self {
        let (start, rows) = (dim(span.start), dim(span.tokens.len()));
        let views = windows.iter().map(|&window| View::of_chunk(start, rows, window)).collect();
        Self { slab: span.slot.slab, slot: dim(span.slot.slot), row, rows, start, views }
    }
}

/// The rows of a span whose logits are wanted.
fn output_rows(span: &Span, row: i32) -> std::ops::Range<i32> {
    let end = row + dim(span.tokens.len());
    match &span.output {
        SpanOutput::None => end..end,
        SpanOutput::Sample(_) => end - 1..end,
        SpanOutput::Score { first, next, .. } => row + dim(*first)..row + dim(*first) + dim(next.len()),
    }
}

impl Batch {
    /// Packs a step. Its spans of one token come first, in the order of their slots.
    pub(crate) fn new(step: &Step, shape: &KvShape) -> Self {
        let takes_spans = shape.kernels().is_some();
        let grouped = !takes_spans || shape.is_recurrent();
        let windows: BTreeSet<i32> = shape.token_states().map(|state| state.window).collect();
        let mut windows: Vec<i32> = windows.into_iter().collect();
        if takes_spans {
            windows.clear();
        }
        let slabs: BTreeSet<u32> = step.spans.iter().map(|span| span.slot.slab).collect();
        let slabs: Vec<u32> = slabs.into_iter().collect();
        let mut spans = Vec::new();
        let mut tokens = Vec::new();
        let mut positions = Vec::new();
        let mut chunks = Vec::new();
        let mut outputs = Vec::new();
        for span in &step.spans {
            let row = dim(tokens.len());
            outputs.extend(output_rows(span, row));
            tokens.extend(span.tokens.iter().map(|&token| dim(token)));
            positions.extend((0..dim(span.tokens.len())).map(|offset| dim(span.start) + offset));
            spans.push(AttentionSpan {
                slab: dim(slabs.partition_point(|&slab| slab < span.slot.slab)),
                slot: dim(span.slot.slot),
                row,
                rows: dim(span.tokens.len()),
                start: dim(span.start),
            });
            if span.tokens.len() > 1 && grouped {
                chunks.push(Chunk::new(span, row, &windows));
            }
        }
        let single = if grouped { step.spans.partition_point(|span| span.tokens.len() == 1) } else { 0 };
        let mut groups = Vec::new();
        for spans in step.spans[..single].chunk_by(|a, b| a.slot.slab == b.slot.slab) {
            let row = groups.last().map_or(0, |group: &Group| group.row + group.rows);
            groups.push(Group::new(spans, row, &windows, shape.on_cuda()));
        }
        let outputs = (!outputs.is_empty()).then(|| ints(&outputs));
        Self { tokens: ints(&tokens), positions, windows, slabs, spans, groups, chunks, outputs }
    }
}
