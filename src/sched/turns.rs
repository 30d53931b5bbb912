//! Decoding in turns, where not all rows fit in a step: which rows are in every step, and in which order the
//! others follow. A row is what decodes, or the last token of a prompt.
//!
//! Of the highest priority class, every connection has an equal number of rows in each step, or every
//! principal if there are several: names, connections and the number of requests buy no more than that. All
//! other rows follow by rotation, so that each moves on.

use std::collections::BTreeMap;
use std::time::Duration;

use super::allowance::{FREE_PART, Measure};
use super::owner::{CIRCLES, Circle, Owner};
use super::pace::Pace;
use super::runnable::Runnable;

/// Turns of a class for each turn of the next lower one.
const TURNS_PER_LOWER_CLASS: u64 = 2;

/// Returns the largest number up to `to` that fits, where all below one that fits do; `from` fits in any
/// case.
pub(super) fn most(from: u32, to: u32, fits: impl Fn(u32) -> bool) -> u32 {
    let (mut most, mut above) = (from, to.saturating_add(1).max(from + 1));
    while above - most > 1 {
        let middle = most + (above - most) / 2;
        if fits(middle) { most = middle } else { above = middle }
    }
    most
}

/// Part of a measure by which it may have been too small: it is of the tick before.
const MEASURE_DOUBT: u32 = 4;

/// How many rows there are, and whose.
#[derive(Clone, Debug)]
pub(super) struct Division {
    /// The highest class.
    pub(super) class: u32,
    /// Number of rows of all classes.
    pub(super) all: u32,
    /// What each principal has of the highest class, or each connection if there is one principal.
    counts: BTreeMap<Circle, Count>,
    depth: usize,
}

/// What a circle has of the highest class.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    rows: u32,
    /// Rows, and prompts, which are to become rows: who has many of those is not one who has little.
    running: u32,
}

impl Division {
    /// Counts rows, and prompts of those who have rows; None if there are no rows.
    pub(super) fn new(rows: &[&Runnable<'_>], prompts: &[&Runnable<'_>]) -> Option<Self> {
        let class = rows.iter().map(|row| row.priority).min()?;
        let highest = || rows.iter().filter(|row| row.priority == class).map(|row| row.owner);
        let first = highest().next()?;
        let depth = usize::from(highest().all(|owner| owner.principal == first.principal));
        let mut counts: BTreeMap<Circle, Count> = BTreeMap::new();
        for owner in highest() {
            let count = counts.entry(owner.circle(depth)).or_default();
            (count.rows, count.running) = (count.rows + 1, count.running + 1);
        }
        // By itself it is measured by its rows: they are what its prompts must not slow down.
        let is_alone = counts.len() == 1;
        for prompt in prompts.iter().filter(|prompt| prompt.priority <= class && !is_alone) {
            counts.get_mut(&prompt.owner.circle(depth)).into_iter().for_each(|count| count.running += 1);
        }
        Some(Self { class, all: u32::try_from(rows.len()).unwrap_or(u32::MAX), counts, depth })
    }

    /// Returns what whoever has least has.
    fn fewest(&self) -> u32 {
        self.counts.values().map(|count| count.running).min().unwrap_or(0)
    }

    /// Returns the number of rows if everybody has at most `level`.
    pub(super) fn within(&self, level: u32) -> u32 {
        self.counts.values().map(|count| count.rows.min(level)).sum()
    }

