//! What a tick may run, all models together: their steps run on one device, one after another, so a prompt or
//! a row of one model delays the tokens of all.
//!
//! The measure is what whoever has fewest sequences of the highest priority class takes by itself: a tick
//! takes at most `stretch_percent` of that, but never less than what is in every step (`turns`). The rest
//! goes to all other rows and to prompts. Where both do not fit they have it in turn; among prompts the
//! highest class comes first, and within it the models share evenly. What they do not need is there for
//! prompts that begin in the tick.

use std::collections::BTreeMap;
use std::time::Duration;

use super::PaceLimits;
use super::owner::Circle;
use crate::ids::ModelName;

/// Rows that take no more than one part in this many of what is in every step do not wait for prompts.
pub(super) const FREE_PART: u32 = 8;

/// Ticks for which a circle must have decoded to be the measure, and of which its largest number of rows
/// counts: who has just come, or is about to go, does not make others wait for its few tokens.
const MEASURED_TICKS: usize = 3;

/// What one model wants to run in a tick.
#[derive(Clone, Debug, Default)]
pub struct Demand {
    /// Times of its rows; None if it does not decode, or nothing is known yet.
    pub(super) rows: Option<RowTimes>,
    /// Highest priority class of the prompts that it runs; None if it runs none.
    pub(super) class: Option<u32>,
    /// Time that these prompts take; None while nothing is known.
    pub(super) prefill: Option<Duration>,
    /// Time of the smallest efficient prefill, or of all if that is less.
    pub(super) prefill_least: Option<Duration>,
}

/// Times of steps that only decode.
#[derive(Clone, Debug, Default)]
pub(super) struct RowTimes {
    /// Highest class of the rows.
    pub(super) class: u32,
    /// What each circle of that class has, by itself.
    pub(super) alone: BTreeMap<Circle, Duration>,
    /// What is in every step.
    pub(super) always: Duration,
    /// Part of it that yields in the turn of prompts.
    pub(super) yielding: Duration,
    /// All rows.
    pub(super) all: Duration,
}

/// Who comes first in a tick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Turn {
    /// Rows and prompts fit both, or one of them.
    #[default]
    Both,
    /// The rows that are not in every step; prompts get what they leave.
    Rows,
    /// Prompts; rows that are not in every step get what they leave.
    Prompts,
}

/// The time of a tick for what is not in every step.
#[derive(Clone, Debug, Default)]
pub struct Allowance {
    /// Highest class of all rows.
    class: Option<u32>,
    turn: Turn,
    /// Whether the last turn that mattered was that of prompts.
    prompts_were_last: bool,
    /// Shares of the models that run prompts.
    prompts: BTreeMap<ModelName, Duration>,
    /// Shares of the models with rows that are not in every step.
    rows: BTreeMap<ModelName, Duration>,
    /// Time that is nobody's share.
    left: Duration,
    /// Most of it, and of the shares, that is for rows.
    rows_left: Duration,
    /// Whether so little is left for prompts that in their turn rows wait which otherwise are in every step.
    crowded: bool,
    /// Whether rows that are not in every step cost so little that prompts need not wait for them.
    rows_are_free: bool,
    /// Whether such rows were taken.
    rows_taken: bool,
    /// Whether prompts were left out, since not even the smallest prefill fitted.
    left_out: bool,
    measure: Measure,
    /// What each circle of that class had in the last ticks, by itself, the last of them first.
    alone: BTreeMap<Circle, [Option<Duration>; MEASURED_TICKS]>,
    /// What is in every step of each model, and the part of it that yields in the turn of prompts.
    expected: BTreeMap<ModelName, (Duration, Duration)>,
    /// Rest of the limit, and least time for prompts, as they were shared out.
    rest: Duration,
    floor: Duration,
}

/// What the rows of the highest class are measured by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measure {
    /// What whoever has fewest takes by itself.
    pub(super) time: Duration,
    /// Number of models with rows of the class.
    pub(super) models: usize,
}

impl Default for Measure {
    /// Bounds nothing.
    fn default() -> Self {
        Self { time: Duration::MAX, models: 0 }
    }
}

/// What the time of a tick comes to.
#[derive(Clone, Copy)]
struct Times {
    measure: Measure,
    /// What is in every step.
    always: Duration,
    /// Rest of the limit beside it.
    rest: Duration,
    /// Least time for prompts in their turn, however little that is: as if they were one more connection.
    floor: Duration,
    /// Part of what is in every step that yields in the turn of prompts.
    yielding: Duration,
}

impl Times {
    /// Returns them; None if nobody decodes.
    fn new(
        demands: &BTreeMap<ModelName, Demand>,
        (alone, class): (Option<Duration>, u32),
        stretch_percent: u32,
    ) -> Option<Self> {
        let alone = alone?;
        let highest =
            || demands.values().filter_map(|demand| demand.rows.as_ref()).filter(|r| r.class == class);
        let sum = |of: fn(&RowTimes) -> Duration| summed(highest().map(of));
        let always = sum(|rows| rows.always);
        let limit = alone.saturating_mul(stretch_percent) / 100;
        Some(Self {
            measure: Measure { time: alone, models: highest().count() },
            always,
            rest: limit.saturating_sub(always),
            floor: alone.min(limit.saturating_sub(alone)),
            yielding: sum(|rows| rows.yielding),
        })
    }
}

