//! A model's step: which spans it has, its launch, and what becomes of its results.

use super::resident::Launched;
use super::{Context, Resident};
use crate::backend::{Backend, Span, SpanResult, Step, add_checkpoint};
use crate::error::Error;
use crate::sched::Runnable;

impl Resident {
    /// Waits for the step that runs, if any, and commits it.
    pub(crate) fn collect<B: Backend>(&mut self, cx: &mut Context<'_, B>) -> Result<(), Error> {
        let Some(Launched { spans, at }) = self.launched.take() else { return Ok(()) };
        let results = cx.backend.collect(self.id)?;
        cx.now = cx.clock.now();
        let (mut decoding, mut prefilled) = (0, 0);
        let mut ended = Vec::new();
        for ((id, tokens), result) in spans.into_iter().zip(results) {
            if tokens == 1 {
                decoding += 1;
            } else {
                prefilled += tokens;
            }
            let Some(sequence) = self.running.get_mut(&id) else { continue };
            cx.counters.committed(tokens, &result);
            let drawn = u32::from(matches!(result, SpanResult::Token(..)));
            self.shares.serve(&sequence.origin.client, if tokens > 1 { tokens } else { 0 }, drawn);
            let outcome = sequence.commit(tokens, result, cx.now);
            if let (Some(slot), true) = (sequence.slot, sequence.is_at_checkpoint()) {
                cx.backend.checkpoint(self.id, slot, sequence.computed)?;
                add_checkpoint(&mut sequence.checkpoints, sequence.computed);
            }
            if let Some(outcome) = outcome {
                ended.push((id, outcome));
            }
        }
        self.pace.observe(decoding, prefilled, cx.now - at);
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
                pending: state.pending(),
                span_max: state.span_max(),
            })
            .collect();
        let decoding = runnable.iter().any(|run| run.pending == 1);
        let least = self.shape.prefill_tokens_min;
        let prefill_tokens = self.pace.prefill_tokens(decoding, least, cx.settings.pace_limits());
        let planned = self.scheduler.plan(&runnable, prefill_tokens);
        if planned.is_empty() {
            return Ok(false);
        }
        for &(id, tokens) in &planned {
            self.grow(cx, id, tokens)?;
        }
        let mut spans: Vec<(u64, Span)> =
            planned.iter().filter_map(|&(id, tokens)| Some((id, self.span(id, tokens)?))).collect();
        spans.sort_by_key(|(_, span)| (span.tokens.len() > 1, span.slot));
        let (ids, spans): (Vec<u64>, Vec<Span>) = spans.into_iter().unzip();
        let lengths = spans.iter().map(|span| u32::try_from(span.tokens.len()).unwrap_or(u32::MAX));
        let launched = Launched { spans: ids.into_iter().zip(lengths).collect(), at: cx.clock.now() };
        cx.backend.launch(self.id, &Step { spans })?;
        cx.counters.steps_total += 1;
        self.last_used = cx.clock.wall();
        self.launched = Some(launched);
        Ok(true)
    }

    fn span(&self, id: u64, tokens: u32) -> Option<Span> {
        let sequence = self.running.get(&id)?;
        let range = sequence.computed as usize..(sequence.computed + tokens) as usize;
        Some(Span {
            slot: sequence.slot?,
            start: sequence.computed,
            tokens: sequence.tokens[range].to_vec(),
            output: sequence.span_output(tokens),
        })
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
