//! `ServerService`: capabilities and statistics.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::event::{duration, effective_sampling};
use super::gate::open;
use super::model::info;
use super::pb::{self, server_service_server::ServerService};
use super::status::answer;
use crate::count::count;
use crate::hub::DefaultSampling;
use crate::service::{
    Counters, EffectiveSampling, EngineStats, Feature, ModelCapabilities, ResidentModel, SaveStats, Service,
    SlabClass, SnapshotStats, Stats,
};

pub(super) struct Server(pub(super) Arc<Service>);

#[tonic::async_trait]
impl ServerService for Server {
    async fn capabilities(
        &self,
        request: Request<pb::CapabilitiesRequest>,
    ) -> Result<Response<pb::CapabilitiesResponse>, Status> {
        let (caller, request) = open(request)?;
        let described = async {
            let (models, budget_bytes) = self.0.capabilities(&caller, &request.models).await?;
            Ok(pb::CapabilitiesResponse {
                server: Some(server_capabilities(&self.0, budget_bytes)),
                models: models.into_iter().map(model_capabilities).collect(),
            })
        };
        answer(described.await)
    }

    async fn get_stats(
        &self,
        request: Request<pb::GetStatsRequest>,
    ) -> Result<Response<pb::GetStatsResponse>, Status> {
        let (caller, _) = open(request)?;
        answer(self.0.stats(&caller).await.map(stats))
    }
}

fn feature(feature: Feature) -> i32 {
    let feature = match feature {
        Feature::Streaming => pb::Feature::Streaming,
        Feature::Chat => pb::Feature::Chat,
        Feature::Tools => pb::Feature::Tools,
        Feature::Logprobs => pb::Feature::Logprobs,
        Feature::Score => pb::Feature::Score,
        Feature::Sessions => pb::Feature::Sessions,
        Feature::Seed => pb::Feature::Seed,
        Feature::SystemPrompt => pb::Feature::SystemPrompt,
        Feature::Thinking => pb::Feature::Thinking,
        Feature::StructuredOutput => pb::Feature::StructuredOutput,
        Feature::Reasoning => pb::Feature::Reasoning,
        Feature::ToolCalls => pb::Feature::ToolCalls,
    };
    feature.into()
}

fn server_capabilities(service: &Service, memory_budget_bytes: u64) -> pb::ServerCapabilities {
    let (device, limits, engine) = (service.device(), service.limits(), service.engine_settings());
    pb::ServerCapabilities {
        version: env!("CARGO_PKG_VERSION").into(),
        mlx_version: device.mlx_version.clone(),
        device: device.device.clone(),
        platform: format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
        features: Feature::ALL.map(feature).into(),
        architectures: device.architectures.iter().map(ToString::to_string).collect(),
        limits: Some(pb::Limits {
            message_bytes_max: limits.message_bytes_max as u64,
            sessions_max: limits.sessions_max,
            queue_length_max: engine.queue_length_max,
            queue_length_per_client_max: engine.queue_length_per_client_max,
            running_sequences_max: engine.running_sequences_max,
            memory_budget_bytes,
            score_tokens_max: limits.score_tokens_max,
            top_logprobs_max: limits.top_logprobs_max,
            choices_max: limits.choices_max,
        }),
    }
}

fn model_capabilities(model: ModelCapabilities) -> pb::ModelCapabilities {
    let ModelCapabilities { info: facts, assets, features, forms, max_tokens } = model;
    let DefaultSampling { temperature, top_p, top_k, min_p, repetition_penalty, typical_p } =
        assets.files.facts.default_sampling;
    let default_sampling = EffectiveSampling {
        temperature,
        top_p,
        top_k,
        min_p,
        repetition_penalty,
        typical_p,
        max_tokens,
        ..Default::default()
    };
    pb::ModelCapabilities {
        model: Some(info(facts)),
        modalities: vec![pb::Modality::Text.into()],
        features: features.into_iter().map(feature).collect(),
        has_chat_template: assets.chat_template.is_ok(),
        default_sampling: Some(effective_sampling(default_sampling)),
        eos_token_ids: assets.eos_token_ids.clone(),
        tool_format: forms.tools.into(),
        reasoning_format: forms.reasoning.into(),
        reasoning_switch: forms.reasoning_switch.into(),
        reasoning_effort: forms.reasoning_effort,
    }
}

