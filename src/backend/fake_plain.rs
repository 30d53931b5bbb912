//! The fake backend's parked caches as plain data: a token is its number in [`KV_BYTES`] bytes, and the state
//! after some tokens is a hash of them, so that a wrong segment or state is seen where it is imported.

use std::any::Any;
use std::sync::Arc;

use super::fake::KV_BYTES;
use super::{
    BuildKv, Chains, ImportError, Importing, KvArray, KvArrays, KvBuilding, KvContent, KvElement, KvLayout,
    KvPart, KvSegment, ParkedId, Span, SpanKind, Want, check_segments,
};
use crate::error::Error;

/// Returns the arrays of the fake's caches.
pub(super) fn layout(state_bytes: u64) -> KvLayout {
    let small = |bytes: u64| u32::try_from(bytes).unwrap();
    let tokens = KvArray::PerToken { heads: 1, elements: small(KV_BYTES), element: KvElement::Int8 };
    let state = KvArray::PerSequence { shape: vec![small(state_bytes)], element: KvElement::Int8 };
    KvLayout { arrays: std::iter::once(tokens).chain((state_bytes > 0).then_some(state)).collect() }
}

/// Checks that a span's outputs are what its kind says.
pub(super) fn check(span: &Span) {
    let rows: Vec<u32> = span.outputs.iter().map(|output| output.row).collect();
    let all: Vec<u32> = (0..).take(span.tokens.len()).collect();
    let sampled = span.outputs.iter().all(|output| matches!(output.want, Want::Sample(_)));
    assert!(rows.is_sorted() && rows.iter().all(|row| all.contains(row)), "rows with outputs are the span's");
    match span.kind {
        SpanKind::Prefill => assert!(!all.is_empty(), "a span has tokens"),
        SpanKind::Decode => {
            assert!(all.len() == 1 && rows == all && sampled, "a decode draws after its token");
        }
        SpanKind::Verify => {
            assert!(all.len() > 1 && rows == all && sampled, "a draft draws after each token");
        }
    }
}

#[derive(Debug)]
struct FakeArrays(Vec<Vec<u8>>);

impl KvArrays for FakeArrays {
    fn bytes(&self) -> Result<Vec<&[u8]>, Error> {
        Ok(self.0.iter().map(Vec::as_slice).collect())
    }
}

/// Returns the bytes of tokens.
fn bytes_of(tokens: &[u32]) -> Vec<u8> {
    let width = usize::try_from(KV_BYTES).unwrap();
    let bytes = |token: &u32| {
        let mut bytes = token.to_le_bytes().to_vec();
        bytes.resize(width, 0);
        bytes
    };
    tokens.iter().flat_map(bytes).collect()
}

/// Returns the bytes of the state after some tokens.
fn state_of(tokens: &[u32], state_bytes: u64) -> Vec<u8> {
    next_token(tokens).to_le_bytes().into_iter().cycle().take(usize::try_from(state_bytes).unwrap()).collect()
}

/// Returns the tokens of bytes.
fn tokens_of(bytes: &[u8]) -> Vec<u32> {
    let tokens = bytes.chunks(usize::try_from(KV_BYTES).unwrap());
    tokens.map(|token| u32::from_le_bytes(*token.first_chunk().unwrap())).collect()
}

fn content(array: Vec<u8>) -> KvContent {
    Arc::new(FakeArrays(vec![array]))
}

pub(super) fn export(chains: &Chains<Vec<u32>, ()>, id: ParkedId, state_bytes: u64) -> Vec<KvSegment> {
    let all: Vec<u32> = chains.content(id, u32::MAX).flat_map(|(_, tokens)| tokens.clone()).collect();
    let segments = chains.content(id, u32::MAX).map(|(tokens, own)| {
        let saved = chains.states(id).map(|(length, ())| length);
        let inside =
            saved.filter(|length| state_bytes > 0 && tokens.start < *length && *length <= tokens.end);
        let state = |length: u32| (length, content(state_of(&all[..length as usize], state_bytes)));
        let states = inside.map(state).collect();
        KvSegment { tokens: tokens.clone(), content: content(bytes_of(own)), states }
    });
    segments.collect()
}

