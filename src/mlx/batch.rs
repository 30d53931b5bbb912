//! A step as a model's forward sees it: every span's tokens on one axis, and the place of each token's KV
//! cache, laid out as the model's attention takes it (`Layout`). Tokens that decode in one slab form a
//! *group*, so that a layer writes their keys and values with one update and attends with one launch; longer
//! spans are *chunks*, which attend one by one.

use std::collections::BTreeSet;

use mlx_rs::Array;

use crate::backend::{Span, Step};
use crate::mlx::dim;
use crate::mlx::ffi::AttentionSpan;

/// How a model takes its steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepShape {
    /// Layout for its attention.
    pub(crate) attention: Wanted,
    /// Whether some layers are recurrent.
    pub(crate) recurrent: bool,
}

/// The layout that a kernel set's attention takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// [`Layout::Spans`].
    Spans,
    /// [`Layout::Grouped`].
    Grouped {
        /// Distinct windows of the layers, in tokens.
        windows: Vec<i32>,
        /// Whether groups need [`Places`]; then they need no masks.
        places: bool,
        /// Heads of groups' masks: 1, or all those of queries, for a device that would copy a mask of one in
        /// each layer.
        mask_heads: i32,
    },
}

/// The tokens of one step, packed.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Token ids `[tokens]`, int32.
    pub(crate) tokens: Array,
    /// Position of each token in its sequence.
    pub(crate) positions: Vec<i32>,
    /// Slabs with tokens of the step.
    pub(crate) slabs: Vec<u32>,
    pub(crate) layout: Layout,
    /// Rows that a recurrent layer runs together, in order; empty if no layer is recurrent.
    pub(crate) runs: Vec<Run>,
    /// The rows whose logits are wanted; None if no row is.
    pub(crate) outputs: Option<OutputRows>,
}

/// Rows whose logits are wanted. One that several choices begin with is wanted several times.
#[derive(Debug)]
pub(crate) enum OutputRows {
    /// Each row once, in order.
    All,
    /// These `[rows]`, int32.
    Rows(Array),
}

/// The places of a step's tokens, for attention.
#[derive(Debug)]
pub(crate) enum Layout {
    /// All spans, with their slabs by place in [`Batch::slabs`], for one operation of ours.
    Spans(Vec<AttentionSpan>),
    /// Groups and chunks, for operations of MLX.
    Grouped(Grouped),
}

/// Spans by the way they attend.
#[derive(Debug)]
pub(crate) struct Grouped {
    /// Distinct windows of the layers, in tokens; views are in this order.
    pub(crate) windows: Vec<i32>,
    /// One group per slab with decoding sequences.
    pub(crate) groups: Vec<Group>,
    /// Spans of more than one token.
    pub(crate) chunks: Vec<Chunk>,
}

/// Sequences of one slab that decode one token each.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) slab: u32,
    /// First of its rows in the packed tokens.
    pub(crate) row: i32,
    /// Number of its rows.
    pub(crate) rows: i32,
    /// Where the keys and values go.
    pub(crate) write: GroupWrite,
    /// Slots from the slab's front that the launch covers.
    pub(crate) slots: i32,
    /// Positions from the front that the launch covers.
    pub(crate) length: i32,
    /// Attended positions, for each of the windows.
    pub(crate) views: Vec<View>,
    /// For slots that are covered but do not decode: the row that stands in for each slot, and the slot of
    /// each row's output. None when rows and slots are the same.
    pub(crate) spread: Option<(Array, Array)>,
    /// Slots and positions for our own attention on CUDA, where it is used.
    pub(crate) places: Option<Places>,
}

/// Where the rows of a group have their keys and values: int32 `[rows]`.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    pub(crate) slots: Array,
    pub(crate) positions: Array,
    /// One more than the largest position.
    pub(crate) length: i32,
}

/// The positions that queries attend to in their slots.
#[derive(Debug)]
pub(crate) struct View {
    /// First position that any of them attends to.
    pub(crate) from: i32,
    /// Which of the positions from there on each attends to, bool: `[slots, mask_heads, 1, positions]` for a
    /// group, `[rows, positions]` for a chunk. None if a group attends to all, or a chunk to what comes
    /// before each of its rows.
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
    pub(crate) slab: u32,
    pub(crate) slot: i32,
    /// First of its rows in the packed tokens.
    pub(crate) row: i32,
    /// Number of its rows.
    pub(crate) rows: i32,
    /// Position of the first one.
    pub(crate) start: i32,
    /// Attended positions, for each of the windows.
    pub(crate) views: Vec<View>,
}

