//! The whole daemon over a real socket, with a fake engine: every answer is known, and the engine's commands
//! can be examined.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]
#![allow(unreachable_pub, reason = "what a test's modules share")]

mod calls;
mod choices;
mod connections;
mod continuing;
mod demands;
mod durability;
mod errors;
mod extend;
mod fake;
mod folder;
mod harness;
mod history;
mod life;
mod models;
mod neighbours;
mod owners;
mod parts;
mod portable;
mod raw;
mod sessions;
mod stays;
mod templates;
mod terms;
mod tools;
mod watch;
