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
        let share = self.prompts.get(model).copied();
        if share.is_none() && self.left == Duration::ZERO && !self.prompts.is_empty() {
            return None;
        }
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
mod tests {
    use super::*;
    use crate::sched::owner::owner;

    const LIMITS: PaceLimits =
        PaceLimits { prefill_tokens_max: 512, stretch_percent: 250, step_max: Duration::from_millis(500) };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn decodes(time: u64) -> Demand {
        rows("a", 1, [time; 3])
    }

    /// Rows of one client: what they take by themselves, what is in every step, and all.
    fn rows(name: &str, class: u32, [alone, always, all]: [u64; 3]) -> Demand {
        let alone = BTreeMap::from([(owner(name).circle(1), ms(alone))]);
        let times = RowTimes { class, alone, always: ms(always), yielding: ms(0), all: ms(all) };
        Demand { rows: Some(times), ..Demand::default() }
    }

    fn prefills(class: u32, time: u64) -> Demand {
        Demand { class: Some(class), prefill: Some(ms(time)), ..Demand::default() }
    }

    fn share(demands: &[(&str, Demand)]) -> Allowance {
        let demands = demands.iter().map(|(name, demand)| (ModelName::from(*name), demand.clone())).collect();
        let mut allowance = Allowance::default();
        allowance.share_out(&demands, LIMITS);
        allowance
    }

    #[test]
    fn a_prompt_of_one_model_is_bounded_by_what_another_decodes() {
        let mut tick = share(&[("a", decodes(100)), ("b", prefills(1, 9000))]);
        assert_eq!((tick.take(&"b".into()), tick.take(&"a".into())), (Some(ms(150)), None));
        let mut alone = share(&[("b", prefills(1, 9000))]);
        assert_eq!(alone.take(&"b".into()), Some(ms(500)), "nobody waits for a token");
    }

    #[test]
    fn models_with_prompts_share_evenly_and_use_what_is_left() {
        let mut long = share(&[("a", decodes(100)), ("b", prefills(1, 9000)), ("c", prefills(1, 9000))]);
        assert_eq!((long.take(&"b".into()), long.take(&"c".into())), (Some(ms(75)), Some(ms(75))));
        let mut one = share(&[("a", decodes(100)), ("b", prefills(1, 9000)), ("c", prefills(1, 50))]);
        assert_eq!((one.take(&"b".into()), one.take(&"c".into())), (Some(ms(100)), Some(ms(50))));
        let mut short = share(&[("a", decodes(100)), ("b", prefills(1, 40)), ("c", prefills(1, 50))]);
        assert_eq!(short.take(&"b".into()), Some(ms(40 + 60)));
        short.give_back(ms(60));
        assert_eq!(short.take(&"c".into()), Some(ms(110)));
        short.give_back(ms(60));
        assert_eq!(short.take(&"a".into()), Some(ms(60)), "for a prompt that begins in this tick");
    }

    #[test]
    fn a_higher_class_comes_first() {
        let mut long = share(&[("a", decodes(100)), ("b", prefills(1, 9000)), ("c", prefills(0, 9000))]);
        assert_eq!((long.take(&"b".into()), long.take(&"c".into())), (None, Some(ms(150))));
        let mut short = share(&[("a", decodes(100)), ("b", prefills(1, 9000)), ("c", prefills(0, 50))]);
        assert_eq!((short.take(&"b".into()), short.take(&"c".into())), (Some(ms(100)), Some(ms(50))));
    }

    #[test]
    fn what_is_not_known_counts_as_much_and_somebody_always_prefills() {
        let unknown = Demand { class: Some(1), ..Demand::default() };
        let mut tick = share(&[("a", decodes(100)), ("b", unknown.clone()), ("c", prefills(1, 50))]);
        assert_eq!((tick.take(&"c".into()), tick.take(&"b".into())), (Some(ms(50)), Some(ms(100))));
        let mut no_time = share(&[("a", decodes(0)), ("b", unknown), ("c", prefills(2, 9000))]);
        assert_eq!((no_time.take(&"c".into()), no_time.take(&"b".into())), (None, Some(ms(0))));
        let mut idle = share(&[("a", decodes(0))]);
        assert_eq!(idle.take(&"a".into()), Some(ms(0)), "the first prompt of all begins");
    }

