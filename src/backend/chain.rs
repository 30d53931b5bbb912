//! Chains of segments: how parked caches share what they have in common. A *segment* holds the KV of some
//! consecutive tokens. A parked cache is a chain of segments from the first token on; caches that begin alike
//! have their first segments in common, and a segment is freed with the last chain that uses it. The states
//! of a checkpoint belong to the segment that ends at it or has it inside, and are freed with the last cache
//! that can be cut back to it.
//!
//! The engine has the chains without content, for its ledger; a device has the same ones with content. What
//! one does to them, the other does too.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Base, ParkedId};

/// Number of a segment.
type SegmentId = u64;

/// Parked caches as chains. `T` is the content of a segment, `S` the states of a checkpoint.
#[derive(Clone, Debug)]
pub struct Chains<T, S> {
    segments: BTreeMap<SegmentId, Segment<T, S>>,
    chains: BTreeMap<ParkedId, Chain>,
    segment_next: SegmentId,
    held: Held,
}

#[derive(Clone, Debug)]
struct Segment<T, S> {
    tokens: Range<u32>,
    content: T,
    /// Number of chains that have it.
    users: u32,
    /// Checkpoints by their lengths, each with the number of chains that have it.
    states: BTreeMap<u32, (S, u32)>,
}

#[derive(Clone, Debug)]
struct Chain {
    segments: Vec<SegmentId>,
    checkpoints: Vec<u32>,
}

/// A cache to add.
#[derive(Clone, Debug)]
pub struct NewChain<T, S> {
    /// What it shares.
    pub base: Option<Base>,
    /// Number of its tokens.
    pub tokens: u32,
    /// Content of the tokens after the base; unused where there are none.
    pub tail: T,
    /// The lengths to which it can be cut back, ascending, and the states there; those that another chain
    /// has of a shared segment are dropped.
    pub states: Vec<(u32, S)>,
}

/// What chains hold together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Number of tokens.
    pub tokens: u64,
    /// Number of checkpoints.
    pub states: u64,
}

/// A segment of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Its tokens.
    pub tokens: Range<u32>,
    /// Whether another chain has it too.
    pub is_shared: bool,
}

impl<T, S> Default for Chains<T, S> {
    fn default() -> Self {
        Self { segments: BTreeMap::new(), chains: BTreeMap::new(), segment_next: 0, held: Held::default() }
    }
}

impl<T, S> Chains<T, S> {
    /// Returns what they hold together.
    #[must_use]
    pub fn held(&self) -> Held {
        self.held
    }

    /// Returns the same, counted segment by segment.
    #[must_use]
    pub fn recounted(&self) -> Held {
        self.segments.values().fold(Held::default(), Held::with)
    }

    /// Returns the number of chains.
    #[must_use]
    pub fn len(&self) -> usize {
        self.chains.len()
    }

    /// Returns whether there is such a chain.
    #[must_use]
    pub fn holds(&self, id: ParkedId) -> bool {
        self.chains.contains_key(&id)
    }

    /// Returns whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// Returns the number of segments.
    #[must_use]
    pub fn segments(&self) -> usize {
        self.segments.len()
    }

    /// Returns the segments of a chain, in order; none if there is no such chain.
    pub fn stretches(&self, id: ParkedId) -> impl Iterator<Item = Stretch> {
        self.of(id).map(|segment| Stretch { tokens: segment.tokens.clone(), is_shared: segment.users > 1 })
    }

    /// Returns the content of the first `tokens` of a chain: the tokens of each segment that are among them,
    /// and the whole segment's content.
    pub fn content(&self, id: ParkedId, tokens: u32) -> impl Iterator<Item = (Range<u32>, &T)> {
        let wanted = self.of(id).take_while(move |segment| segment.tokens.start < tokens);
        wanted.map(move |segment| {
            let Range { start, end } = segment.tokens;
            (start..end.min(tokens), &segment.content)
        })
    }

    /// Returns the checkpoints of a chain, ascending, with their states.
    pub fn states(&self, id: ParkedId) -> impl Iterator<Item = (u32, &S)> {
        let chain = self.chains.get(&id);
        let lengths = chain.map_or(&[][..], |chain| &chain.checkpoints).iter();
        lengths.filter_map(move |&length| {
            let segment = self.of(id).find(|segment| segment.has(length))?;
            Some((length, &segment.states.get(&length)?.0))
        })
    }

    /// Returns what a new chain would hold that is not held yet.
    #[must_use]
    pub fn added(&self, base: Option<Base>, tokens: u32, checkpoints: &[u32]) -> Held {
        let shared = base.map_or(0, |base| base.tokens);
        let is_there = |length: u32| {
            let mut segments = base.into_iter().flat_map(|base| self.of(base.id));
            length <= shared && segments.any(|segment| segment.states.contains_key(&length))
        };
        let new = checkpoints.iter().filter(|&&length| !is_there(length));
        Held { tokens: u64::from(tokens.saturating_sub(shared)), states: new.count() as u64 }
    }

    /// Returns the number of segments of the longest chain that has the segment around the cut.
    #[must_use]
    pub fn longest_through(&self, cut: Base) -> usize {
        let Some((segment, _)) = self.around(cut) else { return 0 };
        let through = self.chains.values().filter(|chain| chain.segments.contains(&segment));
        through.map(|chain| chain.segments.len()).max().unwrap_or(0)
    }

    /// Adds a chain.
    ///
    /// # Panics
    /// No segment ends where its base does: that is for [`Self::split`].
    pub fn add(&mut self, id: ParkedId, new: NewChain<T, S>) {
        let NewChain { base, tokens, tail, states } = new;
        let start = base.map_or(0, |base| base.tokens);
        self.add_parts(id, base, (start < tokens).then_some((tokens, tail)), states);
    }

