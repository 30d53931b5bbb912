//! `ModelService`.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::caller::open;
use super::convert;
use super::edge::{Edge, blocking};
use super::pb::{self, load_model_response::Event, model_service_server::ModelService};
use super::residency::load_spec;
use super::status::status;
use crate::engine::{ComputeDtype, KvDtype, LoadEvent, ResidentModel};
use crate::error::Error;
use crate::hub::{AssetShelf, ModelFacts, ModelFolder};
use crate::ids::ModelName;

pub(super) struct Models(pub(super) Arc<Edge>);

#[tonic::async_trait]
impl ModelService for Models {
    type LoadModelStream = Pin<Box<dyn Stream<Item = Result<pb::LoadModelResponse, Status>> + Send>>;

    async fn load_model(
        &self,
        request: Request<pb::LoadModelRequest>,
    ) -> Result<Response<Self::LoadModelStream>, Status> {
        let (_, request) = open(request)?;
        let stream = load(&self.0, request).await.map_err(|error| status(&error))?;
        Ok(Response::new(stream))
    }

    async fn unload_model(
        &self,
        request: Request<pb::UnloadModelRequest>,
    ) -> Result<Response<pb::UnloadModelResponse>, Status> {
        let (_, request) = open(request)?;
        answer(unload(&self.0, &request.model).await)
    }

    async fn get_model(
        &self,
        request: Request<pb::GetModelRequest>,
    ) -> Result<Response<pb::GetModelResponse>, Status> {
        let (_, request) = open(request)?;
        answer(get(&self.0, &request.model).await)
    }

    async fn list_models(
        &self,
        request: Request<pb::ListModelsRequest>,
    ) -> Result<Response<pb::ListModelsResponse>, Status> {
        let (_, request) = open(request)?;
        answer(list(&self.0, request).await)
    }
}

fn answer<T>(answer: Result<T, Error>) -> Result<Response<T>, Status> {
    answer.map(Response::new).map_err(|error| status(&error))
}

async fn load(
    edge: &Arc<Edge>,
    request: pb::LoadModelRequest,
) -> Result<<Models as ModelService>::LoadModelStream, Error> {
    let pb::LoadModelRequest { model, validate_only, compute_dtype, kv_dtype } = request;
    let model = convert::model_name("model", &model)?;
    let dtype = match pb::ComputeDtype::try_from(compute_dtype) {
        Ok(pb::ComputeDtype::Unspecified) => ComputeDtype::Auto,
        Ok(pb::ComputeDtype::Float32) => ComputeDtype::Float32,
        Ok(pb::ComputeDtype::Bfloat16) => ComputeDtype::Bfloat16,
        Ok(pb::ComputeDtype::Float16) => ComputeDtype::Float16,
        Err(_) => return Err(Error::field("compute_dtype", "is not a dtype this daemon knows")),
    };
    let kv = match pb::KvDtype::try_from(kv_dtype) {
        Ok(pb::KvDtype::Unspecified) => KvDtype::Auto,
        Ok(pb::KvDtype::Compute) => KvDtype::Compute,
        Ok(pb::KvDtype::Int8) => KvDtype::Int8,
        Err(_) => return Err(Error::field("kv_dtype", "is not a dtype this daemon knows")),
    };
    // Checks the files; errors come before the stream begins.
    let assets = edge.assets(&model).await?;
    if validate_only {
        let fit = edge.engine.fits(load_spec(&assets, dtype, kv)).await?;
        let validated = Event::Validated(pb::LoadValidated {
            fits: fit.needed_bytes <= fit.available_bytes,
            needed_bytes: fit.needed_bytes,
            available_bytes: fit.available_bytes,
        });
        return Ok(Box::pin(tokio_stream::once(Ok(pb::LoadModelResponse { event: Some(validated) }))));
    }
    let was_resident = edge.resident.contains_key(&model);
    let events = edge.start_load(&assets, (dtype, kv))?;
    Ok(Box::pin(progress(assets.facts.clone(), was_resident, events)))
}

fn progress(
    facts: ModelFacts,
    was_resident: bool,
    mut events: mpsc::Receiver<LoadEvent>,
) -> impl Stream<Item = Result<pb::LoadModelResponse, Status>> + Send {
    let step = |phase: pb::LoadPhase, done_bytes, total_bytes| {
        Event::Progress(pb::LoadProgress { phase: phase.into(), done_bytes, total_bytes })
    };
    async_stream::stream! {
        if !was_resident {
            yield Ok(pb::LoadModelResponse { event: Some(step(pb::LoadPhase::Resolving, 0, 0)) });
        }
        loop {
            let (event, is_last) = match events.recv().await {
                Some(LoadEvent::Progress { done_bytes, total_bytes }) => {
                    (step(pb::LoadPhase::Loading, done_bytes, total_bytes), false)
                }
                Some(LoadEvent::Warming) => (step(pb::LoadPhase::Warming, 0, 0), false),
                Some(LoadEvent::Loaded(resident)) => {
                    let folder = folder_of(&resident);
                    let model = Some(info(&folder, Some(&facts), Some(&resident), pb::ModelState::Resident));
                    (Event::Loaded(pb::ModelLoaded { model }), true)
                }
                Some(LoadEvent::Failed(error)) => {
                    yield Err(status(&error));
                    return;
                }
                None => {
                    yield Err(status(&Error::EngineDead));
                    return;
                }
            };
            yield Ok(pb::LoadModelResponse { event: Some(event) });
            if is_last {
                return;
            }
        }
    }
}

