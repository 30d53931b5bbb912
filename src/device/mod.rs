//! Everything that names MLX, apart from the architectures in `models`: weights, layers, KV slabs, the
//! sampler, memory, and the backend that the engine drives. Runs on the engine thread only.

mod backend;
pub(crate) mod batch;
pub(crate) mod cuda;
mod ffi;
pub(crate) mod kv;
pub(crate) mod layers;
mod plan;
mod sampler;
pub(crate) mod weights;

pub use backend::MlxBackend;
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

/// A size as MLX counts them. Sizes come from checked configs and requests, far below 2^31.
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
