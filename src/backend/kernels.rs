//! What a device may be told by the configuration: the values of the keys `kernels` and `wired_limit`.

/// The set of kernels that models compute with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelChoice {
    /// The fastest set of the device.
    #[default]
    Auto,
    /// Our kernels for the CPU without extensions of its instruction set.
    Plain,
    /// Our kernels for x86-64 with AVX2 and FMA.
    Avx2,
    /// Our kernels for x86-64 with AVX-512.
    Avx512,
    /// Our kernels for arm64.
    Neon,
    /// Compositions of MLX's small operations, which also serve where our kernels do not.
    Composed,
    /// MLX's fused operations and nothing of ours, as on a Mac.
    Fused,
}

impl KernelChoice {
    /// All of them; the default first.
    pub const ALL: [Self; 7] =
        [Self::Auto, Self::Plain, Self::Avx2, Self::Avx512, Self::Neon, Self::Composed, Self::Fused];

    /// Returns the word for it in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Plain => "plain",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
            Self::Composed => "composed",
            Self::Fused => "fused",
        }
    }
}

/// Whether the weights of models are wired, so that macOS neither compresses nor swaps them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WiredLimit {
    /// MLX's limit is never set.
    #[default]
    Never,
    /// It is set when a model has been loaded, where the weights nearly fill the working set and enough
    /// memory stays free.
    Auto,
}
