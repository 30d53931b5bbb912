//! mlxd: serves language models on MLX to every app on a machine, over gRPC.
//!
//! The rooms, from the top floor down: `cli`, `daemon`; the edges `rpc` and `net`; `service`; `engine`;
//! `store`; `device`, `models`, `mlx`; and the pure rooms. `tests/rust/tidy/picture.rs` lists which room may
//! name which; `docs/architecture.md` explains them.

pub mod backend;
pub mod cache;
pub mod clock;
pub mod config;
pub mod count;
pub mod daemon;
pub mod device;
pub mod engine;
pub mod error;
pub mod grammar;
pub mod hub;
pub mod ids;
pub mod limits;
mod lock;
mod mlx;
mod models;
pub mod net;
pub mod output;
mod priority;
pub mod prompt;
pub mod quantize;
pub mod residency;
pub mod rpc;
pub mod sched;
pub mod service;
pub mod session;
pub mod store;
pub mod telemetry;
pub mod text;
