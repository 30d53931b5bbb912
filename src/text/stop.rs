//! Finds stop strings in a stream of text, wherever the stream is cut.
//!
//! The match that ends first wins; of matches that end at the same character the longest; of equal strings
//! the first in the list. So a match depends on the text alone, never on the cuts, and is found at its last
//! character. Text that may be the prefix of a match is held back. Knuth-Morris-Pratt, one automaton for
//! each stop string: each byte costs amortised O(stop strings).

use std::sync::Arc;

/// The result of a part of the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text outside of stop strings; on a match, all text before it.
    pub emit: String,
    /// The index of the stop string that matched.
    pub matched: Option<usize>,
}

/// The state of one stream.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Arc<[String]>,
    /// By stop string and length of a prefix: the length of the longest shorter prefix that is its suffix.
    borders: Vec<Vec<usize>>,
    /// By stop string: the length of its longest prefix that the text ends with, in bytes.
    progress: Vec<usize>,
    /// The end of the text that may begin a match, as long as the largest `progress`.
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

    /// Takes the next part of the text. After a match the stream has ended: nothing more comes out.
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
        // A prefix of a stop string starts with a whole character, so this splits none.
        let held = self.progress.iter().max().copied().unwrap_or(0);
        self.held = emit.split_off(emit.len() - held);
        StopStep { emit, matched: None }
    }

    /// Ends a part of the stream, across whose end nothing matches, and returns the text held back.
    pub fn part(&mut self) -> String {
        self.progress.fill(0);
        std::mem::take(&mut self.held)
    }

    /// Ends the stream and returns the text held back.
    pub fn finish(&mut self) -> String {
        self.done = true;
        std::mem::take(&mut self.held)
    }

    /// Advances every automaton by a byte; returns the stop string that ends here, if any.
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

/// Returns `borders`, where `borders[n]` is the length of the longest proper prefix of `stop[..n]` that is
/// also its suffix.
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
