//! Whether a parked cache that is about to be dropped is worth a file: whether computing it again would take
//! longer than writing it.

use std::time::Duration;

/// Bytes that a disk is taken to write in a second: what a SATA disk without moving parts does. Faster ones
/// are common, and a slower one only keeps a thread busy that nobody waits for.
const WRITE_BYTES_PER_SECOND: u64 = 500_000_000;

/// Returns whether a cache of `bytes` is worth a file, given the time that computing it takes. While that is
/// unknown it is not: then nothing was computed since the model was loaded, and what is parked was read from
/// a file itself.
#[must_use]
pub fn is_worth_saving(bytes: u64, computing: Option<Duration>) -> bool {
    let nanos = bytes.saturating_mul(1_000_000_000 / WRITE_BYTES_PER_SECOND);
    computing.is_some_and(|computing| computing > Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_is_saved_if_computing_it_takes_longer_than_writing_it() {
        let ms = |ms| Some(Duration::from_millis(ms));
        // 2,000 tokens of SmolLM2 135M on two cores, and of a small model on a large GPU.
        assert!(is_worth_saving(92_160_000, ms(7_900)));
        assert!(!is_worth_saving(65_536_000, ms(67)));
        assert!(!is_worth_saving(500_000_000, ms(1000)) && is_worth_saving(500_000_000, ms(1001)));
    }

    #[test]
    fn a_cache_of_unknown_cost_and_one_beyond_counting_are_not_saved() {
        assert!(!is_worth_saving(1, None));
        assert!(!is_worth_saving(u64::MAX, Some(Duration::from_secs(3600))));
    }
}