/// Rows that a recurrent layer runs together.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) slab: u32,
    /// First row in the packed tokens, and number of rows.
    pub(crate) row: i32,
    pub(crate) rows: i32,
    pub(crate) sequences: RunSequences,
}

/// The sequences of a [`Run`].
#[derive(Debug)]
pub(crate) enum RunSequences {
    /// Many, one token each: their slots `[rows]`, int32.
    Decoding(Array),
    /// One, by its slot.
    One(i32),
}

fn ints(values: &[i32]) -> Array {
    Array::from_slice(values, &[dim(values.len())])
}

impl Group {
    /// Returns the group of `spans`, all of one token, one slab, and in the order of their slots.
    fn new(spans: &[Placed<'_>], windows: &[i32], with_places: bool, mask_heads: i32) -> Self {
        let slots: Vec<i32> = spans.iter().map(|placed| dim(placed.span.slot.slot)).collect();
        let positions: Vec<i32> = spans.iter().map(|placed| dim(placed.span.start)).collect();
        let covered = slots.last().copied().unwrap_or(0) + 1;
        let length = positions.iter().copied().max().unwrap_or(0) + 1;
        let write = match (slots.as_slice(), positions.as_slice()) {
            (&[slot], &[position]) => GroupWrite::One(slot, position),
            _ => GroupWrite::Many(ints(&slots), ints(&positions)),
        };
        let dense = dim(slots.len()) == covered;
        let spread = (!dense && !with_places).then(|| {
            let mut stand_in = vec![0; usize::try_from(covered).unwrap_or(0)];
            for (row, &slot) in slots.iter().enumerate() {
                stand_in[usize::try_from(slot).unwrap_or(0)] = dim(row);
            }
            (ints(&stand_in), ints(&slots))
        });
        let places = with_places.then(|| Places { slots: ints(&slots), positions: ints(&positions), length });
        // Places say what each row attends to.
        let same = with_places || dense && positions.iter().all(|&position| position + 1 == length);
        // The last position of each slot; None for one that does not decode.
        let mut last = vec![None; usize::try_from(covered).unwrap_or(0)];
        for (&slot, &position) in slots.iter().zip(&positions) {
            last[usize::try_from(slot).unwrap_or(0)] = Some(position);
        }
        let views = windows
            .iter()
            .map(|&window| View::of_group(&last, length, window, (!same).then_some(mask_heads)));
        let (slab, row, rows) = (spans[0].span.slot.slab, spans[0].row, dim(spans.len()));
        Self { slab, row, rows, write, slots: covered, length, views: views.collect(), spread, places }
    }
}

/// Whether a token at `position` attends to another one.
fn attends(position: i32, other: i32, window: i32) -> bool {
    other <= position && (window == 0 || other > position - window)
}

/// Returns the first position that one at `position` attends to.
fn first_attended(position: i32, window: i32) -> i32 {
    if window == 0 { 0 } else { (position + 1 - window).max(0) }
}

impl View {
    /// Each slot attends to the positions up to its own; one that does not decode to one, so that no row is
    /// empty. Without heads there is no mask.
    fn of_group(last: &[Option<i32>], length: i32, window: i32, mask_heads: Option<i32>) -> Self {
        let from = last.iter().flatten().map(|&last| first_attended(last, window)).min().unwrap_or(0);
        let of_slot = |last: &Option<i32>| {
            let attended = |other| last.map_or(other == from, |last| attends(last, other, window));
            (from..length).map(attended).collect::<Vec<bool>>()
        };
        let mask = mask_heads.map(|heads| {
            let repeat = usize::try_from(heads).unwrap_or(1);
            let attended: Vec<bool> = last.iter().flat_map(|last| of_slot(last).repeat(repeat)).collect();
            Array::from_slice(&attended, &[dim(last.len()), heads, 1, length - from])
        });
        Self { from, mask }
    }