fn stats(stats: Stats) -> pb::GetStatsResponse {
    let Stats { uptime, sessions: totals, saves, snapshots, process_resident_bytes, engine } = stats;
    let SaveStats { enabled, durable, unwritten_sessions } = saves;
    let EngineStats { counters, budget_bytes, memory: device, snapshot_bytes, models } = &engine;
    let Counters {
        requests_total,
        finished_total,
        cancelled_total,
        failed_total,
        refused_total,
        preemptions_total,
        prefill_tokens_total,
        cached_tokens_total,
        decode_tokens_total,
        steps_total,
        loads_total,
        evictions_total,
        expirations_total,
        snapshots_dropped_total: dropped_total,
    } = *counters;
    let bytes = |of: fn(&ResidentModel) -> u64| models.iter().map(of).sum();
    let sequences = |of: fn(&ResidentModel) -> u32| models.iter().map(of).sum();
    let memory = pb::MemoryStats {
        budget_bytes: *budget_bytes,
        weight_bytes: bytes(|model| model.weight_bytes),
        kv_slab_bytes: bytes(|model| model.kv_slab_bytes),
        kv_idle_bytes: bytes(|model| model.kv_idle_bytes),
        kv_reserved_bytes: bytes(|model| model.kv_reserved_bytes),
        snapshot_bytes: *snapshot_bytes,
        mlx_active_bytes: device.active,
        mlx_peak_bytes: device.peak,
        mlx_cache_bytes: device.cache,
        process_resident_bytes,
    };
    pb::GetStatsResponse {
        uptime: duration(uptime),
        requests_total,
        finished_total,
        cancelled_total,
        failed_total,
        refused_total,
        preemptions_total,
        prefill_tokens_total,
        cached_tokens_total,
        decode_tokens_total,
        steps_total,
        loads_total,
        evictions_total,
        expirations_total,
        running_sequences: sequences(|model| model.running_sequences),
        prefilling_sequences: sequences(|model| model.prefilling_sequences),
        stalled_sequences: sequences(|model| model.stalled_sequences),
        queued_sequences: sequences(|model| model.queued_sequences),
        sessions: count(totals.sessions),
        pinned_sessions: count(totals.pinned),
        busy_sessions: count(totals.busy),
        session_bytes: totals.bytes,
        session_store: Some(pb::SessionStoreStats { enabled, durable, unwritten_sessions }),
        snapshots: Some(pb::SnapshotStats { dropped_total, ..snapshot_stats(&snapshots) }),
        memory: Some(memory),
        slabs: models
            .iter()
            .flat_map(|model| model.slabs.iter().map(|slab| slab_stats(model, slab)))
            .collect(),
    }
}

fn snapshot_stats(stats: &SnapshotStats) -> pb::SnapshotStats {
    let SnapshotStats { enabled, writable, snapshots, bytes, bytes_max, waiting_bytes, .. } = *stats;
    let SnapshotStats { saved_total, failed_total, restored_total, restored_tokens_total, .. } = *stats;
    pb::SnapshotStats {
        enabled,
        writable,
        snapshots,
        bytes,
        bytes_max,
        waiting_bytes,
        saved_total,
        failed_total,
        dropped_total: 0,
        restored_total,
        restored_tokens_total,
    }
}

fn slab_stats(model: &ResidentModel, slab: &SlabClass) -> pb::SlabStats {
    let SlabClass { slot_capacity_tokens, slabs, slots, slots_in_use, bytes } = *slab;
    pb::SlabStats { model: model.model.to_string(), slot_capacity_tokens, slabs, slots, slots_in_use, bytes }
}
