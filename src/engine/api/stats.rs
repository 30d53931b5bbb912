//! What the engine holds and has done, as its callers see it.

use std::path::PathBuf;
use std::time::SystemTime;

use super::Counters;
use crate::backend::DeviceMemory;
use crate::cache::SlabClass;
use crate::ids::ModelName;
use crate::residency::KeepAlive;

/// Counts since the engine's start, and what it holds now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Counts since the start.
    pub counters: Counters,
    /// Byte budget for weights and KV caches.
    pub budget_bytes: u64,
    /// Memory as the device counts it.
    pub memory: DeviceMemory,
    /// Bytes of caches that wait to be written to disk.
    pub snapshot_bytes: u64,
    /// Models in memory, by name.
    pub models: Vec<ResidentModel>,
}

/// A model in memory, and what it does now.
#[derive(Clone, Debug, PartialEq)]
pub struct ResidentModel {
    /// Name of the model.
    pub model: ModelName,
    /// Identity of the weights.
    pub revision: String,
    /// Description of how it computes, for people.
    pub computes_in: String,
    /// Number of parameters.
    pub parameter_count: u64,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Bytes of its KV slabs.
    pub kv_slab_bytes: u64,
    /// Bytes of its parked KV caches.
    pub kv_idle_bytes: u64,
    /// KV bytes of one token.
    pub kv_bytes_per_token: u64,
    /// Bytes that running sequences may still come to need.
    pub kv_reserved_bytes: u64,
    /// Running sequences.
    pub running_sequences: u32,
    /// Running sequences whose prompt is not done yet.
    pub prefilling_sequences: u32,
    /// Running sequences that pause because their caller does not read.
    pub stalled_sequences: u32,
    /// Waiting requests.
    pub queued_sequences: u32,
    /// Time when it became resident.
    pub loaded: SystemTime,
    /// Time when it last ran.
    pub last_used: SystemTime,
    /// Whether it is pinned.
    pub pinned: bool,
    /// How long it stays after its last use.
    pub keep_alive: KeepAlive,
    /// Time when it is unloaded if nobody uses it from now on; None is never.
    pub expires: Option<SystemTime>,
    /// The folder of its files.
    pub path: PathBuf,
    /// Its KV slabs by capacity.
    pub slabs: Vec<SlabClass>,
}
