//! `ModelService`.

use std::pin::Pin;
use std::sync::Arc;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::event::timestamp;
use super::gate::open;
use super::page::{FIELD_BYTES, fitting};
use super::pb::{self, load_model_response::Event, model_service_server::ModelService};
use super::status::{answer, status};
use super::stay;
use crate::count::count;
use crate::error::Error;
use crate::ids::ModelName;
use crate::service::{
    ComputeDtype, Fit, Formats, KvDtype, Load, LoadRequest, LoadUpdate, ModelInfo, ModelPage, ModelState,
    QuantMode, Quantization, Recipe, Service, Stay,
};

pub(super) struct Models(pub(super) Arc<Service>);

#[tonic::async_trait]
impl ModelService for Models {
    type LoadModelStream = Pin<Box<dyn Stream<Item = Result<pb::LoadModelResponse, Status>> + Send>>;

    async fn load_model(
        &self,
        request: Request<pb::LoadModelRequest>,
    ) -> Result<Response<Self::LoadModelStream>, Status> {
        let (caller, request) = open(request)?;
        let request = load_request(request).map_err(|error| status(&error))?;
        let load = self.0.load(&caller, request).await.map_err(|error| status(&error))?;
        Ok(Response::new(Box::pin(updates(load))))
    }

    async fn unload_model(
        &self,
        request: Request<pb::UnloadModelRequest>,
    ) -> Result<Response<pb::UnloadModelResponse>, Status> {
        let (_, request) = open(request)?;
        let freed = self.0.unload(&request.model).await;
        answer(freed.map(|freed_bytes| pb::UnloadModelResponse { freed_bytes }))
    }

    async fn get_model(
        &self,
        request: Request<pb::GetModelRequest>,
    ) -> Result<Response<pb::GetModelResponse>, Status> {
        let (caller, request) = open(request)?;
        let described = self.0.get_model(&caller, &request.model).await;
        answer(described.map(|model| pb::GetModelResponse { model: Some(info(model)) }))
    }

    async fn list_models(
        &self,
        request: Request<pb::ListModelsRequest>,
    ) -> Result<Response<pb::ListModelsResponse>, Status> {
        let (caller, request) = open(request)?;
        let pb::ListModelsRequest { page_size, page_token, resident_only } = request;
        let page = ModelPage { size: page_size, token: page_token, resident_only };
        let bytes_max = self.0.limits().answer_bytes_max;
        let listed = async {
            let (models, next) = self.0.list_models(&caller, &page).await?;
            let problems = self.0.root_problems().await?;
            let taken: usize = problems.iter().map(|problem| problem.len() + FIELD_BYTES).sum();
            let entries = models.into_iter().map(info);
            let room = bytes_max.saturating_sub(taken);
            let (models, next) = fitting(entries, |model| &model.name, next, room)?;
            Ok(pb::ListModelsResponse { models, next_page_token: next.unwrap_or_default(), problems })
        };
        answer(listed.await)
    }
}

fn load_request(request: pb::LoadModelRequest) -> Result<LoadRequest, Error> {
    let pb::LoadModelRequest { model, validate_only, compute_dtype, kv_dtype, keep_alive, pin, quantize } =
        request;
    let dtype = match pb::ComputeDtype::try_from(compute_dtype) {
        Ok(pb::ComputeDtype::Unspecified) => ComputeDtype::Auto,
        Ok(pb::ComputeDtype::Float32) => ComputeDtype::Float32,
        Ok(pb::ComputeDtype::Bfloat16) => ComputeDtype::Bfloat16,
        Ok(pb::ComputeDtype::Float16) => ComputeDtype::Float16,
        Err(_) => return Err(Error::field("compute_dtype", "unknown dtype")),
    };
    let kv = match pb::KvDtype::try_from(kv_dtype) {
        Ok(pb::KvDtype::Unspecified) => KvDtype::Auto,
        Ok(pb::KvDtype::Compute) => KvDtype::Compute,
        Ok(pb::KvDtype::Int8) => KvDtype::Int8,
        Err(_) => return Err(Error::field("kv_dtype", "unknown dtype")),
    };
    let quantize = quantize.map(quantization).transpose()?;
    let stay = Stay { keep_alive: stay::from_wire(keep_alive)?, pin };
    Ok(LoadRequest { model, validate_only, formats: Formats { dtype, kv, quantize }, stay })
}