async fn unload(edge: &Edge, model: &str) -> Result<pb::UnloadModelResponse, Error> {
    let model = convert::model_name("model", model)?;
    let freed_bytes = edge.engine.unload(model.clone()).await?;
    edge.resident.remove(&model);
    Ok(pb::UnloadModelResponse { freed_bytes })
}

async fn get(edge: &Edge, model: &str) -> Result<pb::GetModelResponse, Error> {
    let model = convert::model_name("model", model)?;
    Ok(pb::GetModelResponse { model: Some(describe(edge, &model).await?) })
}

/// One model: as it is in memory if it is there, else as it is on disk.
pub(super) async fn describe(edge: &Edge, model: &ModelName) -> Result<pb::ModelInfo, Error> {
    let resident = edge.engine.stats().await?.models.into_iter().find(|resident| resident.model == *model);
    if let (Some(resident), Some(assets)) = (&resident, edge.resident.get(model)) {
        return Ok(info(&folder_of(resident), Some(&assets.facts), Some(resident), pb::ModelState::Resident));
    }
    let (shelf, name) = (Arc::clone(&edge.shelf), model.clone());
    let (folder, facts) = blocking(move || {
        let folder = shelf.resolve(&name)?;
        let facts = shelf.facts_of(&folder)?;
        Ok((folder, facts))
    })
    .await?;
    let state = state(edge, model, resident.is_some());
    Ok(info(&folder, Some(&facts), resident.as_ref(), state))
}

async fn list(edge: &Edge, request: pb::ListModelsRequest) -> Result<pb::ListModelsResponse, Error> {
    let pb::ListModelsRequest { page_size, page_token, resident_only } = request;
    let (after, page_size) = convert::model_page(page_size, &page_token)?;
    let resident = edge.engine.stats().await?.models;
    let mut folders: BTreeMap<String, ModelFolder> =
        resident.iter().map(|model| (model.model.to_string(), folder_of(model))).collect();
    let shelf = Arc::clone(&edge.shelf);
    if !resident_only {
        let found = blocking(move || Ok(shelf.list())).await?;
        for folder in found {
            folders.entry(folder.name.clone()).or_insert(folder);
        }
    }
    let after = after.map(|name| name.to_string()).unwrap_or_default();
    let mut rest = folders.into_values().skip_while(|folder| folder.name <= after).peekable();
    let chosen: Vec<ModelFolder> = rest.by_ref().take(page_size).collect();
    let next_page_token = match (rest.peek(), chosen.last()) {
        (Some(_), Some(last)) => last.name.clone(),
        _ => String::new(),
    };
    let shelf = Arc::clone(&edge.shelf);
    let described = blocking(move || Ok(facts_of(&shelf, chosen))).await?;
    let models = described.iter().map(|(folder, facts)| {
        let resident = resident.iter().find(|resident| resident.model.as_str() == folder.name);
        let state = state(edge, &folder.name.as_str().into(), resident.is_some());
        info(folder, facts.as_ref(), resident, state)
    });
    Ok(pb::ListModelsResponse { models: models.collect(), next_page_token })
}

/// A model whose files are damaged is listed without facts.
fn facts_of(shelf: &AssetShelf, folders: Vec<ModelFolder>) -> Vec<(ModelFolder, Option<ModelFacts>)> {
    let with_facts = folders.into_iter().map(|mut folder| {
        if folder.path.as_os_str().is_empty()
            && let Ok(found) = shelf.resolve(&folder.name.as_str().into())
        {
            folder.path = found.path;
        }
        let facts = shelf.facts_of(&folder).ok();
        (folder, facts)
    });
    with_facts.collect()
}

/// A resident model's name and revision; its folder may have changed or gone since.
fn folder_of(resident: &ResidentModel) -> ModelFolder {
    ModelFolder {
        name: resident.model.to_string(),
        path: std::path::PathBuf::new(),
        revision: resident.revision.clone(),
    }
}

fn state(edge: &Edge, model: &ModelName, is_resident: bool) -> pb::ModelState {
    if is_resident {
        pb::ModelState::Resident
    } else if edge.loading.contains_key(model) {
        pb::ModelState::Loading
    } else {
        pb::ModelState::Available
    }
}

fn info(
    folder: &ModelFolder,
    facts: Option<&ModelFacts>,
    resident: Option<&ResidentModel>,
    state: pb::ModelState,
) -> pb::ModelInfo {
    let mut info = pb::ModelInfo {
        name: folder.name.clone(),
        revision: folder.revision.clone(),
        state: state.into(),
        ..Default::default()
    };
    if let Some(facts) = facts {
        info.architecture.clone_from(&facts.architecture);
        info.context_length = facts.context_length;
        info.vocabulary_size = facts.vocabulary_size;
        info.parameter_count = facts.parameter_count;
        info.stored_as.clone_from(&facts.stored_as);
        info.file_bytes = facts.file_bytes;
    }
    if let Some(resident) = resident {
        info.revision.clone_from(&resident.revision);
        info.computes_in.clone_from(&resident.computes_in);
        info.parameter_count = resident.parameter_count;
        info.weight_bytes = resident.weight_bytes;
        info.kv_slab_bytes = resident.kv_slab_bytes;
        info.kv_idle_bytes = resident.kv_idle_bytes;
        info.kv_bytes_per_token = resident.kv_bytes_per_token;
        info.running_sequences = resident.running_sequences;
        info.queued_sequences = resident.queued_sequences;
        info.load_time = convert::timestamp(resident.loaded);
        info.last_use_time = convert::timestamp(resident.last_used);
    }
    info
}
