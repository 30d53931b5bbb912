//! Counts that leave the daemon, or stand beside such, have 32 bits.

/// Saturates: a count that does not fit is beyond every limit.
#[must_use]
pub fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
