//! mlxd: serves language models on MLX to every app of a machine, over gRPC.
//!
//! Arrows point down: edge (`rpc`, `net`, `cli`, `daemon`) → `service` → `engine` → `device`, `models` → the pure modules
//! (`text`, `session`, `sched`, `cache`, `hub`). `tests/rust/tidy.rs` keeps those borders.

pub mod backend;
pub mod cache;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod device;
pub mod engine;
pub mod error;
pub mod hub;
pub mod ids;
pub mod limits;
mod mlx;
mod models;
pub mod net;
pub mod prompt;
pub mod rpc;
pub mod sched;
pub mod service;
pub mod session;
pub mod telemetry;
pub mod text;