    /// Returns the most rows that everybody may have in every step: as many as whoever has fewest, or as many
    /// as take no longer than the measure if that is less, or hardly longer than one; and more as far as that
    /// one is not slowed down to more than `stretch_percent`, unless another model has rows of the class.
    pub(super) fn level(&self, pace: &Pace, measure: Measure, stretch_percent: u32) -> u32 {
        let largest = self.counts.values().map(|count| count.rows).max().unwrap_or(0);
        let takes = |rows: u32, time: Duration| pace.step(rows).is_none_or(|step| step <= time);
        let about = measure.time.saturating_add(measure.time / MEASURE_DOUBT);
        let one = pace.step(1).unwrap_or_default();
        let about = about.max(one + one / FREE_PART);
        let fewest = most(1, self.fewest(), |rows| takes(rows, about));
        let Some(alone) = pace.step(fewest) else { return largest };
        if measure.models > 1 {
            return fewest;
        }
        // Without another tick before, it is as much as this one's.
        let alone = if measure.models == 0 { alone } else { alone.max(measure.time) };
        let limit = alone.saturating_mul(stretch_percent) / 100;
        most(fewest.min(largest), largest, |level| takes(self.within(level), limit))
    }

    /// Returns the circles whose rows wait where prompts have their turn and little time is left for them:
    /// the one that the first prompt is of, and those that have more than `level`. Nobody yields to nobody.
    pub(super) fn yielding(&self, prompt: &Owner, level: u32, measure: Measure) -> Vec<Circle> {
        let own = prompt.circle(self.depth);
        let yields = |(circle, count): &(&Circle, &Count)| **circle == own || count.rows > level;
        let yielding: Vec<Circle> =
            self.counts.iter().filter(yields).map(|(circle, _)| circle.clone()).collect();
        if yielding.len() < self.counts.len() || measure.models > 1 { yielding } else { Vec::new() }
    }

    /// Returns the number of rows if everybody has at most `level`, and these have none.
    pub(super) fn within_but(&self, level: u32, yielding: &[Circle]) -> u32 {
        let others = self.counts.iter().filter(|(circle, _)| !yielding.contains(circle));
        others.map(|(_, count)| count.rows.min(level)).sum()
    }

    /// Returns the least time that what each circle of the highest class has would take by itself, all of it
    /// rows.
    pub(super) fn alone(&self, pace: &Pace) -> BTreeMap<Circle, Duration> {
        let alone = |(circle, count): (&Circle, &Count)| Some((circle.clone(), pace.step(count.running)?));
        self.counts.iter().filter_map(alone).collect()
    }
}

/// Who was served when.
#[derive(Clone, Debug, Default)]
pub struct Turns {
    /// Rows served and newcomers until now.
    number: u64,
    /// When each circle had its last row in a step, by class: the number of that row.
    circles: BTreeMap<(u32, Circle), u64>,
    /// The same of each sequence.
    sequences: BTreeMap<u64, u64>,
    /// Turns of each class with rows that are not in every step, weighted: the one with the least is next.
    classes: BTreeMap<u32, u64>,
}

/// Rows in the order in which a step takes them.
pub(super) struct Order<'a, 'b> {
    /// Those that are in every step.
    pub(super) always: Vec<&'b Runnable<'a>>,
    /// All others.
    pub(super) others: Vec<&'b Runnable<'a>>,
}

impl Turns {
    /// Returns all rows in their order. Of the highest class each circle has up to `level` in every step, but
    /// for those that are `yielding`.
    pub(super) fn order<'a, 'b>(
        &mut self,
        rows: &[&'b Runnable<'a>],
        division: &Division,
        level: u32,
        yielding: &[Circle],
    ) -> Order<'a, 'b> {
        self.meet(rows);
        let mut by_class: BTreeMap<u32, Vec<&'b Runnable<'a>>> = BTreeMap::new();
        rows.iter().for_each(|row| by_class.entry(row.priority).or_default().push(row));
        let mut by_class: BTreeMap<_, _> =
            by_class.into_iter().map(|(class, rows)| (class, self.rotation(class, rows, 0))).collect();
        let highest = by_class.remove(&division.class).unwrap_or_default();
        let (always, excess) = highest.split_at((division.within(level) as usize).min(highest.len()));
        let waits = |row: &&Runnable<'_>| yielding.contains(&row.owner.circle(division.depth));
        let (waiting, always) = always.iter().copied().partition(waits);
        by_class.insert(division.class, excess.to_vec());
        by_class.retain(|_, rows| !rows.is_empty());
        self.classes.retain(|class, _| by_class.contains_key(class));
        let least = self.classes.values().copied().min().unwrap_or(0);
        for class in by_class.keys() {
            self.classes.entry(*class).or_insert(least);
        }
        let mut others: Vec<_> = waiting;
        others.extend(merged(by_class, self.classes.clone()));
        Order { always, others }
    }

