//! One request in the engine: its tokens, how far they are computed (`sequence`), and what it is for:
//! `generate` or `score`. `sampling` says how its tokens are drawn, `dry` what it loses for repeating itself,
//! `reading` what its text says.

mod dry;
mod generate;
mod guide;
mod reading;
mod sampling;
mod score;
mod sequence;

pub(super) use guide::Mask;
#[cfg(test)]
pub(super) use sampling::uniform;
pub(super) use sequence::Sequence;

/// What a sequence is for.
#[derive(Debug)]
enum Task {
    Generate(Box<generate::Generation>),
    Score(Box<score::Scoring>),
}
