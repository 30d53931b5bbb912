//! The spans of a step: rows, each of a sequence that decodes, and what it prefills besides. All rows run if
//! they fit in what the tick may take, else in turns (`turns`); prompts go by priority class, and within it
//! by rotation: to principals, to the connections of each, to the clients of each of those.

use std::time::Duration;

use super::allowance::{Allowance, Demand, FREE_PART, RowTimes, Turn};
use super::owner::Circle;
use super::pace::{Pace, StepLoad};
use super::runnable::Runnable;
use super::shares::Shares;
use super::turns::{Division, Turns, most};
use crate::ids::ModelName;

/// What can run, as references.
type Runs<'a, 'b> = Vec<&'b Runnable<'a>>;

/// Splits what can run into rows and prompts, the prompts in their order.
fn apart<'a, 'b>(shares: &Shares, runnable: &'b [Runnable<'a>]) -> (Runs<'a, 'b>, Runs<'a, 'b>) {
    let (rows, mut prompts): (Runs<'a, 'b>, Runs<'a, 'b>) = runnable.iter().partition(|run| run.is_row());
    prompts.sort_by_cached_key(|run| (run.class, shares.last_turns(run.owner)));
    (rows, prompts)
}

/// Bounds of a model's steps.
#[derive(Clone, Copy, Debug)]
pub struct StepBounds {
    /// Smallest efficient prefill, in tokens.
    pub prefill_tokens_min: u32,
    /// Most tokens that a step prefills.
    pub prefill_tokens_max: u32,
    /// See [`super::PaceLimits`].
    pub stretch_percent: u32,
}

/// Returns what a model wants to run in the next tick, after the one `before`.
#[must_use]
pub fn demand(
    (shares, pace): (&Shares, &Pace),
    before: &Allowance,
    runnable: &[Runnable<'_>],
    bounds: StepBounds,
) -> Demand {
    let (rows, prompts) = apart(shares, runnable);
    let decodes = rows.iter().any(|row| row.is_decoding());
    let division = Division::new(&rows, &prompts).filter(|_| decodes);
    let times = division.and_then(|division| {
        let level = division.level(pace, before.measure(), bounds.stretch_percent);
        let rows = division.within(level);
        let always = pace.step(rows)?;
        // The shares are of what rows usually take.
        let others = pace.usual_step(division.all)?.saturating_sub(pace.usual_step(rows)?);
        let yielding = prompts.first().map(|prompt| division.yielding(prompt.owner, level, before.measure()));
        let without = division.within_but(level, &yielding.unwrap_or_default());
        Some(RowTimes {
            class: division.class,
            alone: division.alone(pace),
            always,
            // Prompts alone read the weights too.
            yielding: always.saturating_sub(pace.step(without.max(1))?),
            all: always.saturating_add(others),
        })
    });
    let tokens = pending(&prompts);
    let class = prompts.iter().map(|prompt| prompt.class).min();
    Demand {
        rows: times,
        class,
        prefill: pace.prefill(tokens, decodes),
        prefill_least: pace.prefill(tokens.min(bounds.prefill_tokens_min), decodes),
    }
}

/// The rows that are in a step in any case.
struct Kept {
    division: Division,
    /// Most of each circle.
    level: u32,
    /// Circles whose rows are not among them.
    yielding: Vec<Circle>,
    /// Their number.
    rows: u32,
}

/// What the step of a model is planned with.
#[derive(Debug)]
pub struct Planning<'a> {
    /// Who had what.
    pub shares: &'a mut Shares,
    /// Whose turn it is to decode.
    pub turns: &'a mut Turns,
    /// What the tick may take.
    pub allowance: &'a mut Allowance,
    /// How fast the model is.
    pub pace: &'a Pace,
    /// The model.
    pub model: &'a ModelName,
    /// What bounds the step.
    pub bounds: StepBounds,
}