    /// Notes the rows that a step takes, in their order.
    pub(super) fn take(&mut self, order: &Order<'_, '_>, others: usize) {
        let others = &order.others[..others.min(order.others.len())];
        for row in order.always.iter().chain(others) {
            self.number += 1;
            for circle in row.owner.circles() {
                self.circles.insert((row.priority, circle), self.number);
            }
            self.sequences.insert(row.sequence, self.number);
        }
        for row in others {
            let turn = self.classes.get_mut(&row.priority);
            turn.into_iter().for_each(|turn| *turn += weight(row.priority));
        }
    }

    /// Lets newcomers begin behind all others, and forgets who is gone.
    fn meet(&mut self, rows: &[&Runnable<'_>]) {
        let (mut circles, mut sequences) = (BTreeMap::new(), BTreeMap::new());
        for row in rows {
            self.number += 1;
            let number = self.number;
            sequences.insert(row.sequence, *self.sequences.get(&row.sequence).unwrap_or(&number));
            for circle in row.owner.circles() {
                let key = (row.priority, circle);
                let last = *self.circles.get(&key).unwrap_or(&number);
                circles.entry(key).or_insert(last);
            }
        }
        (self.circles, self.sequences) = (circles, sequences);
    }

    /// Returns rows of a class so that the circles of this depth take turns, each row by row, and whose last
    /// row is the longest ago goes first.
    fn rotation<'a, 'b>(
        &self,
        class: u32,
        mut rows: Vec<&'b Runnable<'a>>,
        depth: usize,
    ) -> Vec<&'b Runnable<'a>> {
        if depth == CIRCLES {
            rows.sort_by_key(|row| self.sequences.get(&row.sequence));
            return rows;
        }
        let mut groups: BTreeMap<Circle, Vec<&'b Runnable<'a>>> = BTreeMap::new();
        rows.into_iter().for_each(|row| groups.entry(row.owner.circle(depth)).or_default().push(row));
        let mut rows: Vec<_> = groups
            .into_iter()
            .flat_map(|(circle, rows)| {
                let last = self.circles.get(&(class, circle)).copied();
                let rows = self.rotation(class, rows, depth + 1);
                rows.into_iter().enumerate().map(move |(round, row)| ((round, last), row))
            })
            .collect();
        rows.sort_by_key(|(place, _)| *place);
        rows.into_iter().map(|(_, row)| row).collect()
    }
}

/// Returns what a turn of a class counts.
fn weight(class: u32) -> u64 {
    TURNS_PER_LOWER_CLASS.saturating_pow(class)
}

/// Merges the rows of classes: the next is of the class that has had the least.
fn merged<'a, 'b>(
    by_class: BTreeMap<u32, Vec<&'b Runnable<'a>>>,
    mut turns: BTreeMap<u32, u64>,
) -> Vec<&'b Runnable<'a>> {
    let mut left: BTreeMap<u32, _> =
        by_class.into_iter().map(|(class, rows)| (class, rows.into_iter().peekable())).collect();
    let mut merged = Vec::new();
    while let Some((&class, rows)) =
        left.iter_mut().min_by_key(|(class, _)| (turns.get(class).copied(), **class))
    {
        merged.extend(rows.next());
        *turns.entry(class).or_insert(0) += weight(class);
        left.retain(|_, rows| rows.peek().is_some());
    }
    merged
}