fn quantization(options: pb::QuantizeOptions) -> Result<Quantization, Error> {
    let pb::QuantizeOptions { bits, group_size, mode, recipe } = options;
    let mode = match pb::QuantMode::try_from(mode) {
        Ok(pb::QuantMode::Unspecified | pb::QuantMode::Affine) => QuantMode::Affine,
        Ok(pb::QuantMode::Mxfp4) => QuantMode::Mxfp4,
        Ok(pb::QuantMode::Nvfp4) => QuantMode::Nvfp4,
        Ok(pb::QuantMode::Mxfp8) => QuantMode::Mxfp8,
        Err(_) => return Err(Error::field("quantize.mode", "unknown mode")),
    };
    let recipe = match pb::QuantRecipe::try_from(recipe) {
        Ok(pb::QuantRecipe::Unspecified) => None,
        Ok(pb::QuantRecipe::Mixed26) => Some(Recipe::Mixed2And6),
        Ok(pb::QuantRecipe::Mixed34) => Some(Recipe::Mixed3And4),
        Ok(pb::QuantRecipe::Mixed36) => Some(Recipe::Mixed3And6),
        Ok(pb::QuantRecipe::Mixed46) => Some(Recipe::Mixed4And6),
        Err(_) => return Err(Error::field("quantize.recipe", "unknown recipe")),
    };
    let given = |number: u32| Some(number).filter(|&number| number > 0);
    let quantization = Quantization::new(mode, given(bits), given(group_size), recipe);
    quantization.map_err(|error| Error::field("quantize", error.to_string()))
}

/// The stream that the caller reads. When it is dropped, the load goes on if others wait for it.
fn updates(mut load: Load) -> impl Stream<Item = Result<pb::LoadModelResponse, Status>> + Send {
    async_stream::stream! {
        loop {
            match load.next().await {
                Ok(Some(update)) => yield Ok(pb::LoadModelResponse { event: Some(self::update(update)) }),
                Ok(None) => return,
                Err(error) => {
                    yield Err(status(&error));
                    return;
                }
            }
        }
    }
}

fn update(update: LoadUpdate) -> Event {
    let progress = |phase: pb::LoadPhase, done_bytes, total_bytes| {
        Event::Progress(pb::LoadProgress { phase: phase.into(), done_bytes, total_bytes })
    };
    match update {
        LoadUpdate::Validated(fit) => Event::Validated(validated(fit)),
        LoadUpdate::Resolving => progress(pb::LoadPhase::Resolving, 0, 0),
        LoadUpdate::Downloading { done_bytes, total_bytes } => {
            progress(pb::LoadPhase::Downloading, done_bytes, total_bytes)
        }
        LoadUpdate::Reading { done_bytes, total_bytes } => {
            progress(pb::LoadPhase::Loading, done_bytes, total_bytes)
        }
        LoadUpdate::Warming => progress(pb::LoadPhase::Warming, 0, 0),
        LoadUpdate::Loaded(model) => Event::Loaded(pb::ModelLoaded { model: Some(info(*model)) }),
    }
}

fn validated(fit: Fit) -> pb::LoadValidated {
    let Fit { needed_bytes, available_bytes, budget_bytes, evictions, refused } = fit;
    let (rule, in_the_way) = refused.map(|(rule, models)| (rule.to_string(), models)).unzip();
    let eviction = |(model, bytes): (ModelName, u64)| pb::Eviction { model: model.to_string(), bytes };
    pb::LoadValidated {
        fits: rule.is_none(),
        needed_bytes,
        available_bytes,
        evictions: evictions.into_iter().map(eviction).collect(),
        rule: rule.unwrap_or_default(),
        budget_bytes,
        in_the_way: in_the_way.unwrap_or_default().iter().map(ToString::to_string).collect(),
    }
}

/// Returns a model's facts; those of the resident weights replace those of the files.
pub(super) fn info(model: ModelInfo) -> pb::ModelInfo {
    let ModelInfo { name, revision, state, facts, problem, resident, sessions, path } = model;
    let state = match state {
        ModelState::Available => pb::ModelState::Available,
        ModelState::Loading => pb::ModelState::Loading,
        ModelState::Resident => pb::ModelState::Resident,
    };
    let mut info = pb::ModelInfo {
        name,
        revision,
        state: state.into(),
        problem,
        session_count: count(sessions),
        path: path.to_string_lossy().into_owned(),
        ..Default::default()
    };
    if let Some(facts) = facts {
        info.architecture = facts.architecture;
        info.context_length = facts.context_length;
        info.vocabulary_size = facts.vocabulary_size;
        info.parameter_count = facts.parameter_count;
        info.stored_as = facts.stored_as;
        info.file_bytes = facts.file_bytes;
    }
    if let Some(resident) = resident {
        info.computes_in = resident.computes_in;
        info.parameter_count = resident.parameter_count;
        info.weight_bytes = resident.weight_bytes;
        info.kv_slab_bytes = resident.kv_slab_bytes;
        info.kv_idle_bytes = resident.kv_idle_bytes;
        info.kv_bytes_per_token = resident.kv_bytes_per_token;
        info.running_sequences = resident.running_sequences;
        info.queued_sequences = resident.queued_sequences;
        info.load_time = timestamp(resident.loaded);
        info.last_use_time = timestamp(resident.last_used);
        info.pinned = resident.pinned;
        info.keep_alive = stay::to_wire(resident.keep_alive);
        info.expire_time = resident.expires.and_then(timestamp);
    }
    info
}