impl Allowance {
    /// Shares out the time of the next tick.
    pub fn share_out(&mut self, demands: &BTreeMap<ModelName, Demand>, limits: PaceLimits) {
        let rows = || demands.iter().filter_map(|(name, demand)| Some((name, demand.rows.as_ref()?)));
        let before = self.class;
        self.class = rows().map(|(_, rows)| rows.class).min();
        (self.prompts, self.rows, self.expected) = Default::default();
        let prompts = || demands.iter().filter_map(|(name, demand)| Some((name, demand, demand.class?)));
        let needs = prompts().map(|(name, demand, class)| {
            // What is not known counts as much.
            (class, demand.prefill.unwrap_or(Duration::MAX), name)
        });
        let (needs, class) = (needs.collect::<Vec<_>>(), self.class.unwrap_or_default());
        if before != self.class {
            self.alone.clear();
        }
        let alone = self.measured(rows().map(|(_, rows)| rows).filter(|rows| rows.class == class));
        let times = Times::new(demands, (alone, class), limits.stretch_percent);
        self.measure = times.map_or_else(Measure::default, |times| times.measure);
        let left_out = std::mem::take(&mut self.left_out);
        (self.rows_taken, self.crowded, self.rows_are_free) = (false, false, true);
        let Some(Times { measure: _, always, rest, floor, yielding }) = times else {
            (self.turn, self.rows_left) = (Turn::Both, limits.step_max);
            (self.prompts, self.left) = shared(needs, limits.step_max);
            return;
        };
        (self.rest, self.floor) = (rest, floor);
        let in_every_step = |rows: &RowTimes| {
            if rows.class == class { (rows.always, rows.yielding) } else { Default::default() }
        };
        self.expected = rows().map(|(name, rows)| (name.clone(), in_every_step(rows))).collect();
        let others = rows().map(|(name, rows)| (0, rows.all.saturating_sub(in_every_step(rows).0), name));
        let others: Vec<_> = others.filter(|(_, need, _)| *need > Duration::ZERO).collect();
        let wanted = summed(others.iter().map(|(_, need, _)| *need));
        let prefill = summed(needs.iter().map(|(_, need, _)| *need));
        let least = summed(prompts().filter_map(|(_, demand, _)| demand.prefill_least));
        let all_fits = prefill.saturating_add(wanted) <= rest;
        self.crowded = rest < floor && yielding > Duration::ZERO && !all_fits;
        self.rows_are_free = wanted <= always / FREE_PART;
        // Rows that leave prompts half of the time, and enough of it, do not wait for them.
        let half_fits = wanted <= rest / 2 && wanted.saturating_add(least) <= rest;
        let fits = !left_out && (all_fits || !self.crowded && (self.rows_are_free || half_fits));
        self.turn = match (fits || needs.is_empty(), self.prompts_were_last) {
            (true, _) => Turn::Both,
            (false, true) => Turn::Rows,
            (false, false) => Turn::Prompts,
        };
        let left;
        match self.turn {
            Turn::Both | Turn::Rows => {
                (self.rows, left) = shared(others, rest);
                let taken = rest - left;
                let floor =
                    if self.turn == Turn::Both { floor.saturating_sub(taken) } else { Duration::ZERO };
                (self.prompts, self.left) = shared(needs, left.max(floor).min(limits.step_max));
                self.rows_left = rest;
            }
            Turn::Prompts => {
                self.rows_left = if self.crowded { rest + yielding } else { rest };
                let of_prompts = self.rows_left.max(floor).min(limits.step_max);
                (self.prompts, left) = shared(needs, of_prompts);
                (self.rows, self.left) = shared(others, left);
            }
        }
        if self.turn != Turn::Both {
            self.prompts_were_last = self.turn == Turn::Prompts;
        }
    }

