//! What a grammar may cost.

/// What a grammar may cost. Each is a key of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrammarLimits {
    /// Bytes of its text.
    pub bytes_max: usize,
    /// Brackets within each other.
    pub depth_max: usize,
    /// Work to compile it, in units of a microsecond, about: nodes of expressions, and what is copied and
    /// compared.
    pub work_max: u64,
}

impl Default for GrammarLimits {
    fn default() -> Self {
        Self { bytes_max: 512 << 10, depth_max: 64, work_max: 1_000_000 }
    }
}
