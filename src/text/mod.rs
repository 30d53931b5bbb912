//! Text in and out: tokenizer, chat template, streaming detokenizer, stop strings.
//!
//! Pure: contents of a model's files in, values out. The edge renders and tokenizes with it before a request
//! reaches the engine, and the stream of tokens goes through `Detokenizer` and then `StopMatcher`.

mod detokenizer;
mod eos;
mod error;
mod files;
mod long;
mod parting;
mod pieces;
mod python;
mod special;
mod stop;
mod template;
mod tojson;
mod tokenizer;
mod vocabulary;

pub use detokenizer::Detokenizer;
pub use eos::eos_token_ids;
pub use error::TextError;
pub use files::TextFiles;
pub use long::Encoding;
pub use stop::{StopMatcher, StopStep};
pub use template::{ChatTemplate, Conversation};
pub use tokenizer::Tokenizer;
