//! Text in and out: tokenizer, chat template, streaming detokenizer, stop strings.
//!
//! Pure: contents of a model's files in, values out. The edge renders and tokenizes with it before a request
//! reaches the engine, and the stream of tokens goes through `Detokenizer` and then `StopMatcher`.

mod apart;
mod arguments;
mod choice;
mod comparisons;
mod continued;
mod detokenizer;
mod encoder;
mod eos;
mod error;
mod files;
mod filters;
mod formats;
mod jinja;
mod long;
mod marks;
mod methods;
mod namespace;
mod objects;
mod operators;
mod parting;
mod pieces;
mod probe;
mod python;
mod refusal;
mod rendered;
mod source;
mod special;
mod statements;
mod stop;
mod template;
mod tojson;
mod tokenizer;
mod tokens;
mod vocabulary;
mod words;
mod work;

pub use continued::absent_word;
pub use detokenizer::Detokenizer;
pub use eos::eos_token_ids;
pub use error::TextError;
pub use files::TextFiles;
pub use long::Encoding;
pub use rendered::Rendered;
pub use stop::{StopMatcher, StopStep};
pub use template::{ChatTemplate, Conversation, EFFORT, ENABLE_THINKING};
pub use tokenizer::Tokenizer;