    /// Notes what each circle has by itself; returns what whoever has least takes, of those that have decoded
    /// for a while, if there are any.
    fn measured<'a>(&mut self, rows: impl Iterator<Item = &'a RowTimes>) -> Option<Duration> {
        let mut now: BTreeMap<&Circle, Duration> = BTreeMap::new();
        for (circle, time) in rows.flat_map(|rows| &rows.alone) {
            let sum = now.entry(circle).or_default();
            *sum = sum.saturating_add(*time);
        }
        let before = std::mem::take(&mut self.alone);
        for (circle, time) in now {
            let mut times = before.get(circle).copied().unwrap_or_default();
            times.rotate_right(1);
            times[0] = Some(time);
            self.alone.insert(circle.clone(), times);
        }
        let largest = |times: &[Option<Duration>; MEASURED_TICKS]| times.iter().flatten().max().copied();
        let settled = self.alone.values().filter(|times| times.iter().all(Option::is_some));
        settled.filter_map(largest).min().or_else(|| self.alone.values().filter_map(largest).min())
    }

    /// Returns who comes first.
    pub(super) fn turn(&self) -> Turn {
        self.turn
    }

    /// Returns the class whose rows are in every step.
    pub(super) fn class(&self) -> u32 {
        self.class.unwrap_or(u32::MAX)
    }

    /// Returns whether a model may prefill in this tick.
    pub(super) fn serves(&self, model: &ModelName) -> bool {
        self.left > Duration::ZERO || self.prompts.get(model).is_some_and(|share| *share > Duration::ZERO)
    }

    /// Returns whether [`Self::take`] gives a model something, be it the smallest prefill.
    pub(super) fn may_take(&self, model: &ModelName) -> bool {
        self.prompts.contains_key(model) || self.left > Duration::ZERO || self.prompts.is_empty()
    }

    /// Returns the measure of the last tick that was shared out.
    pub(super) fn measure(&self) -> Measure {
        self.measure
    }

    /// Notes what is in every step of a model, now that it is known which requests began in this tick, and
    /// what is `without` that which yields to prompts. What it is more than was expected is taken off.
    pub(super) fn meet(&mut self, model: &ModelName, always: Duration, without: Duration) {
        if self.class.is_none() {
            return;
        }
        let (expected, yielding) = self.expected.get(model).copied().unwrap_or_default();
        let (mut expected, mut now) = (expected, always);
        if self.turn == Turn::Prompts {
            let rest = (self.rest + expected).saturating_sub(always);
            expected = if self.crowded { expected.saturating_sub(yielding) } else { expected };
            self.crowded |= rest < self.floor && without < always;
            now = if self.crowded { without } else { always };
        }
        let excess = now.saturating_sub(expected);
        if excess > self.rest / FREE_PART {
            (self.rows_taken, self.rows_are_free) = (true, false);
        }
        self.rows_left = self.rows_left.saturating_sub(excess);
        let of_share = excess.saturating_sub(self.left);
        self.left = self.left.saturating_sub(excess);
        let share = self.prompts.get_mut(model);
        share.into_iter().for_each(|share| *share = share.saturating_sub(of_share));
    }

    /// Takes a model's share for rows that are not in every step, and what is nobody's.
    pub(super) fn take_rows(&mut self, model: &ModelName) -> Duration {
        self.left += self.rows.remove(model).unwrap_or_default();
        let time = self.left.min(self.rows_left);
        (self.left, self.rows_left) = (self.left - time, self.rows_left - time);
        time
    }

    /// Gives back what a model did not need of that, and notes whether it took rows that are not in every
    /// step.
    pub(super) fn give_back_rows(&mut self, time: Duration, taken: bool) {
        (self.left, self.rows_left) = (self.left + time, self.rows_left + time);
        self.rows_taken |= taken;
    }

    /// Returns whether in the turn of prompts rows wait which otherwise are in every step.
    pub(super) fn is_crowded(&self) -> bool {
        self.crowded
    }

    /// Returns whether the smallest efficient prefill runs though there is not the time for it. Otherwise
    /// prompts have the next turn.
    pub(super) fn grants_least(&mut self) -> bool {
        let granted = match self.turn {
            Turn::Prompts => true,
            Turn::Rows => false,
            Turn::Both => self.rows_are_free || !self.rows_taken,
        };
        self.left_out |= !granted;
        granted
    }

    /// Takes a model's share for prompts, and what is nobody's; None if it may not prefill in this tick.
    pub(super) fn take(&mut self, model: &ModelName) -> Option<Duration> {
        if !self.may_take(model) {
            return None;
        }
        let share = self.prompts.get(model).copied();
        Some(share.unwrap_or_default() + std::mem::take(&mut self.left))
    }

    /// Gives back what a model did not need.
    pub(super) fn give_back(&mut self, time: Duration) {
        self.left += time;
    }
}

/// Returns the sum of times, of which those that are not known are as long as can be.
fn summed(times: impl Iterator<Item = Duration>) -> Duration {
    times.fold(Duration::ZERO, Duration::saturating_add)
}

/// Shares time out, by class and then evenly: who needs least comes first, so that the others share what it
/// leaves. Returns what is left too.
fn shared(
    mut needs: Vec<(u32, Duration, &ModelName)>,
    mut left: Duration,
) -> (BTreeMap<ModelName, Duration>, Duration) {
    needs.sort_unstable();
    let mut shares = BTreeMap::new();
    for group in needs.chunk_by(|(a, ..), (b, ..)| a == b) {
        if left == Duration::ZERO && !shares.is_empty() {
            break;
        }
        for (&(_, need, name), others) in group.iter().zip((1..=group.len()).rev()) {
            let share = need.min(left / u32::try_from(others).unwrap_or(u32::MAX));
            shares.insert(name.clone(), share);
            left -= share;
        }
    }
    (shares, left)
}

#[cfg(test)]
#[path = "allowance_tests.rs"]
mod tests;
