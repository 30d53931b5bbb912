//! Finds stop strings in a stream of text, wherever the stream is cut.
//!
//! The match that is complete first wins; of those complete at the same character the one that began
//! first, that is the longest; of equal strings the first in the list. So a match depends on the text
//! alone, never on the cuts, and is known as soon as its last character is there. Text that may be the
//! beginning of a match is held back. Knuth-Morris-Pratt, one automaton for each stop string: each byte
//! costs amortised O(stop strings).

use std::sync::Arc;

/// What a part of the stream led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text that belongs to no stop string; on a match, all that came before it.
    pub emit: String,
    /// The stop string that matched, as its place in the list.
    pub matched: Option<usize>,
}

/// The state of one stream.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Arc<[String]>,
    /// For each stop string and each length of a beginning of it: the longest shorter beginning that
    /// ends there too.
    borders: Vec<Vec<usize>>,
    /// How many bytes of each stop string the text ends with.
    progress: Vec<usize>,
    /// The end of the text that may begin a match: the longest of `progress`.
    held: String,
    done: bool,
}

impl StopMatcher {
    /// Starts a stream. Empty stop strings never match.
    #[must_use]
    pub fn new(stops: Arc<[String]>) -> Self {
        let borders = stops.iter().map(|stop| borders(stop.as_bytes())).collect();
        let progress = vec![0; stops.len()];
        Self { stops, borders, progress, held: String::new(), done: false }
    }

    /// Takes the next part of the text. After a match the stream is over: nothing more comes out.
    pub fn push(&mut self, text: &str) -> StopStep {
        if self.done {
            return StopStep::default();
        }
        if self.stops.is_empty() {
            return StopStep { emit: text.to_owned(), matched: None };
        }
        let mut emit = std::mem::take(&mut self.held);
        let before = emit.len();
        emit.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            if let Some(index) = self.advance(byte) {
                self.done = true;
                emit.truncate(before + at + 1 - self.stops[index].len());
                return StopStep { emit, matched: Some(index) };
            }
        }
        // A beginning of a stop string starts with a whole character, so this cuts none.
        let held = self.progress.iter().max().copied().unwrap_or(0);
        self.held = emit.split_off(emit.len() - held);
        StopStep { emit, matched: None }
    }

    /// Ends the stream and returns what was held back.
    pub fn finish(&mut self) -> String {
        self.done = true;
        std::mem::take(&mut self.held)
    }

    /// Moves every automaton on by a byte; the stop string that is complete now, if any.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        let mut matched: Option<usize> = None;
        for (index, stop) in self.stops.iter().enumerate() {
            let stop = stop.as_bytes();
            let progress = &mut self.progress[index];
            while *progress > 0 && stop[*progress] != byte {
                *progress = self.borders[index][*progress];
            }
            if stop.get(*progress) == Some(&byte) {
                *progress += 1;
                if *progress == stop.len() && matched.is_none_or(|best| self.stops[best].len() < stop.len()) {
                    matched = Some(index);
                }
            }
        }
        matched
    }
}

/// `borders[n]`: the length of the longest proper beginning of `stop[..n]` that is also its end.
fn borders(stop: &[u8]) -> Vec<usize> {
    let mut borders = vec![0; stop.len() + 1];
    let mut length = 0;
    for end in 1..stop.len() {
        while length > 0 && stop[length] != stop[end] {
            length = borders[length];
        }
        if stop[length] == stop[end] {
            length += 1;
        }
        borders[end + 1] = length;
    }
    borders
}
