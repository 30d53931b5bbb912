//! The spans of a step: sequences that decode all run; what a step may prefill besides goes to the highest
//! priority class, and within it to clients by rotation.

use std::collections::BTreeMap;

use crate::backend::SpanKind;
use crate::ids::ClientId;

/// A sequence that can run.
#[derive(Clone, Copy, Debug)]
pub struct Runnable<'a> {
    /// Its number.
    pub sequence: u64,
    /// Its client.
    pub client: &'a ClientId,
    /// Its priority class; 0 is the highest.
    pub class: u32,
    /// What its next span is for.
    pub kind: SpanKind,
    /// Number of its tokens that are not in its KV cache yet; at least one.
    pub pending: u32,
    /// Most tokens of it that one step may take.
    pub span_max: u32,
}

impl Runnable<'_> {
    /// Returns whether a user waits for its next token.
    #[must_use]
    pub fn is_decoding(&self) -> bool {
        match self.kind {
            SpanKind::Decode | SpanKind::Verify => true,
            SpanKind::Prefill => false,
        }
    }

    /// Returns whether it runs in every step, outside what a step may prefill. A prompt's last token does
    /// too: it costs a step no more than a token that decodes, and the first of the answer follows it.
    fn runs_always(&self) -> bool {
        self.is_decoding() || self.pending == 1
    }
}

/// Shares steps out.
#[derive(Clone, Debug, Default)]
pub struct Scheduler {
    /// The client whose prefill came first in the last step that had any.
    served: Option<ClientId>,
}

impl Scheduler {
    /// Picks the spans of the next step: sequence and number of tokens. At most `prefill_tokens` go to
    /// sequences that do not run always.
    pub fn plan(&mut self, runnable: &[Runnable<'_>], prefill_tokens: u32) -> Vec<(u64, u32)> {
        let always = runnable.iter().filter(|run| run.runs_always());
        let mut spans: Vec<(u64, u32)> = always.map(|run| (run.sequence, run.pending)).collect();
        let mut left = prefill_tokens;
        let mut first = None;
        for run in self.by_rotation(runnable) {
            let tokens = run.pending.min(run.span_max).min(left);
            if tokens == 0 {
                break;
            }
            spans.push((run.sequence, tokens));
            left -= tokens;
            first.get_or_insert_with(|| run.client.clone());
        }
        if first.is_some() {
            self.served = first;
        }
        spans
    }

    /// Returns what prefills: by class, then the client after the last served first.
    fn by_rotation<'a, 'b>(&self, runnable: &'b [Runnable<'a>]) -> Vec<&'b Runnable<'a>> {
        let mut order: BTreeMap<_, Vec<&Runnable<'_>>> = BTreeMap::new();
        for run in runnable.iter().filter(|run| !run.runs_always()) {
            let was_served = self.served.as_ref().is_some_and(|served| run.client <= served);
            order.entry((run.class, was_served, run.client)).or_default().push(run);
        }
        order.into_values().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sequences with more than one token pending prefill, others decode.
    fn plan(scheduler: &mut Scheduler, runs: &[(u64, &str, u32, u32)], budget: u32) -> Vec<(u64, u32)> {
        let clients: Vec<ClientId> = runs.iter().map(|(_, client, _, _)| ClientId::from(*client)).collect();
        let runnable: Vec<Runnable<'_>> = runs
            .iter()
            .zip(&clients)
            .map(|(&(sequence, _, class, pending), client)| Runnable {
                sequence,
                client,
                class,
                kind: if pending > 1 { SpanKind::Prefill } else { SpanKind::Decode },
                pending,
                span_max: 512,
            })
            .collect();
        scheduler.plan(&runnable, budget)
    }

    #[test]
    fn decoding_sequences_all_run_and_prefill_gets_the_budget() {
        let mut scheduler = Scheduler::default();
        let runs = [(1, "a", 1, 1), (2, "a", 1, 900), (3, "b", 2, 1)];
        assert_eq!(plan(&mut scheduler, &runs, 64), [(1, 1), (3, 1), (2, 64)]);
    }

    #[test]
    fn a_draft_runs_whole_in_every_step_and_so_does_the_last_token_of_a_prompt() {
        let client = ClientId::from("a");
        let run = |sequence, kind, pending| Runnable {
            sequence,
            client: &client,
            class: 1,
            kind,
            pending,
            span_max: 512,
        };
        let runs = [run(1, SpanKind::Prefill, 9), run(2, SpanKind::Verify, 5), run(3, SpanKind::Prefill, 1)];
        assert_eq!(Scheduler::default().plan(&runs, 4), [(2, 5), (3, 1), (1, 4)]);
        assert_eq!(runs.map(|run| run.is_decoding()), [false, true, false]);
    }

    #[test]
    fn clients_rotate_at_prefill() {
        let mut scheduler = Scheduler::default();
        let runs = [(1, "a", 1, 900), (2, "a", 1, 900), (3, "b", 1, 900)];
        assert_eq!(plan(&mut scheduler, &runs, 64), [(1, 64)]);
        assert_eq!(plan(&mut scheduler, &runs, 64), [(3, 64)]);
        assert_eq!(plan(&mut scheduler, &runs, 64), [(1, 64)]);
    }

    #[test]
    fn a_higher_class_prefills_first_and_leaves_the_rest() {
        let mut scheduler = Scheduler::default();
        let runs = [(1, "a", 2, 900), (2, "b", 0, 10)];
        assert_eq!(plan(&mut scheduler, &runs, 64), [(2, 10), (1, 54)]);
    }
}