    /// Rows from position `start` on.
    fn of_chunk(start: i32, rows: i32, window: i32) -> Self {
        let (from, end) = (first_attended(start, window), start + rows);
        let mask = (window != 0 && end > window).then(|| {
            let attended =
                (start..end).flat_map(|row| (from..end).map(move |other| attends(row, other, window)));
            Array::from_slice(&attended.collect::<Vec<bool>>(), &[rows, end - from])
        });
        Self { from, mask }
    }
}

impl Chunk {
    fn new(placed: Placed<'_>, windows: &[i32]) -> Self {
        let (Placed { row, span }, rows, start) = (placed, placed.rows(), dim(placed.span.start));
        let views = windows.iter().map(|&window| View::of_chunk(start, rows, window)).collect();
        Self { slab: span.slot.slab, slot: dim(span.slot.slot), row, rows, start, views }
    }
}

/// A span with the first of its rows in the packed tokens.
#[derive(Clone, Copy)]
struct Placed<'a> {
    row: i32,
    span: &'a Span,
}

impl Placed<'_> {
    fn rows(&self) -> i32 {
        dim(self.span.tokens.len())
    }
}

/// Returns the spans of a step with their rows.
fn placed(step: &Step) -> Vec<Placed<'_>> {
    let place = |next: &mut i32, span| {
        let placed = Placed { row: *next, span };
        *next += placed.rows();
        Some(placed)
    };
    step.spans.iter().scan(0, place).collect()
}

/// Returns the groups of decoding spans, and the longer spans.
fn by_slab<'s, 'a>(placed: &'s [Placed<'a>]) -> (impl Iterator<Item = &'s [Placed<'a>]>, &'s [Placed<'a>]) {
    let (single, longer) = placed.split_at(placed.partition_point(|placed| placed.rows() == 1));
    (single.chunk_by(|a, b| a.span.slot.slab == b.span.slot.slab), longer)
}

impl Layout {
    fn new(all: &[Placed<'_>], slabs: &[u32], wanted: &Wanted) -> Self {
        match wanted {
            Wanted::Spans => {
                let span = |placed: &Placed<'_>| AttentionSpan {
                    slab: dim(slabs.partition_point(|&slab| slab < placed.span.slot.slab)),
                    slot: dim(placed.span.slot.slot),
                    row: placed.row,
                    rows: placed.rows(),
                    start: dim(placed.span.start),
                };
                Self::Spans(all.iter().map(span).collect())
            }
            Wanted::Grouped { windows, places, mask_heads } => {
                let (groups, chunks) = by_slab(all);
                let groups = groups.map(|group| Group::new(group, windows, *places, *mask_heads));
                let chunks = chunks.iter().map(|chunk| Chunk::new(*chunk, windows));
                Self::Grouped(Grouped {
                    windows: windows.clone(),
                    groups: groups.collect(),
                    chunks: chunks.collect(),
                })
            }
        }
    }
}

/// Returns the runs of a step: the decoding sequences of each slab together, and each longer span by itself.
fn runs(all: &[Placed<'_>]) -> Vec<Run> {
    let (groups, chunks) = by_slab(all);
    let groups = groups.map(|group| {
        let slots: Vec<i32> = group.iter().map(|placed| dim(placed.span.slot.slot)).collect();
        let sequences = RunSequences::Decoding(ints(&slots));
        Run { slab: group[0].span.slot.slab, row: group[0].row, rows: dim(group.len()), sequences }
    });
    let chunks = chunks.iter().map(|chunk| {
        let sequences = RunSequences::One(dim(chunk.span.slot.slot));
        Run { slab: chunk.span.slot.slab, row: chunk.row, rows: chunk.rows(), sequences }
    });
    groups.chain(chunks).collect()
}

impl Batch {
    /// Packs a step. Its spans of one token come first, in the order of their slots.
    pub(crate) fn new(step: &Step, shape: &StepShape) -> Self {
        let slabs: BTreeSet<u32> = step.spans.iter().map(|span| span.slot.slab).collect();
        let slabs: Vec<u32> = slabs.into_iter().collect();
        let (mut tokens, mut positions, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
        let all = placed(step);
        for &Placed { row, span } in &all {
            outputs.extend(span.outputs.iter().map(|output| row + dim(output.row)));
            tokens.extend(span.tokens.iter().map(|&token| dim(token)));
            positions.extend((0..dim(span.tokens.len())).map(|offset| dim(span.start) + offset));
        }
        Self {
            tokens: ints(&tokens),
            positions,
            layout: Layout::new(&all, &slabs, &shape.attention),
            slabs,
            runs: if shape.recurrent { runs(&all) } else { Vec::new() },
            outputs: (!outputs.is_empty()).then(|| {
                let is_all = outputs.iter().copied().eq(0..dim(tokens.len()));
                if is_all { OutputRows::All } else { OutputRows::Rows(ints(&outputs)) }
            }),
        }
    }
}