    #[test]
    fn rows_and_prompts_that_do_not_both_fit_have_the_rest_in_turn() {
        let wanted = [("a", rows("a", 1, [100, 150, 400])), ("b", prefills(1, 9000))];
        let wanted = wanted.map(|(name, demand)| (ModelName::from(name), demand)).into();
        let mut tick = Allowance::default();
        for turn in [Turn::Prompts, Turn::Rows, Turn::Prompts, Turn::Rows] {
            tick.share_out(&wanted, LIMITS);
            assert_eq!(tick.turn(), turn);
            let of_prompts = if turn == Turn::Prompts { tick.take(&"b".into()) } else { None };
            let of_rows = tick.take_rows(&"a".into());
            if turn == Turn::Prompts {
                assert_eq!((of_prompts, of_rows), (Some(ms(100)), ms(0)), "100 of 250 are left");
            } else {
                assert_eq!(of_rows, ms(100));
                tick.give_back_rows(ms(30), true);
                assert_eq!(tick.take(&"b".into()), Some(ms(30)), "what they leave");
            }
        }
    }

    #[test]
    fn rows_that_leave_prompts_half_of_the_rest_go_with_them() {
        let mut tick = share(&[("a", rows("a", 1, [100, 100, 150])), ("b", prefills(1, 9000))]);
        assert_eq!((tick.turn(), tick.take_rows(&"a".into())), (Turn::Both, ms(50)));
        assert_eq!(tick.take(&"b".into()), Some(ms(100)));
        let mut alone = share(&[("a", rows("a", 1, [100, 200, 900]))]);
        assert_eq!(
            (alone.turn(), alone.take_rows(&"a".into())),
            (Turn::Both, ms(50)),
            "no more than the limit"
        );
    }

    #[test]
    fn prompts_have_a_turn_however_much_is_in_every_step() {
        let equal = Demand { rows: rows("c", 1, [100; 3]).rows, ..Demand::default() };
        let mut tick = share(&[("a", decodes(100)), ("c", equal.clone()), ("b", prefills(1, 9000))]);
        assert_eq!(tick.take(&"b".into()), Some(ms(100)), "as one more connection");
        let mut own = rows("a", 1, [100, 250, 400]);
        own.rows.iter_mut().for_each(|rows| rows.yielding = ms(150));
        let mut tick = share(&[("a", Demand { class: Some(1), ..own })]);
        assert_eq!(
            (tick.turn(), tick.take(&"a".into())),
            (Turn::Prompts, Some(ms(150))),
            "their own rows wait"
        );
    }

    #[test]
    fn a_model_of_a_lower_class_has_part_of_the_rest() {
        let mut tick = share(&[("a", rows("a", 0, [100; 3])), ("b", rows("b", 1, [400; 3]))]);
        assert_eq!((tick.class(), tick.take_rows(&"b".into())), (0, ms(150)));
        assert_eq!(tick.measure().time, ms(100));
        // One client's streams on both are measured together.
        let tick = share(&[("a", rows("a", 1, [100; 3])), ("b", rows("a", 1, [400; 3]))]);
        assert_eq!((tick.measure().time, tick.measure().models), (ms(500), 2));
    }

    #[test]
    fn rows_that_nobody_expected_are_taken_off_the_time_of_prompts() {
        let wanted = [("a", decodes(100)), ("b", prefills(1, 9000))];
        let mut tick = share(&wanted);
        tick.meet(&"b".into(), ms(60), ms(60));
        assert_eq!((tick.take(&"b".into()), tick.grants_least()), (Some(ms(90)), false));
        // They have been left out for once, and have the next turn.
        tick.share_out(&wanted.map(|(name, demand)| (ModelName::from(name), demand)).into(), LIMITS);
        tick.meet(&"b".into(), ms(120), ms(0));
        assert_eq!((tick.turn(), tick.is_crowded(), tick.grants_least()), (Turn::Prompts, true, true));
        assert_eq!(tick.take(&"b".into()), Some(ms(150)), "rows that yield are not there");
    }
}
