//! Model files: local folders, the Hugging Face cache, conversion from GGUF.
//!
//! Everything here blocks on the file system and knows neither tokio nor MLX; callers run it on a thread
//! that may wait. Files come from strangers: every size is checked before it is believed.

mod assets;
mod config;
mod convert;
mod error;
mod facts;
mod inspect;
mod kept;
mod resolve;

pub use assets::{AssetShelf, ModelAssets};
pub use config::{config_f64, read_config, read_generation_config, text_part};
pub use convert::{Converted, convert};
pub use error::HubError;
pub use facts::{DefaultSampling, ModelFacts};
pub use inspect::{TensorInfo, WeightFile, Weights, inspect};
pub use resolve::{ModelFolder, ModelRoots, check_model_name};
pub use safetensors::Dtype;
