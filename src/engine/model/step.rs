//! A model's step: which spans it has, its launch, and what becomes of its results.

use std::collections::BTreeMap;

use super::masks::Verdict;
use super::resident::{Launched, LaunchedSpan};
use super::{Context, Resident};
use crate::backend::{Backend, RowResult, Span, SpanKind, Step, add_checkpoint};
use crate::engine::api::EngineSettings;
use crate::engine::task::Sequence;
use crate::error::Error;
use crate::sched::{self, Allowance, Demand, Planning, Runnable, StepBounds, StepLoad};

impl Resident {
    /// Waits for the step that runs, if any, and commits it.
    pub(crate) fn collect<B: Backend>(&mut self, cx: &mut Context<'_, B>) -> Result<(), Error> {
        let Some(Launched { spans, at, step, mut disturbed }) = self.launched.take() else { return Ok(()) };
        let (mut verdicts, waited) = self.draw(cx, &spans)?;
        disturbed |= waited;
        let asked = cx.clock.now();
        let mut results = cx.backend.collect(self.id)?.into_iter();
        cx.now = cx.clock.now();
        let (took, on_device) = (cx.now - at, cx.timeline.collect(step, asked, cx.now));
        let mut load = StepLoad::default();
        let (mut ended, mut shared, mut at_checkpoint) = (Vec::new(), Vec::new(), Vec::new());
        let mut again = Vec::new();
        for LaunchedSpan { sequence: id, kind, tokens, outputs, masks: _ } in spans {
            load.add(kind, tokens);
            let mut rows = results.by_ref().take(outputs);
            let Some(sequence) = self.running.get_mut(&id) else {
                rows.for_each(drop);
                continue;
            };
            let (mut drawn, draws) = (0, sequence.draws_left() > 0);
            let mut counted =
                rows.by_ref().inspect(|row| drawn += u32::from(draws && matches!(row, RowResult::Token(..))));
            let own = sequence.own_results(outputs);
            // Where its grammar ends it, the other choices end with it.
            let (outcome, may_fork) = match verdicts.remove(&id) {
                None => (sequence.commit(tokens, counted.by_ref().take(own), cx.now), outputs > own),
                Some(Verdict::Again) => {
                    sequence.run_again(tokens);
                    again.push(id);
                    (None, false)
                }
                Some(Verdict::Whole) => (Some(sequence.commit_end(tokens, Ok(()))), false),
                Some(Verdict::Failed(error)) => (Some(sequence.commit_end(tokens, Err(error))), false),
            };
            sequence.served(took);
            let mut forks = if may_fork { sequence.fork(counted, cx.now) } else { Vec::new() };
            for (fork, _) in forks.iter_mut().filter(|(_, outcome)| outcome.is_none()) {
                fork.ask_mask(cx.masks);
            }
            if drawn > 0 && outcome.is_none() {
                sequence.ask_mask(cx.masks);
            }
            rows.for_each(drop);
            let prefilled = prefilled(kind, tokens);
            cx.counters.committed(prefilled, drawn);
            self.shares.serve(&sequence.origin.owner, prefilled, drawn);
            if let (Some(slot), true) = (sequence.slot, sequence.is_at_checkpoint()) {
                at_checkpoint.push((id, slot));
            }
            // Whatever the device does from here on, they are known.
            if self.take_forks(cx, forks) {
                shared.push(id);
            }
            if let Some(outcome) = outcome {
                ended.push((id, outcome));
            }
        }
        if !disturbed {
            self.pace.observe(load, on_device);
        }
        self.cut_back(cx, &again)?;
        for (id, slot) in at_checkpoint {
            let Some(sequence) = self.running.get_mut(&id) else { continue };
            cx.backend.checkpoint(self.id, slot, sequence.computed)?;
            add_checkpoint(&mut sequence.checkpoints, sequence.computed);
        }
        shared.into_iter().try_for_each(|id| self.share(cx, id))?;
        self.end(cx, ended)
    }

    /// Returns what the model wants to run in the next tick, once the step that runs is committed.
    pub(crate) fn demand(&self, before: &Allowance, settings: &EngineSettings) -> Demand {
        let launched = self.launched.iter().flat_map(|launched| &launched.spans);
        let launched: BTreeMap<u64, u32> = launched.map(|span| (span.sequence, span.tokens)).collect();
        let then = runnable(&self.running, self.is_strict()).filter_map(|mut run| {
            run.pending -= launched.get(&run.sequence).copied().unwrap_or(0);
            if run.pending == 0 {
                // Unless it ends, it has drawn a token.
                let draws = self.running.get(&run.sequence).is_some_and(Sequence::leaves_cache);
                return draws.then_some(Runnable { pending: 1, kind: SpanKind::Decode, ..run });
            }
            Some(run)
        });
        let then: Vec<Runnable<'_>> = then.collect();
        sched::demand((&self.shares, &self.pace), before, &then, self.bounds(settings))
    }

