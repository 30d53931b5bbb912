//! The Rust tests that see mlxd from outside, as one program, because linking it takes longer than running
//! it: the API, the generated code and the sources as text (`api`, `codegen`, `tidy`), `text` through its
//! public types, the command line against a fake daemon, and the whole daemon with a fake engine.

mod api;
mod cli;
mod cli_generate;
mod cli_interrupts;
mod cli_local;
mod cli_models;
mod cli_sessions;
mod codegen;
mod daemon;
mod output_calls;
mod text_continued;
mod text_detokenizer;
mod text_fragments;
mod text_left_out;
mod text_parity;
mod text_special;
mod text_stop;
mod text_template;
mod text_work;
mod tidy;
