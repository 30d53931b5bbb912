//! A model's step: which spans it has, its launch, and what becomes of its results.

use super::resident::{Launched, LaunchedSpan};
use super::{Context, Resident};
use crate::backend::{Backend, RowResult, Span, SpanKind, Step, add_checkpoint};
use crate::error::Error;
use crate::sched::{Runnable, StepLoad};

impl Resident {
    /// Waits for the step that runs, if any, and commits it.
    pub(crate) fn collect<B: Backend>(&mut self, cx: &mut Context<'_, B>) -> Result<(), Error> {
        let Some(Launched { spans, at }) = self.launched.take() else { return Ok(()) };
        let mut results = cx.backend.collect(self.id)?.into_iter();
        cx.now = cx.clock.now();
        let mut load = StepLoad::default();
        let mut ended = Vec::new();
        for LaunchedSpan { sequence: id, kind, tokens, outputs } in spans {
            load.add(kind, tokens);
            let mut rows = results.by_ref().take(outputs);
            let Some(sequence) = self.running.get_mut(&id) else {
                rows.for_each(drop);
                continue;
            };
            let mut drawn = 0;
            let counted =
                rows.by_ref().inspect(|row| drawn += u32::from(matches!(row, RowResult::Token(..))));
            let outcome = sequence.commit(tokens, counted, cx.now);
            rows.for_each(drop);
            let prefilled = prefilled(kind, tokens);
            cx.counters.committed(prefilled, drawn);
            self.shares.serve(&sequence.origin.client, prefilled, drawn);
            if let (Some(slot), true) = (sequence.slot, sequence.is_at_checkpoint()) {
                cx.backend.checkpoint(self.id, slot, sequence.computed)?;
                add_checkpoint(&mut sequence.checkpoints, sequence.computed);
            }
            if let Some(outcome) = outcome {
                ended.push((id, outcome));
            }
        }
        self.pace.observe(load, cx.now - at);
        self.end(cx, ended)
    }

    /// Launches the next step, if any sequence has tokens to run. Returns whether it did.
    pub(crate) fn launch<B: Backend>(&mut self, cx: &mut Context<'_, B>) -> Result<bool, Error> {
        let runnable: Vec<Runnable<'_>> = self
            .running
            .iter()
            .filter(|(_, state)| !state.is_paused())
            .map(|(&sequence, state)| Runnable {
                sequence,
                client: &state.origin.client,
                class: state.class,
                kind: state.span_kind(),
                pending: state.pending(),
                span_max: state.span_max(),
            })
            .collect();
        let decoding = runnable.iter().any(Runnable::is_decoding);
        let least = self.shape.prefill_tokens_min;
        let prefill_tokens = self.pace.prefill_tokens(decoding, least, cx.settings.pace_limits());
        let planned = self.scheduler.plan(&runnable, prefill_tokens);
        if planned.is_empty() {
            return Ok(false);
        }
        for &(id, tokens) in &planned {
            self.grow(cx, id, tokens)?;
        }
        let mut spans: Vec<(u64, Span)> = planned
            .iter()
            .filter_map(|&(id, tokens)| Some((id, self.running.get(&id)?.span(tokens)?)))
            .collect();
        spans.sort_by_key(|(_, span)| span.order());
        let launched = |(sequence, span): &(u64, Span)| LaunchedSpan {
            sequence: *sequence,
            kind: span.kind,
            tokens: u32::try_from(span.tokens.len()).unwrap_or(u32::MAX),
            outputs: span.outputs.len(),
        };
        let launched = Launched { spans: spans.iter().map(launched).collect(), at: cx.clock.now() };
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
        let over = self.parked.bytes().saturating_sub(idle_bytes_max);
        if over > 0 { self.evict(cx, over, None) } else { Ok(()) }
    }
}

/// Returns the tokens of a span that count as prefill.
fn prefilled(kind: SpanKind, tokens: u32) -> u32 {
    match kind {
        SpanKind::Prefill => tokens,
        SpanKind::Decode | SpanKind::Verify => 0,
    }
}