/// Returns the tokens that prompts have yet to run.
fn pending(prompts: &[&Runnable<'_>]) -> u32 {
    prompts.iter().fold(0, |sum, prompt| sum.saturating_add(prompt.pending))
}

impl Planning<'_> {
    /// Picks the spans of the next step: sequence and number of tokens.
    #[must_use]
    pub fn plan(mut self, runnable: &[Runnable<'_>]) -> Vec<(u64, u32)> {
        let (rows, prompts) = apart(self.shares, runnable);
        let decodes = rows.iter().any(|row| row.is_decoding());
        // Not in the turn of prompts: rows may have no time in it.
        let looks = decodes && self.pace.should_look() && self.allowance.turn() != Turn::Prompts;
        let division = Division::new(&rows, &prompts);
        let prompts = if looks { &[] } else { &prompts[..] };
        let kept = division.map(|division| self.kept(division, prompts));
        let decodes = decodes && kept.as_ref().is_some_and(|kept| kept.rows > 0);
        if self.allowance.turn() == Turn::Prompts {
            let prefill = self.prefill(prompts, decodes);
            let mut spans = self.rows(&rows, kept);
            spans.extend(prefill);
            return spans;
        }
        let mut spans = self.rows(&rows, kept);
        spans.extend(self.prefill(prompts, decodes));
        spans
    }

    /// Returns which rows are in the step in any case.
    fn kept(&mut self, division: Division, prompts: &[&Runnable<'_>]) -> Kept {
        let measure = self.allowance.measure();
        let is_highest = division.class <= self.allowance.class();
        let level =
            if is_highest { division.level(self.pace, measure, self.bounds.stretch_percent) } else { 0 };
        let first = prompts.first().filter(|_| is_highest && self.allowance.serves(self.model));
        let yielding = first.map(|prompt| division.yielding(prompt.owner, level, measure));
        let mut yielding = yielding.unwrap_or_default();
        let least = |rows| self.pace.step(rows).unwrap_or_default();
        let (always, without) = (division.within(level), division.within_but(level, &yielding));
        self.allowance.meet(self.model, least(always), least(without.max(1)).min(least(always)));
        let allowance = &*self.allowance;
        if allowance.turn() != Turn::Prompts || !allowance.is_crowded() || !allowance.may_take(self.model) {
            yielding.clear();
        }
        let rows = division.within_but(level, &yielding);
        Kept { division, level, yielding, rows }
    }

    /// Picks rows.
    fn rows(&mut self, rows: &[&Runnable<'_>], kept: Option<Kept>) -> Vec<(u64, u32)> {
        let spans = |rows: &[&Runnable<'_>]| rows.iter().map(|row| (row.sequence, row.pending)).collect();
        let Some(Kept { division, level, yielding, rows: always }) = kept else { return Vec::new() };
        let usual = |rows| self.pace.usual_step(rows).unwrap_or_default();
        let (least, mut time) = (usual(always), Duration::ZERO);
        if always < division.all {
            time = self.allowance.take_rows(self.model);
        }
        let nearly_free = usual(always.max(1)) / FREE_PART;
        let time_or_free = time.max(nearly_free);
        let mut fitting =
            most(always, division.all, |rows| usual(rows).saturating_sub(least) <= time_or_free);
        if self.allowance.turn() != Turn::Prompts {
            fitting = fitting.max(always + 1).min(division.all);
        }
        let spent = usual(fitting).saturating_sub(least);
        self.allowance.give_back_rows(time.saturating_sub(spent), fitting > always);
        if fitting == division.all {
            return spans(rows);
        }
        let order = self.turns.order(rows, &division, level, &yielding);
        let others = fitting as usize - order.always.len();
        self.turns.take(&order, others);
        let mut taken = order.always;
        taken.extend(order.others.into_iter().take(others));
        spans(&taken)
    }

    /// Picks what is prefilled.
    fn prefill(&mut self, prompts: &[&Runnable<'_>], decodes: bool) -> Vec<(u64, u32)> {
        if prompts.is_empty() {
            return Vec::new();
        }
        let Some(time) = self.allowance.take(self.model) else { return Vec::new() };
        let StepBounds { prefill_tokens_min: least, prefill_tokens_max: most, .. } = self.bounds;
        let pending = pending(prompts);
        let mut tokens = self.pace.prefill_tokens(time, decodes, (0, most));
        if tokens < least.min(pending) {
            tokens = if self.allowance.grants_least() { least.min(most) } else { 0 };
        }
        let (spans, load) = prefilled(self.shares, prompts, tokens);
        let spent = if load.prefilled == 0 {
            Duration::ZERO
        } else {
            self.pace.prefill(load.prefilled, decodes).unwrap_or(time)
        };
        self.allowance.give_back(time.saturating_sub(spent));
        spans
    }
}

/// Gives `left` tokens to prompts in their order.
fn prefilled(shares: &mut Shares, prompts: &[&Runnable<'_>], mut left: u32) -> (Vec<(u64, u32)>, StepLoad) {
    let (mut spans, mut load) = (Vec::new(), StepLoad::default());
    for run in prompts {
        let tokens = run.pending.min(run.span_max).min(left);
        if tokens == 0 {
            break;
        }
        spans.push((run.sequence, tokens));
        load.add(run.kind, tokens);
        left -= tokens;
    }
    if let (Some(first), false) = (prompts.first(), spans.is_empty()) {
        shares.turn(first.owner);
    }
    (spans, load)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::SpanKind;
    use crate::sched::owner::{Owner, owner};

    /// Sequences with more than one token pending prefill, others decode.
    fn planned(shares: &mut Shares, runs: &[(u64, &str, u32, u32)], budget: u32) -> Vec<(u64, u32)> {
        let owners: Vec<Owner> = runs.iter().map(|(_, name, _, _)| owner(name)).collect();
        let runnable: Vec<Runnable<'_>> = runs
            .iter()
            .zip(&owners)
            .map(|(&(sequence, _, class, pending), owner)| Runnable {
                sequence,
                owner,
                class,
                priority: class,
                kind: if pending > 1 { SpanKind::Prefill } else { SpanKind::Decode },
                pending,
                span_max: 512,
            })
            .collect();
        spans(shares, &runnable, budget)
    }

    /// Returns all rows, and what is prefilled.
    fn spans(shares: &mut Shares, runnable: &[Runnable<'_>], budget: u32) -> Vec<(u64, u32)> {
        let (rows, prompts) = apart(shares, runnable);
        let rows = rows.iter().map(|row| (row.sequence, row.pending));
        rows.chain(prefilled(shares, &prompts, budget).0).collect()
    }

    /// All arrive in this order.
    fn shares(runs: &[(u64, &str, u32, u32)]) -> Shares {
        let mut shares = Shares::default();
        runs.iter().for_each(|(_, name, _, _)| shares.arrive(&owner(name)));
        shares
    }

    #[test]
    fn rows_are_beside_what_prefill_gets_of_the_budget() {
        let runs = [(1, "a", 1, 1), (2, "a", 1, 900), (3, "b", 2, 1)];
        assert_eq!(planned(&mut shares(&runs), &runs, 64), [(1, 1), (3, 1), (2, 64)]);
    }

    #[test]
    fn a_draft_runs_whole_and_the_last_token_of_a_prompt_is_a_row() {
        let owner = owner("a");
        let run = |sequence, kind, pending| Runnable {
            sequence,
            owner: &owner,
            class: 1,
            priority: 1,
            kind,
            pending,
            span_max: 512,
        };
        let runs = [run(1, SpanKind::Prefill, 9), run(2, SpanKind::Verify, 5), run(3, SpanKind::Prefill, 1)];
        assert_eq!(spans(&mut Shares::default(), &runs, 4), [(2, 5), (3, 1), (1, 4)]);
        assert_eq!(runs.map(|run| run.is_decoding()), [false, true, false]);
    }

    #[test]
    fn clients_rotate_at_prefill() {
        let runs = [(1, "a", 1, 900), (2, "a", 1, 900), (3, "b", 1, 900)];
        let mut shares = shares(&runs);
        assert_eq!(planned(&mut shares, &runs, 64), [(1, 64)]);
        assert_eq!(planned(&mut shares, &runs, 64), [(3, 64)]);
        assert_eq!(planned(&mut shares, &runs, 64), [(1, 64)]);
    }

    #[test]
    fn connections_rotate_at_prefill_and_within_their_turns_clients_do() {
        let runs = [(1, "a/x", 1, 900), (2, "a/y", 1, 900), (3, "a/z", 1, 900), (4, "b", 1, 900)];
        let mut shares = shares(&runs);
        let steps = (0..8).map(|_| planned(&mut shares, &runs, 64)[0].0);
        assert_eq!(steps.collect::<Vec<_>>(), [1, 4, 2, 4, 3, 4, 1, 4]);
    }

    #[test]
    fn who_comes_and_goes_does_not_keep_a_long_prompt_from_its_turn() {
        let long = (1, "long", 1, 9000);
        let mut shares = shares(&[long]);
        let mut turns = 0;
        for number in 0..30 {
            // Two at a time, always under another name and on another connection.
            let names = [0, 1].map(|more| format!("short-{}", number + more));
            names.iter().for_each(|name| shares.arrive(&owner(name)));
            let runs = [(2, names[0].as_str(), 1, 64), (3, names[1].as_str(), 1, 64), long];
            turns += u32::from(planned(&mut shares, &runs, 64)[0].0 == 1);
            shares.leave(&owner(&names[0]));
        }
        assert!(turns >= 10, "{turns} of 30");
    }

    #[test]
    fn a_higher_class_prefills_first_and_leaves_the_rest() {
        let runs = [(1, "a", 2, 900), (2, "b", 0, 10)];
        assert_eq!(planned(&mut shares(&runs), &runs, 64), [(2, 10), (1, 54)]);
    }
}
