//! Model files: local folders, the Hugging Face cache, downloads into it, conversion from GGUF.
//!
//! Everything here blocks and knows nothing of MLX; callers run it on a thread that may block. Only `fetch`
//! uses tokio, inside. Files come from strangers: every size is checked before it is used.

mod access;
mod cache;
mod catalog;
mod config;
mod content;
mod convert;
mod error;
mod facts;
mod fetch;
mod files;
mod folder;
mod inspect;
mod place;
mod read;
mod resolve;
mod revision;
mod sizes;

pub use access::{ModelAccess, Pattern};
pub use catalog::{FormChoice, FormSettings, ModelAssets, ModelCatalog, ModelForms};
pub use config::{config_f64, text_default, text_part};
pub use content::ContentHash;
pub use convert::{
    Converted, Draft, GgufConversion, Quantizer, Watch, WeightsWriter, convert_gguf, format_entry, told,
};
pub use error::HubError;
pub use facts::{DefaultSampling, ModelFacts};
pub use fetch::{
    FetchError, Fetched, FileProgress, FileState, HubSettings, Progress, RepoName, Stop, fetch, remove,
};
pub use files::{ModelFiles, read_text_files};
pub use inspect::{OpenWeights, TensorInfo, WeightFile, WeightIndex, inspect};
pub use place::{Environment, default_hf_cache, expand_home};
pub use resolve::{Listed, ModelFolder, ModelRoots, check_model_name};
pub use safetensors::Dtype;
pub use sizes::WeightSizes;
