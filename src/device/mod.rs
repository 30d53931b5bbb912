//! The MLX backend: the plan of a load (`plan`), and the border that the engine drives (`backend`), on top of
//! `mlx` and the architectures of `models`. Runs on the engine thread only.

mod backend;
#[cfg(test)]
mod backend_tests;
mod plan;

pub use crate::mlx::prepare;
pub use backend::MlxBackend;
