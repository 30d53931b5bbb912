//! The whole daemon over a real socket, with an engine that is not one: every answer is known, and what the
//! engine was told can be looked at.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]
#![allow(unreachable_pub, reason = "what a test's modules share")]

mod calls;
mod errors;
mod fake;
mod folder;
mod harness;
mod life;
mod models;
mod sessions;