/// Imports a cache; returns the number of its own tokens.
pub(super) fn import(
    chains: &mut Chains<Vec<u32>, ()>,
    importing: Importing,
    state_bytes: u64,
) -> Result<u64, ImportError> {
    let Importing { id, base, segments } = importing;
    let start = base.map_or(0, |base| base.tokens);
    let end = check_segments(start, &segments)?;
    let layout = layout(state_bytes);
    let taken = |content: &KvContent, part, tokens| {
        let content: &dyn Any = &**content;
        let unfit = || ImportError::Unfit("arrays that it does not have".into());
        let [array] = &content.downcast_ref::<FakeArrays>().ok_or_else(unfit)?.0[..] else {
            return Err(unfit());
        };
        if array.len() as u64 == layout.bytes(part, tokens) { Ok(array.clone()) } else { Err(unfit()) }
    };
    let mut all: Vec<u32> = base.map_or(vec![], |base| {
        let of_base = chains.content(base.id, base.tokens);
        of_base.flat_map(|(range, tokens)| tokens[..range.len()].to_vec()).collect()
    });
    let of_base = base.into_iter().flat_map(|base| chains.states(base.id)).map(|(length, ())| length);
    let of_base = of_base.filter(|length| *length <= start);
    let mut states: Vec<(u32, ())> = of_base.map(|length| (length, ())).collect();
    let mut parts = Vec::new();
    for KvSegment { tokens, content, states: saved } in segments {
        let own = tokens_of(&taken(&content, KvPart::Tokens, tokens.end - tokens.start)?);
        all.extend(&own);
        parts.push((tokens.end, own));
        for (length, content) in saved {
            let state = taken(&content, KvPart::States, 0)?;
            assert_eq!(
                state,
                state_of(&all[..length as usize], state_bytes),
                "a state is that of its tokens"
            );
            states.push((length, ()));
        }
    }
    chains.add_parts(id, base, parts, states);
    Ok(u64::from(end - start))
}

#[derive(Debug)]
pub(super) struct FakeBuilder;

impl BuildKv for FakeBuilder {
    fn begin(&self) -> Box<dyn KvBuilding> {
        Box::new(Building(Vec::new()))
    }
}

struct Building(Vec<Vec<u8>>);

impl KvBuilding for Building {
    fn add(&mut self, array: &KvArray, tokens: u32, bytes: &[u8]) -> Result<(), Error> {
        if bytes.len() as u64 != array.bytes(tokens) {
            return Err(Error::Internal("bytes that an array does not have".into()));
        }
        self.0.push(bytes.to_vec());
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<KvContent, Error> {
        Ok(Arc::new(FakeArrays(self.0)))
    }
}

/// The token after a context; the vocabulary's last one never is.
pub(crate) fn next_token(context: &[u32]) -> u32 {
    let mix = |hash: u32, token: &u32| (hash ^ token).wrapping_mul(0x0100_0193);
    context.iter().fold(0x811c_9dc5, mix) % 999
}

/// Returns the token that is drawn after a context: that of the uniform number, unless it is greedy.
pub(crate) fn drawn_token(context: &[u32], temperature: f32, uniform: f32) -> u32 {
    match next_token(context) {
        likely if temperature == 0.0 => likely,
        likely => next_token(&[likely, uniform.to_bits()]),
    }
}

/// Returns the allowed token that takes the place of a drawn one.
pub(crate) fn among(token: u32, allowed: &[u32]) -> u32 {
    let all = 0..u32::try_from(allowed.len() * 32).unwrap();
    let ids: Vec<u32> = all.filter(|id| allowed[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
    assert!(!ids.is_empty(), "something is allowed");
    if ids.contains(&token) { token } else { ids[token as usize % ids.len()] }
}
