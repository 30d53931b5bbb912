//! The spans of a step: sequences that decode go first, all of them; what a step may prefill besides goes to
//! the highest priority class, and within it to clients in turn.

use std::collections::BTreeMap;

use crate::ids::ClientId;

/// A sequence that can run.
#[derive(Clone, Copy, Debug)]
pub struct Runnable<'a> {
    /// Its number.
    pub sequence: u64,
    /// Whose it is.
    pub client: &'a ClientId,
    /// Its priority class; 0 is the highest.
    pub class: u32,
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
        let mut first = None;
        for run in self.in_turn(runnable) {
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

    /// What has a prompt to run: by class, then the client after the last served first.
    fn in_turn<'a, 'b>(&self, runnable: &'b [Runnable<'a>]) -> Vec<&'b Runnable<'a>> {
        let mut turns: BTreeMap<_, Vec<&Runnable<'_>>> = BTreeMap::new();
        for run in runnable.iter().filter(|run| run.pending > 1) {
            let had_its_turn = self.served.as_ref().is_some_and(|served| run.client <= served);
            turns.entry((run.class, had_its_turn, run.client)).or_default().push(run);
        }
        turns.into_values().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(scheduler: &mut Scheduler, runs: &[(u64, &str, u32, u32)], budget: u32) -> Vec<(u64, u32)> {
        let clients: Vec<ClientId> = runs.iter().map(|(_, client, _, _)| ClientId::from(*client)).collect();
        let runnable: Vec<Runnable<'_>> = runs
            .iter()
            .zip(&clients)
            .map(|(&(sequence, _, class, pending), client)| Runnable {
                sequence,
                client,
                class,
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
    fn clients_take_turns_at_prefill() {
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
