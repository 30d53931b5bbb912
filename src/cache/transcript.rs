//! A sequence's tokens, without a copy of the context: the prompt as its caller shares it, and what was
//! generated after it. Transcripts are compared by tokens and by media, so that equal placeholder tokens with
//! other media differ.

use std::cmp::Ordering;
use std::ops::Range;

use crate::count::common_start;
use crate::prompt::{MediaSpan, Prompt};

/// A prompt and the tokens generated after it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    prompt: Prompt,
    generated: Vec<u32>,
}

impl Transcript {
    /// Returns the transcript of a prompt.
    #[must_use]
    pub fn new(prompt: Prompt) -> Self {
        Self { prompt, generated: Vec::new() }
    }

    /// Returns the prompt.
    #[must_use]
    pub fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    /// Returns the generated tokens.
    #[must_use]
    pub fn generated(&self) -> &[u32] {
        &self.generated
    }

    /// Returns the generated tokens.
    #[must_use]
    pub fn into_generated(self) -> Vec<u32> {
        self.generated
    }

    /// Adds a generated token.
    pub fn push(&mut self, token: u32) {
        self.generated.push(token);
    }

    /// Returns the number of tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.prompt.len() + self.generated.len()
    }

    /// Returns whether there is no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the tokens of a range.
    pub fn tokens(&self, range: Range<usize>) -> impl Iterator<Item = u32> {
        let prompt = self.prompt.len();
        let rest = range.start.saturating_sub(prompt)..range.end.saturating_sub(prompt);
        slice(&self.prompt.tokens, range).iter().chain(slice(&self.generated, rest)).copied()
    }

    /// Returns the last `count` tokens.
    pub fn last(&self, count: usize) -> impl Iterator<Item = u32> {
        self.tokens(self.len().saturating_sub(count)..self.len())
    }

    /// Returns the number of tokens that both begin with, media included. The last of them may stand within a
    /// media span that both have.
    #[must_use]
    pub fn common_prefix(&self, other: &Self) -> usize {
        #[cfg(test)]
        tests::COMPARED.with(|compared| compared.set(compared.get() + 1));
        let tokens = common(self.parts(), other.parts());
        let (own, others) = (&self.prompt.media, &other.prompt.media);
        let same = common_start(own, others);
        // Where one has media that the other has not, they part.
        let parted = [own.get(same), others.get(same)].into_iter().flatten().map(|span| span.at as usize);
        parted.fold(tokens, usize::min)
    }

    /// Returns the most of the first `tokens` that do not end within a media span.
    #[must_use]
    pub fn whole(&self, tokens: usize) -> usize {
        let cut =
            |span: &&MediaSpan| (span.at as usize) < tokens && tokens < span.at as usize + span.len as usize;
        self.prompt.media.iter().find(cut).map_or(tokens, |span| span.at as usize)
    }

    /// Returns the transcript of the first `count` tokens and the media that begin in them. Shares the prompt
    /// if it is whole.
    #[must_use]
    pub fn first(&self, count: usize) -> Self {
        if count < self.prompt.len() {
            let tokens = self.prompt.tokens[..count].into();
            let media = self.prompt.media.iter().filter(|span| (span.at as usize) < count).copied().collect();
            return Self::new(Prompt { tokens, media });
        }
        let generated = slice(&self.generated, 0..count - self.prompt.len()).to_vec();
        Self { prompt: self.prompt.clone(), generated }
    }

    /// Compares with the first `count` tokens of another transcript, as words in a dictionary: transcripts
    /// that begin alike stand together.
    #[must_use]
    pub fn compare(&self, other: &Self, count: usize) -> Ordering {
        let at = self.common_prefix(other).min(count);
        self.cell(at).cmp(&other.cell(at).filter(|_| at < count))
    }

    /// Returns the token in a place, and the media that begin there.
    fn cell(&self, at: usize) -> Option<(u32, Option<&MediaSpan>)> {
        let token = self.tokens(at..at + 1).next()?;
        Some((token, self.prompt.media.iter().find(|span| span.at as usize == at)))
    }

    fn parts(&self) -> [&[u32]; 2] {
        [&self.prompt.tokens, &self.generated]
    }
}

