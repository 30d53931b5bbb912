//! What a device keeps true of spans and of slots that are cut back, on the fake whose model is a hash of a
//! slot's content.

#![allow(clippy::cast_possible_truncation, reason = "the numbers here are small")]

use proptest::prelude::*;

use super::fake::{Fake, next_token, spec};
use super::{
    Backend, LoadStep, ModelId, RowOutput, RowResult, Sample, SlotId, Span, SpanKind, Step, TruncateError,
    Want,
};

const CAPACITY: u32 = 512;
const A: SlotId = SlotId { slab: 0, slot: 0 };
const B: SlotId = SlotId { slab: 0, slot: 1 };

struct Device {
    fake: Fake,
    model: ModelId,
}

fn ready(state_bytes: u64) -> Device {
    let mut fake = Fake::default();
    fake.state_bytes = state_bytes;
    let model = fake.load(fake.plan(&spec("m"), 0).unwrap()).unwrap();
    while !matches!(fake.load_more(model).unwrap(), LoadStep::Ready(_)) {}
    fake.open_slab(model, 0, CAPACITY, 2).unwrap();
    Device { fake, model }
}

impl Device {
    /// Runs one span from the `start`th token of a slot on, with a token drawn after each of its last
    /// `sampled` rows.
    fn run(&mut self, slot: SlotId, start: usize, tokens: &[u32], sampled: usize) -> Vec<u32> {
        let kind = match (sampled, tokens.len()) {
            (1, 1) => SpanKind::Decode,
            (sampled, all) if sampled == all => SpanKind::Verify,
            _ => SpanKind::Prefill,
        };
        let rows = (tokens.len() - sampled) as u32..tokens.len() as u32;
        let outputs = rows.map(|row| RowOutput { row, want: Want::Sample(Sample::default()) }).collect();
        let span = Span { slot, start: start as u32, kind, tokens: tokens.to_vec(), outputs };
        self.fake.launch(self.model, Step { spans: vec![span] }).unwrap();
        let drawn = |result| match result {
            RowResult::Token(token, _) => token,
            other => panic!("{other:?}"),
        };
        self.fake.collect(self.model).unwrap().into_iter().map(drawn).collect()
    }
}

#[derive(Clone, Debug)]
enum Act {
    Append(Vec<u32>),
    Checkpoint,
    Truncate(usize),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => prop::collection::vec(0..900u32, 1..9).prop_map(Act::Append),
        2 => Just(Act::Checkpoint),
        2 => any::<usize>().prop_map(Act::Truncate),
    ]
}

proptest! {
    #[test]
    fn a_verified_draft_draws_what_one_token_at_a_time_draws(
        prompt in prop::collection::vec(0..900u32, 1..40),
        draft in prop::collection::vec(0..900u32, 2..9),
    ) {
        let mut device = ready(0);
        device.run(A, 0, &prompt, 0);
        device.run(B, 0, &prompt, 0);
        let at_once = device.run(A, prompt.len(), &draft, draft.len());
        let one_by_one = (prompt.len()..).zip(&draft).flat_map(|(at, &token)| device.run(B, at, &[token], 1));
        prop_assert_eq!(at_once, one_by_one.collect::<Vec<_>>());
    }

    #[test]
    fn a_slot_that_was_cut_back_goes_on_as_if_it_had_never_been_longer(
        recurrent in any::<bool>(),
        acts in prop::collection::vec(act(), 1..40),
    ) {
        let mut device = ready(if recurrent { 40 } else { 0 });
        let mut content: Vec<u32> = Vec::new();
        // Lengths that recurrent states can come back to, without those that were dropped for being too many.
        let mut saved: Vec<u32> = Vec::new();
        for act in acts {
            match act {
                Act::Append(tokens) => {
                    device.run(A, content.len(), &tokens, 0);
                    content.extend(tokens);
                }
                Act::Checkpoint => {
                    device.fake.checkpoint(device.model, A, content.len() as u32).unwrap();
                    super::add_checkpoint(&mut saved, content.len() as u32);
                }
                Act::Truncate(place) => {
                    let (held, tokens) = (content.len() as u32, (place % (content.len() + 1)) as u32);
                    let possible = !recurrent || tokens == 0 || tokens == held || saved.contains(&tokens);
                    let expected = if possible { Ok(()) } else { Err(TruncateError::NoCheckpoint { tokens }) };
                    prop_assert_eq!(device.fake.truncate(device.model, A, held, tokens), expected);
                    if possible {
                        content.truncate(tokens as usize);
                        saved.retain(|&length| length <= tokens);
                    }
                }
            }
            let drawn = device.run(A, content.len(), &[7], 1);
            content.push(7);
            prop_assert_eq!(drawn, [next_token(&content)]);
        }
    }
}
