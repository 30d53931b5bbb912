//! `ServerService`: what the daemon can do, and what it does.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::caller::open;
use super::convert;
use super::edge::Edge;
use super::model::describe;
use super::pb::{self, server_service_server::ServerService};
use super::status::status;
use crate::engine::{Counters, EngineStats, ResidentModel, SlabClass};
use crate::error::Error;
use crate::hub::{DefaultSampling, ModelAssets};
use crate::ids::ModelName;

/// Models that one call may ask about.
const MODELS_MAX: u32 = 100;

pub(super) struct Server(pub(super) Arc<Edge>);

#[tonic::async_trait]
impl ServerService for Server {
    async fn capabilities(
        &self,
        request: Request<pb::CapabilitiesRequest>,
    ) -> Result<Response<pb::CapabilitiesResponse>, Status> {
        let (_, request) = open(request)?;
        let answer = capabilities(&self.0, &request.models).await;
        answer.map(Response::new).map_err(|error| status(&error))
    }

    async fn get_stats(
        &self,
        request: Request<pb::GetStatsRequest>,
    ) -> Result<Response<pb::GetStatsResponse>, Status> {
        open(request)?;
        let stats = self.0.engine.stats().await.map_err(|error| status(&error))?;
        Ok(Response::new(get_stats(&self.0, &stats)))
    }
}

async fn capabilities(edge: &Edge, models: &[String]) -> Result<pb::CapabilitiesResponse, Error> {
    if models.len() > MODELS_MAX as usize {
        return Err(Error::field("models", format!("at most {MODELS_MAX} entries")));
    }
    let names: Vec<ModelName> = if models.is_empty() {
        edge.engine.stats().await?.models.into_iter().map(|resident| resident.model).collect()
    } else {
        let named = models.iter().enumerate();
        let named = named.map(|(index, name)| convert::model_name(&format!("models[{index}]"), name));
        named.collect::<Result<_, _>>()?
    };
    let mut models = Vec::with_capacity(names.len());
    for name in names {
        let assets = edge.assets(&name).await?;
        models.push(model_capabilities(edge, &assets, describe(edge, &name).await?));
    }
    Ok(pb::CapabilitiesResponse { server: Some(server_capabilities(edge)), models })
}

fn server_capabilities(edge: &Edge) -> pb::ServerCapabilities {
    use pb::Feature::{Chat, Logprobs, Score, Seed, Sessions, Streaming, Tools};
    let device = edge.engine.device();
    let limits = &edge.limits;
    pb::ServerCapabilities {
        version: env!("CARGO_PKG_VERSION").into(),
        mlx_version: device.mlx_version.clone(),
        device: device.device.clone(),
        platform: format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
        features: [Streaming, Chat, Tools, Logprobs, Score, Sessions, Seed].map(i32::from).into(),
        architectures: device.architectures.iter().map(ToString::to_string).collect(),
        limits: Some(pb::Limits {
            message_bytes_max: limits.message_bytes_max as u64,
            sessions_max: limits.sessions_max,
            queue_length_max: limits.queue_length_max,
            queue_length_per_client_max: limits.queue_length_per_client_max,
            running_sequences_max: limits.running_sequences_max,
            memory_budget_bytes: device.budget_bytes,
            score_tokens_max: limits.score_tokens_max,
            top_logprobs_max: limits.top_logprobs_max,
        }),
    }
}

fn model_capabilities(edge: &Edge, assets: &ModelAssets, model: pb::ModelInfo) -> pb::ModelCapabilities {
    use pb::Feature::{Chat, Logprobs, Score, Seed, Sessions, Streaming, Tools};
    let mut features = vec![Streaming, Logprobs, Score, Sessions, Seed];
    if let Some(template) = &assets.chat_template {
        features.push(Chat);
        if template.uses_tools() {
            features.push(Tools);
        }
    }
    let DefaultSampling { temperature, top_p, top_k, min_p, repetition_penalty } =
        assets.facts.default_sampling;
    // The shortest input has one token.
    let max_tokens = edge.limits.max_tokens_default.min(assets.facts.context_length.saturating_sub(1));
    pb::ModelCapabilities {
        model: Some(model),
        modalities: vec![pb::Modality::Text.into()],
        features: features.into_iter().map(i32::from).collect(),
        has_chat_template: assets.chat_template.is_some(),
        default_sampling: Some(pb::EffectiveSampling {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            max_tokens,
            ..Default::default()
        }),
        eos_token_ids: assets.eos_token_ids.clone(),
    }
}

fn get_stats(edge: &Edge, stats: &EngineStats) -> pb::GetStatsResponse {
    let EngineStats { counters, budget_bytes, memory: device, models } = stats;
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
    } = *counters;
    let bytes = |of: fn(&ResidentModel) -> u64| models.iter().map(of).sum();
    let sequences = |of: fn(&ResidentModel) -> u32| models.iter().map(of).sum();
    let memory = pb::MemoryStats {
        budget_bytes: *budget_bytes,
        weight_bytes: bytes(|model| model.weight_bytes),
        kv_slab_bytes: bytes(|model| model.kv_slab_bytes),
        kv_idle_bytes: bytes(|model| model.kv_idle_bytes),
        kv_reserved_bytes: bytes(|model| model.kv_reserved_bytes),
        mlx_active_bytes: device.active,
        mlx_peak_bytes: device.peak,
        mlx_cache_bytes: device.cache,
        process_resident_bytes: process_resident_bytes(),
    };
    pb::GetStatsResponse {
        uptime: convert::duration(edge.clock.now() - edge.started),
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
        running_sequences: sequences(|model| model.running_sequences),
        prefilling_sequences: sequences(|model| model.prefilling_sequences),
        stalled_sequences: sequences(|model| model.stalled_sequences),
        queued_sequences: sequences(|model| model.queued_sequences),
        sessions: convert::count(edge.sessions.count()),
        memory: Some(memory),
        slabs: models
            .iter()
            .flat_map(|model| model.slabs.iter().map(|slab| slab_stats(model, slab)))
            .collect(),
    }
}

fn slab_stats(model: &ResidentModel, slab: &SlabClass) -> pb::SlabStats {
    let SlabClass { slot_capacity_tokens, slabs, slots, slots_in_use, bytes } = *slab;
    pb::SlabStats { model: model.model.to_string(), slot_capacity_tokens, slabs, slots, slots_in_use, bytes }
}

/// As Linux counts it; 0 elsewhere.
fn process_resident_bytes() -> u64 {
    let Ok(pages) = std::fs::read_to_string("/proc/self/statm") else { return 0 };
    let resident = pages.split_whitespace().nth(1).and_then(|count| count.parse::<u64>().ok());
    resident.unwrap_or(0) * rustix::param::page_size() as u64
}
