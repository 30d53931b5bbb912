//! Everything that names MLX below the architectures. Runs on the engine thread only.
//!
//! Modules import only what stands before them: `ffi` (mlx-c and our own operations), `rope` (tables of
//! rotations) and `batch` (a packed step), `kv` (storage of KV caches), `kernels` (what computes: one file a
//! set), `tensors` (a model's files while it loads), `layers`. `sampler` stands beside them. `models` builds
//! on `layers`, and `device` on both.

pub(crate) mod batch;
pub(crate) mod ffi;
pub(crate) mod kernels;
pub(crate) mod kv;
pub(crate) mod layers;
pub(crate) mod rope;
pub(crate) mod sampler;
pub(crate) mod tensors;

pub use ffi::prepare;

use crate::error::Error;

impl From<mlx_rs::error::Exception> for Error {
    fn from(exception: mlx_rs::error::Exception) -> Self {
        Self::Internal(format!("MLX: {exception}"))
    }
}

impl From<mlx_rs::error::IoError> for Error {
    fn from(error: mlx_rs::error::IoError) -> Self {
        Self::Internal(format!("MLX: {error}"))
    }
}

/// Returns a size as MLX counts them. Sizes come from checked configs and requests, far below 2^31.
#[allow(
    clippy::expect_used,
    reason = "a larger size is a defect of ours: nothing that large passes the checks at load"
)]
pub(crate) fn dim<N: TryInto<i32>>(size: N) -> i32
where
    N::Error: std::fmt::Debug,
{
    size.try_into().expect("a dimension below 2^31")
}
