//! Estimates of times that follow what is seen.

/// Part of an estimate that one step replaces: the last few steps count. For the least time, faster ones
/// count for more: a step may be slow because a kernel was compiled for it, or because another program was
/// busy.
pub(super) const LEARNING_RATE: f64 = 0.25;
pub(super) const LEARNING_RATE_FASTER: f64 = 0.5;

/// Factor by which one step can raise an estimate at most.
pub(super) const RISE_MAX: f64 = 2.0;

/// Time to which any estimate can rise, in seconds: double of nothing is nothing.
pub(super) const TIME_MIN: f64 = 1e-6;

/// Learns the least time, as far as steps come near to it; `weight` is that of a slower step.
pub(super) fn learn(estimate: Option<f64>, seen: f64, weight: f64) -> f64 {
    match estimate {
        None => seen,
        Some(old) if seen < old => old + (seen - old) * LEARNING_RATE_FASTER,
        Some(old) => old + (seen.min((old * RISE_MAX).max(TIME_MIN)) - old) * LEARNING_RATE * weight,
    }
}
