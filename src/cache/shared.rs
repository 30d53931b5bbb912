//! What parked caches share, and what that saves: each segment of their chains is charged once. Here is
//! decided where a new cache parts from one that begins alike, and which segments it rather copies anew so
//! that chains stay short: a restore writes segment by segment, and each is two arrays in each layer.

use std::ops::Range;

use crate::backend::{Base, Chains, Held, NewChain, ParkedId};

/// Most segments of a chain.
pub const SEGMENTS_MAX: usize = 16;

/// Fewest tokens for which a segment is cut in two, so that a cache shares them: fewer are copied sooner than
/// that.
const SPLIT_TOKENS_MIN: u32 = 32;

/// Smallest part of a segment for which it is cut in two, as a divisor: a cut copies all of it.
const SPLIT_PART_MIN: u32 = 8;

/// How a cache shares the beginning of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// What it shares.
    pub base: Base,
    /// Tokens of the segment that has to be cut in two there; 0 where one ends.
    pub copied_tokens: u32,
}

/// The chains of a model's parked caches, without content.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    bytes_per_token: u64,
    state_bytes: u64,
    chains: Chains<(), ()>,
}

impl Shared {
    pub(super) fn new(bytes_per_token: u64, state_bytes: u64) -> Self {
        Self { bytes_per_token, state_bytes, chains: Chains::default() }
    }

    fn bytes_of(&self, held: Held) -> u64 {
        held.tokens * self.bytes_per_token + held.states * self.state_bytes
    }

    /// Returns the bytes of all of them.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes_of(self.chains.held())
    }

    /// Returns the same, counted segment by segment.
    pub(super) fn recounted_bytes(&self) -> u64 {
        self.bytes_of(self.chains.recounted())
    }

    /// Returns the bytes that a cache of `tokens` would add.
    pub(super) fn bytes_added(&self, base: Option<Base>, tokens: u32, checkpoints: &[u32]) -> u64 {
        self.bytes_of(self.chains.added(base, tokens, checkpoints))
    }

    /// Returns whether there is such a cache.
    pub(super) fn holds(&self, id: ParkedId) -> bool {
        self.chains.holds(id)
    }

    /// Returns the number of caches.
    pub(super) fn caches(&self) -> usize {
        self.chains.len()
    }

    /// Returns the number of segments.
    pub(super) fn segments(&self) -> usize {
        self.chains.segments()
    }

    /// Returns what a cache of `tokens` shares with one of which it has the first `common`. Where that one
    /// goes for it (`replaces`), its last segments are copied anew if each is no longer than what is copied
    /// besides: so a chain has few segments, and each token is copied few times.
    pub(super) fn cut(&self, id: ParkedId, common: u32, tokens: u32, replaces: bool) -> Option<Cut> {
        let stretches: Vec<_> = self.chains.stretches(id).collect();
        let whole = stretches.iter().take_while(|stretch| stretch.tokens.end <= common).count();
        let mut shared = &stretches[..whole.min(SEGMENTS_MAX - 1)];
        while replaces
            && let Some((last, rest)) = shared.split_last()
            && !last.is_shared
            && last.tokens.end - last.tokens.start <= tokens - last.tokens.end
        {
            shared = rest;
        }
        let tokens = shared.last()?.tokens.end;
        Some(Cut { base: Base { id, tokens }, copied_tokens: 0 })
    }

    /// Returns what a cache shares with one of which it has the first `common` tokens, if a segment is worth
    /// to be cut in two for it.
    pub(super) fn cut_within(&self, id: ParkedId, common: u32) -> Option<Cut> {
        let base = Base { id, tokens: common };
        let (place, parted) =
            self.chains.stretches(id).enumerate().find(|(_, stretch)| stretch.tokens.end > common)?;
        let Range { start, end } = parted.tokens;
        let least = SPLIT_TOKENS_MIN.max((end - start) / SPLIT_PART_MIN);
        let is_worth_it = common.saturating_sub(start) >= least;
        let is_short = place + 2 <= SEGMENTS_MAX && self.may_split(base);
        (is_worth_it && is_short).then(|| Cut { base, copied_tokens: end - start })
    }

    /// Returns whether the segment around a place may be cut in two.
    pub(super) fn may_split(&self, at: Base) -> bool {
        self.chains.longest_through(at) < SEGMENTS_MAX
    }

    /// Returns what a cache whose content comes in parts shares with one of which it has the first `common`
    /// tokens, given where the parts start: everything before the last that can be.
    pub(super) fn cut_at(&self, id: ParkedId, common: u32, starts: &[u32]) -> Option<Cut> {
        let stretches: Vec<_> = self.chains.stretches(id).map(|stretch| stretch.tokens).collect();
        let shared = starts.iter().enumerate().rev().filter(|(_, start)| **start > 0 && **start <= common);
        let cuts = shared.map(|(index, &tokens)| {
            let before = stretches.iter().filter(|of| of.start < tokens).count();
            let parted = stretches.iter().find(|of| of.start < tokens && tokens < of.end);
            let copied_tokens = parted.map_or(0, |of| of.end - of.start);
            (Cut { base: Base { id, tokens }, copied_tokens }, before + starts.len() - index)
        });
        let mut short = cuts.filter(|(_, segments)| *segments <= SEGMENTS_MAX).map(|(cut, _)| cut);
        short.find(|cut| cut.copied_tokens == 0 || self.may_split(cut.base))
    }

    /// Returns the bytes of a cache of `tokens` by itself.
    pub(super) fn bytes_of_parts(&self, tokens: u32, checkpoints: &[u32]) -> u64 {
        self.bytes_of(Held { tokens: tokens.into(), states: checkpoints.len() as u64 })
    }

    /// Cuts the segment around a place in two.
    pub(super) fn split(&mut self, at: Base) {
        let Ok(()) = self.chains.split(at, |&(), _| Ok::<_, std::convert::Infallible>(((), ())));
    }

    /// Adds a cache.
    pub(super) fn add(&mut self, id: ParkedId, base: Option<Base>, tokens: u32, checkpoints: &[u32]) {
        let states = checkpoints.iter().map(|&length| (length, ())).collect();
        self.chains.add(id, NewChain { base, tokens, tail: (), states });
    }

    /// Adds a cache of several segments after its base, each with the end given.
    pub(super) fn add_parts(&mut self, id: ParkedId, base: Option<Base>, ends: &[u32], checkpoints: &[u32]) {
        let states = checkpoints.iter().map(|&length| (length, ())).collect();
        self.chains.add_parts(id, base, ends.iter().map(|&end| (end, ())), states);
    }

    /// Removes a cache, and what no other one has of it.
    pub(super) fn remove(&mut self, id: ParkedId) {
        self.chains.remove(id);
    }
}
