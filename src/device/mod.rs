//! The MLX backend: the plan of a load (`plan`), the memory that there is (`machine`), and the border that
//! the engine drives (`backend`), on top of `mlx` and the architectures of `models`. Runs on the engine
//! thread only; `convert` runs where there is no engine.

mod backend;
#[cfg(test)]
mod backend_tests;
#[cfg(test)]
mod chain_tests;
mod convert;
mod leaving;
mod machine;
mod opening;
mod plan;
mod running;
#[cfg(test)]
mod snapshot_tests;

pub use crate::mlx::prepare;
pub use backend::MlxBackend;
pub use convert::{Conversion, ConvertError, FolderConverted, MlxQuantizer, convert};