    /// Returns what bounds its steps.
    fn bounds(&self, settings: &EngineSettings) -> StepBounds {
        StepBounds {
            prefill_tokens_min: self.shape.prefill_tokens_min,
            prefill_tokens_max: settings.prefill_chunk_tokens,
            stretch_percent: settings.prefill_stretch_percent,
        }
    }

    /// Plans the next step: sequences, and tokens of each.
    fn plan<B: Backend>(&mut self, cx: &mut Context<'_, B>) -> Vec<(u64, u32)> {
        let ageing = cx.settings.priority_ageing;
        self.running.values_mut().for_each(|sequence| sequence.age(cx.now, ageing));
        let runnable: Vec<Runnable<'_>> = runnable(&self.running, self.is_strict()).collect();
        let bounds = self.bounds(cx.settings);
        let planning = Planning {
            shares: &mut self.shares,
            turns: &mut self.turns,
            allowance: cx.allowance,
            pace: &self.pace,
            model: self.spec.model(),
            bounds,
        };
        planning.plan(&runnable)
    }

    /// Launches the next step, if any sequence has tokens to run. Returns whether it did.
    pub(crate) fn launch<B: Backend>(&mut self, cx: &mut Context<'_, B>) -> Result<bool, Error> {
        self.look_for_masks(cx)?;
        let planned = self.plan(cx);
        for &(id, tokens) in &planned {
            if !self.grow(cx, id, tokens)? {
                // It goes on once there is memory.
                self.suspend(cx, id)?;
            }
        }
        let mut spans: Vec<(u64, Span)> = planned
            .iter()
            .filter_map(|&(id, tokens)| Some((id, self.running.get_mut(&id)?.span(tokens)?)))
            .collect();
        if spans.is_empty() {
            return Ok(false);
        }
        spans.sort_by_key(|(_, span)| span.order());
        let launched = |(sequence, span): &(u64, Span)| LaunchedSpan {
            sequence: *sequence,
            kind: span.kind,
            tokens: u32::try_from(span.tokens.len()).unwrap_or(u32::MAX),
            outputs: span.outputs.len(),
            masks: span.outputs.iter().filter(|output| output.want.awaits_mask()).count(),
        };
        let (spans_launched, at) = (spans.iter().map(launched).collect(), cx.clock.now());
        let step = cx.timeline.launch(at);
        let launched = Launched { spans: spans_launched, at, step, disturbed: false };
        let step = Step { spans: spans.into_iter().map(|(_, span)| span).collect() };
        cx.backend.launch(self.id, step)?;
        cx.counters.steps_total += 1;
        self.last_used = cx.clock.wall();
        self.launched = Some(launched);
        Ok(true)
    }

    /// Sends what committed steps brought, and keeps parked caches below `idle_bytes_max`.
    pub(crate) fn settle<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        idle_bytes_max: u64,
    ) -> Result<(), Error> {
        // A preempted sequence may have output that its reader had no room for.
        for sequence in self.running.values_mut().chain(self.queue.values_mut()) {
            sequence.flush(cx.now);
        }
        let over = self.parked.keep_bytes(idle_bytes_max);
        self.drop_evicted(cx, &over)
    }
}

/// Returns those that can run of some sequences that have a slot; `is_strict` are those that do not run
/// before it is known what they draw from.
fn runnable(running: &BTreeMap<u64, Sequence>, is_strict: bool) -> impl Iterator<Item = Runnable<'_>> {
    let can_run = move |state: &Sequence| !state.is_paused() && !state.waits_for_mask(is_strict);
    running.iter().filter(move |(_, state)| can_run(state)).map(|(&sequence, state)| Runnable {
        sequence,
        owner: &state.origin.owner,
        class: state.class,
        priority: state.origin.priority.own_class(),
        kind: state.span_kind(),
        pending: state.pending(),
        span_max: state.span_max(),
    })
}

/// Returns the tokens of a span that count as prefill.
fn prefilled(kind: SpanKind, tokens: u32) -> u32 {
    match kind {
        SpanKind::Prefill => tokens,
        SpanKind::Decode | SpanKind::Verify => 0,
    }
}
