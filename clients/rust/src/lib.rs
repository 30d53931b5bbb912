#![doc = include_str!("../README.md")]

mod address;
mod call;
mod client;
mod error;
mod requests;
mod stream;

/// The messages and generated clients of the package `mlxd.v1`.
#[allow(missing_docs, unreachable_pub, reason = "generated code")]
#[allow(clippy::all, clippy::pedantic, clippy::allow_attributes_without_reason, reason = "generated code")]
#[allow(rustdoc::all, reason = "the contract's comments are not written for rustdoc")]
pub mod v1 {
    include!("gen/mlxd.v1.rs");
}

pub use address::{Address, default_address, default_socket_path};
pub use client::{BearerToken, Client, ConnectOptions, MESSAGE_BYTES_MAX};
pub use error::{CallError, Error, FieldViolation, Result};
pub use stream::{EventStream, ExportStream, GenerateStream, LoadStream, WatchStream};
pub use tonic::{Code, IntoRequest, Request};
pub use v1::ErrorReason;