/// Returns the tokens of a range, as far as there are any.
fn slice(tokens: &[u32], range: Range<usize>) -> &[u32] {
    let end = range.end.min(tokens.len());
    &tokens[range.start.min(end)..end]
}

/// Returns the number of tokens that two sequences of parts begin with in common.
fn common<'a>(mut a: [&'a [u32]; 2], mut b: [&'a [u32]; 2]) -> usize {
    let mut count = 0;
    loop {
        for parts in [&mut a, &mut b] {
            if parts[0].is_empty() {
                *parts = [parts[1], &[]];
            }
        }
        let next = a[0].len().min(b[0].len());
        let same = common_start(&a[0][..next], &b[0][..next]);
        count += same;
        if same < next || next == 0 {
            return count;
        }
        (a[0], b[0]) = (&a[0][next..], &b[0][next..]);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::Cell;

    use proptest::prelude::*;

    use super::*;

    thread_local! {
        /// Number of comparisons of two transcripts on this thread.
        pub(in crate::cache) static COMPARED: Cell<usize> = const { Cell::new(0) };
    }

    fn transcript(prompt: &[u32], generated: &[u32]) -> Transcript {
        Transcript { prompt: prompt.to_vec().into(), generated: generated.to_vec() }
    }

    #[test]
    fn ranges_reach_over_prompt_and_output() {
        let all = transcript(&[1, 2, 3], &[4, 5]);
        let range = |range| all.tokens(range).collect::<Vec<_>>();
        assert_eq!(range(0..5), [1, 2, 3, 4, 5]);
        assert_eq!(range(2..4), [3, 4]);
        assert_eq!(range(4..9), [5]);
        assert_eq!(all.last(3).collect::<Vec<_>>(), [3, 4, 5]);
        assert_eq!(all.last(9).count(), 5);
    }

    #[test]
    fn long_transcripts_part_where_their_tokens_do() {
        let tokens: Vec<u32> = (0..300).collect();
        for at in [0, 1, 63, 64, 65, 200, 299] {
            let mut other = tokens.clone();
            other[at] += 1;
            assert_eq!(transcript(&tokens, &[]).common_prefix(&transcript(&other, &[])), at);
            assert_eq!(
                transcript(&tokens[..at], &tokens[at..]).common_prefix(&transcript(&tokens, &[])),
                300
            );
        }
    }

    #[test]
    fn a_shortened_transcript_keeps_nothing_of_the_rest() {
        let media = [MediaSpan { at: 1, len: 2, hash: [7; 32] }, MediaSpan { at: 4, len: 1, hash: [8; 32] }];
        let prompt = Prompt { tokens: [1, 2, 3, 4, 5].into(), media: media.into() };
        let all = Transcript { prompt, generated: vec![6, 7] };
        let short = all.first(2);
        assert_eq!((&*short.prompt.tokens, &*short.prompt.media), (&[1, 2][..], &media[..1]));
        assert_eq!(short.common_prefix(&all), 2);
        let long = all.first(6);
        assert!(std::sync::Arc::ptr_eq(&long.prompt.tokens, &all.prompt.tokens));
        assert_eq!(long.generated, [6]);
        assert_eq!(all.first(9), all);
    }

    proptest! {
        #[test]
        fn the_common_prefix_does_not_depend_on_who_wrote_the_tokens(
            a in prop::collection::vec(0..2u32, 0..12),
            b in prop::collection::vec(0..2u32, 0..12),
            cuts in (0..12usize, 0..12usize),
        ) {
            let expected = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
            let cut = |tokens: &[u32], at: usize| {
                let (prompt, generated) = tokens.split_at(at.min(tokens.len()));
                transcript(prompt, generated)
            };
            prop_assert_eq!(cut(&a, cuts.0).common_prefix(&cut(&b, cuts.1)), expected);
            let count = cuts.0.min(b.len());
            prop_assert_eq!(cut(&a, cuts.1).compare(&cut(&b, cuts.0), count), a[..].cmp(&b[..count]));
        }
    }
}
