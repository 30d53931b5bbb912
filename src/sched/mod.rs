//! Who runs next. Pure: it sees how far each sequence is and says how many tokens of it the next step
//! takes. Sequences that decode go first, all of them; what a step may prefill besides is shared between
//! clients in turn.

mod queue;

pub use queue::Queue;

use std::collections::BTreeSet;

use crate::ids::ClientId;

/// A running sequence.
#[derive(Clone, Copy, Debug)]
pub struct Runnable<'a> {
    /// Its number.
    pub sequence: u64,
    /// Whose it is.
    pub client: &'a ClientId,
    /// Tokens it has that are not in its KV cache yet; at least one.
    pub pending: u32,
    /// Most tokens of it that one step may take.
    pub span_max: u32,
}

/// Shares steps out.
#[derive(Clone, Debug, Default)]
pub struct Scheduler {
    /// The client whose prefill came first in the last step that had any.
    served: Option<ClientId>,
}

impl Scheduler {
    /// Picks the spans of the next step: sequence and number of tokens. At most `prefill_tokens` go to
    /// sequences with more than one token pending.
    pub fn plan(&mut self, runnable: &[Runnable<'_>], prefill_tokens: u32) -> Vec<(u64, u32)> {
        let decoding = runnable.iter().filter(|run| run.pending == 1);
        let mut spans: Vec<(u64, u32)> = decoding.map(|run| (run.sequence, 1)).collect();
        let mut left = prefill_tokens.max(1);
        let prefilling: Vec<&Runnable<'_>> = runnable.iter().filter(|run| run.pending > 1).collect();
        for (place, client) in self.order(&prefilling).into_iter().enumerate() {
            for run in prefilling.iter().filter(|run| *run.client == client) {
                let tokens = run.pending.min(run.span_max).min(left);
                if tokens > 0 {
                    spans.push((run.sequence, tokens));
                    left -= tokens;
                }
            }
            if place == 0 {
                self.served = Some(client);
            }
        }
        spans
    }

    /// The clients with something to prefill, the one after the last served first.
    fn order(&self, prefilling: &[&Runnable<'_>]) -> Vec<ClientId> {
        let clients: BTreeSet<&ClientId> = prefilling.iter().map(|run| run.client).collect();
        let (before, after): (Vec<&ClientId>, Vec<&ClientId>) = clients
            .into_iter()
            .partition(|client| self.served.as_ref().is_some_and(|served| *client <= served));
        after.into_iter().chain(before).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(scheduler: &mut Scheduler, runs: &[(u64, &str, u32)], budget: u32) -> Vec<(u64, u32)> {
        let clients: Vec<ClientId> = runs.iter().map(|(_, client, _)| ClientId::from(*client)).collect();
        let runnable: Vec<Runnable<'_>> = runs
            .iter()
            .zip(&clients)
            .map(|(&(sequence, _, pending), client)| Runnable { sequence, client, pending, span_max: 512 })
            .collect();
        scheduler.plan(&runnable, budget)
    }

    #[test]
    fn decoding_sequences_all_run_and_prefill_gets_the_budget() {
        let mut scheduler = Scheduler::default();
        let spans = plan(&mut scheduler, &[(1, "a", 1), (2, "a", 900), (3, "b", 1)], 64);
        assert_eq!(spans, [(1, 1), (3, 1), (2, 64)]);
    }

    #[test]
    fn clients_take_turns_at_prefill() {
        let mut scheduler = Scheduler::default();
        let runs = [(1, "a", 900), (2, "a", 900), (3, "b", 900)];
        assert_eq!(plan(&mut scheduler, &runs, 64), [(1, 64)]);
        assert_eq!(plan(&mut scheduler, &runs, 64), [(3, 64)]);
        assert_eq!(plan(&mut scheduler, &runs, 64), [(1, 64)]);
    }

    #[test]
    fn what_one_leaves_of_the_budget_goes_to_the_next() {
        let mut scheduler = Scheduler::default();
        assert_eq!(plan(&mut scheduler, &[(1, "a", 10), (2, "b", 900)], 64), [(1, 10), (2, 54)]);
    }
}