    /// Adds a chain of several segments after its base: where each ends, ascending, and its content.
    ///
    /// # Panics
    /// No segment ends where its base does, or one is empty.
    pub fn add_parts(
        &mut self,
        id: ParkedId,
        base: Option<Base>,
        parts: impl IntoIterator<Item = (u32, T)>,
        states: Vec<(u32, S)>,
    ) {
        let mut segments = self.shared(base);
        let mut start = base.map_or(0, |base| base.tokens);
        for (end, content) in parts {
            assert!(start < end, "a segment has tokens");
            let segment = Segment { tokens: start..end, content, users: 0, states: BTreeMap::new() };
            segments.push(self.put(segment));
            self.held.tokens += u64::from(end - start);
            start = end;
        }
        let mut checkpoints = Vec::new();
        for (length, state) in states {
            if self.save(&segments, length, state) {
                checkpoints.push(length);
            }
        }
        for segment in &segments {
            self.segments.get_mut(segment).into_iter().for_each(|segment| segment.users += 1);
        }
        let replaced = self.chains.insert(id, Chain { segments, checkpoints });
        assert!(replaced.is_none(), "a parked cache has a number of its own");
    }

    /// Removes a chain, and what no other one has of it.
    pub fn remove(&mut self, id: ParkedId) {
        let Some(Chain { segments, checkpoints }) = self.chains.remove(&id) else { return };
        for id in segments {
            let Some(segment) = self.segments.get_mut(&id) else { continue };
            let before = segment.states.len();
            let own: Vec<u32> = checkpoints.iter().copied().filter(|&length| segment.has(length)).collect();
            segment.states.retain(|length, (_, users)| {
                *users -= u32::from(own.contains(length));
                *users > 0
            });
            self.held.states -= (before - segment.states.len()) as u64;
            segment.users -= 1;
            if segment.users == 0 {
                self.held.tokens -= u64::from(segment.tokens.end - segment.tokens.start);
                self.segments.remove(&id);
            }
        }
    }

    /// Cuts the segment around a place in two, for all chains that have it; `cut` gets its content and the
    /// number of its first tokens, and returns copies of both parts.
    ///
    /// # Errors
    /// What `cut` returns; then nothing has changed.
    pub fn split<E>(&mut self, at: Base, cut: impl FnOnce(&T, u32) -> Result<(T, T), E>) -> Result<(), E> {
        let Some((id, tokens)) = self.around(at) else { return Ok(()) };
        let Some(front) = self.segments.get_mut(&id) else { return Ok(()) };
        let (first, content) = cut(&front.content, at.tokens - tokens.start)?;
        front.content = first;
        front.tokens.end = at.tokens;
        let (users, states) = (front.users, front.states.split_off(&(at.tokens + 1)));
        let back = self.put(Segment { tokens: at.tokens..tokens.end, content, users, states });
        for Chain { segments, .. } in self.chains.values_mut() {
            if let Some(place) = segments.iter().position(|segment| *segment == id) {
                segments.insert(place + 1, back);
            }
        }
        Ok(())
    }

    fn of(&self, id: ParkedId) -> impl Iterator<Item = &Segment<T, S>> {
        let chain = self.chains.get(&id);
        let segments = chain.map_or(&[][..], |chain| &chain.segments);
        segments.iter().filter_map(|segment| self.segments.get(segment))
    }

    /// Returns the segment that has tokens on both sides of a place, and its tokens.
    fn around(&self, at: Base) -> Option<(SegmentId, Range<u32>)> {
        let chain = self.chains.get(&at.id)?;
        let of = |id: &SegmentId| Some((*id, self.segments.get(id)?.tokens.clone()));
        let mut segments = chain.segments.iter().filter_map(of);
        segments.find(|(_, tokens)| tokens.start < at.tokens && at.tokens < tokens.end)
    }

    /// Returns the segments of a base.
    fn shared(&self, base: Option<Base>) -> Vec<SegmentId> {
        let Some(base) = base else { return Vec::new() };
        let chain = self.chains.get(&base.id).map_or(&[][..], |chain| &chain.segments);
        let end = |id: &SegmentId| self.segments.get(id).map_or(0, |segment| segment.tokens.end);
        let shared: Vec<SegmentId> = chain.iter().copied().take_while(|id| end(id) <= base.tokens).collect();
        assert_eq!(shared.last().map_or(0, end), base.tokens, "a base ends where a segment does");
        shared
    }

    fn put(&mut self, segment: Segment<T, S>) -> SegmentId {
        let id = self.segment_next;
        self.segment_next += 1;
        self.segments.insert(id, segment);
        id
    }

    /// Adds a checkpoint of a chain with these segments; returns false if it is beyond them.
    fn save(&mut self, segments: &[SegmentId], length: u32, state: S) -> bool {
        let has = |id: &&SegmentId| self.segments.get(id).is_some_and(|segment| segment.has(length));
        let Some(id) = segments.iter().find(has).copied() else { return false };
        let Some(segment) = self.segments.get_mut(&id) else { return false };
        let held = &mut self.held.states;
        let (_, users) = segment.states.entry(length).or_insert_with(|| {
            *held += 1;
            (state, 0)
        });
        *users += 1;
        true
    }
}

impl Held {
    /// Returns the sum of this and a segment.
    fn with<T, S>(self, segment: &Segment<T, S>) -> Self {
        Self {
            tokens: self.tokens + u64::from(segment.tokens.end - segment.tokens.start),
            states: self.states + segment.states.len() as u64,
        }
    }
}

impl<T, S> Segment<T, S> {
    /// Returns whether the checkpoint of this length is its own.
    fn has(&self, length: u32) -> bool {
        self.tokens.start < length && length <= self.tokens.end
    }
}
