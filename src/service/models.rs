//! Models: loading, unloading, describing. `resident` and `loading` are what the edge knows; the engine has
//! the last word, and a model that it no longer has is noticed when it refuses the work ([`lost`]), then
//! loaded again.

use std::collections::BTreeMap;
use std::sync::Arc;

use dashmap::DashMap;
use tokio::sync::mpsc;
use tracing::Instrument;

use super::fields::{model_name, page_size, page_token};
use super::{Service, blocking};
use crate::engine::{ComputeDtype, EngineHandle, Fit, KvDtype, LoadEvent, LoadSpec, ResidentModel};
use crate::error::Error;
use crate::hub::{ModelAssets, ModelCatalog, ModelFacts, ModelFolder};
use crate::ids::ModelName;

/// Load events buffered for a slow caller; progress beyond that is skipped.
const EVENTS_BUFFERED_MAX: usize = 16;

/// A load, or the question whether one would fit.
#[derive(Clone, Debug)]
pub struct LoadRequest {
    /// The model's name.
    pub model: String,
    /// Only says whether it would fit.
    pub validate_only: bool,
    /// Number format to compute with.
    pub dtype: ComputeDtype,
    /// Number format of its KV cache.
    pub kv: KvDtype,
}

/// An event of a load: `Validated` alone, or progress and then one `Loaded`.
#[derive(Debug)]
pub enum LoadUpdate {
    /// Whether it would fit.
    Validated(Fit),
    /// Its files were found and checked.
    Resolving,
    /// Weights are being read; bytes of the files.
    Reading {
        /// Bytes read.
        done_bytes: u64,
        /// Bytes to read.
        total_bytes: u64,
    },
    /// First steps run.
    Warming,
    /// The model is resident.
    Loaded(Box<ModelInfo>),
}

/// A load that the engine has taken. It goes on when this is dropped.
#[derive(Debug)]
pub struct Load {
    facts: ModelFacts,
    /// Comes before the engine's events.
    first: Option<LoadUpdate>,
    /// None after the last event.
    events: Option<mpsc::Receiver<LoadEvent>>,
}

/// A model's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelState {
    /// On disk only.
    Available,
    /// Being loaded.
    Loading,
    /// In memory.
    Resident,
}

/// A model's facts.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Its name.
    pub name: String,
    /// Identifies its weights: the resident ones, else those on disk.
    pub revision: String,
    /// Its place.
    pub state: ModelState,
    /// Facts from its files; none where they are damaged.
    pub facts: Option<ModelFacts>,
    /// Its memory and sequences; none unless resident.
    pub resident: Option<ResidentModel>,
}

/// A page of the models on disk and in memory.
#[derive(Clone, Debug)]
pub struct ModelPage {
    /// Entries; 0 is the default.
    pub size: u32,
    /// The token that came with the page before; empty for the first page.
    pub token: String,
    /// Only resident models.
    pub resident_only: bool,
}

/// The models as the service knows them.
pub(super) struct Models {
    engine: EngineHandle,
    catalog: Arc<ModelCatalog>,
    auto_load: bool,
    known: Arc<Known>,
}

#[derive(Default)]
struct Known {
    /// Models that were loaded and not unloaded since.
    resident: DashMap<ModelName, Arc<ModelAssets>>,
    /// Models being loaded, and the number of calls that wait for each.
    loading: DashMap<ModelName, u32>,
}

impl Service {
    /// Starts a load, joins the one that runs, or says whether it would fit. Refusals that the files cause
    /// come before the first event.
    ///
    /// # Errors
    /// The request is refused, the model's files cannot be used, or the engine is dead.
    pub async fn load(&self, request: LoadRequest) -> Result<Load, Error> {
        let LoadRequest { model, validate_only, dtype, kv } = request;
        let model = model_name("model", &model)?;
        let assets = self.models.assets(&model).await?;
        let facts = assets.facts.clone();
        if validate_only {
            let fit = self.engine.fits(load_spec(&assets, dtype, kv)).await?;
            return Ok(Load { facts, first: Some(LoadUpdate::Validated(fit)), events: None });
        }
        let was_resident = self.models.known.resident.contains_key(&model);
        let events = self.models.start_load(&assets, (dtype, kv))?;
        let first = (!was_resident).then_some(LoadUpdate::Resolving);
        Ok(Load { facts, first, events: Some(events) })
    }

    /// Frees a model; returns the bytes given back.
    ///
    /// # Errors
    /// The model is not resident or busy, or the engine is dead.
    pub async fn unload(&self, model: &str) -> Result<u64, Error> {
        let model = model_name("model", model)?;
        let freed_bytes = self.engine.unload(model.clone()).await?;
        self.models.known.resident.remove(&model);
        Ok(freed_bytes)
    }

    /// Describes a model: as it is in memory, else as it is on disk.
    ///
    /// # Errors
    /// The model is unknown or its files cannot be used, or the engine is dead.
    pub async fn get_model(&self, model: &str) -> Result<ModelInfo, Error> {
        self.models.describe(&model_name("model", model)?).await
    }

    /// Describes a page of models by name; returns the token of the next page too, none after the last.
    ///
    /// # Errors
    /// A field is refused, or the engine is dead.
    pub async fn list_models(&self, page: &ModelPage) -> Result<(Vec<ModelInfo>, Option<String>), Error> {
        let after = page_token(&page.token, model_name)?;
        let after = after.as_ref().map_or("", ModelName::as_str);
        self.models.list(after, page_size(page.size)?, page.resident_only).await
    }
}

impl Load {
    /// Returns the next event; none after the last.
    ///
    /// # Errors
    /// The load failed, or the engine is dead.
    pub async fn next(&mut self) -> Result<Option<LoadUpdate>, Error> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        let Some(events) = &mut self.events else { return Ok(None) };
        Ok(Some(match events.recv().await.ok_or(Error::EngineDead)? {
            LoadEvent::Progress { done_bytes, total_bytes } => {
                LoadUpdate::Reading { done_bytes, total_bytes }
            }
            LoadEvent::Warming => LoadUpdate::Warming,
            LoadEvent::Failed(error) => return Err(error),
            LoadEvent::Loaded(resident) => {
                self.events = None;
                LoadUpdate::Loaded(Box::new(ModelInfo::of_resident(*resident, Some(self.facts.clone()))))
            }
        }))
    }
}

/// Returns whether the engine refused work because it no longer has the model.
pub(super) fn lost(error: &Error) -> bool {
    matches!(error, Error::ModelUnloaded(_) | Error::ModelNotLoaded(_))
}

impl Models {
    pub(super) fn new(engine: EngineHandle, catalog: ModelCatalog, auto_load: bool) -> Self {
        Self { engine, catalog: Arc::new(catalog), auto_load, known: Arc::default() }
    }

    /// Returns the assets of a model: of the resident weights, else as the files are now.
    pub(super) async fn assets(&self, model: &ModelName) -> Result<Arc<ModelAssets>, Error> {
        if let Some(resident) = self.known.resident.get(model) {
            return Ok(Arc::clone(&resident));
        }
        let (catalog, model) = (Arc::clone(&self.catalog), model.clone());
        blocking(move || catalog.assets(&model)).await
    }

    /// Returns the assets of a model, which is loaded first unless it is resident.
    pub(super) async fn resident(&self, model: &ModelName) -> Result<Arc<ModelAssets>, Error> {
        if let Some(resident) = self.known.resident.get(model) {
            return Ok(Arc::clone(&resident));
        }
        let assets = self.assets(model).await?;
        if !self.auto_load {
            return Err(Error::ModelNotLoaded(model.clone()));
        }
        self.load(&assets).await?;
        Ok(assets)
    }

    /// Loads a model again that the engine lost. Fails if its files changed: tokens were made for the old
    /// ones.
    pub(super) async fn reload(&self, held: &ModelAssets) -> Result<(), Error> {
        self.known.resident.remove(&held.name);
        let assets = self.resident(&held.name).await?;
        if assets.revision == held.revision { Ok(()) } else { Err(Error::ModelUnloaded(held.name.clone())) }
    }

    /// Loads a model whatever `auto_load` says.
    pub(super) async fn preload(&self, model: &ModelName) -> Result<(), Error> {
        let assets = self.assets(model).await?;
        self.load(&assets).await
    }

    /// Refuses the name of an unknown model.
    pub(super) async fn check_exists(&self, model: &ModelName) -> Result<(), Error> {
        let (catalog, model) = (Arc::clone(&self.catalog), model.clone());
        blocking(move || catalog.resolve(&model).map(drop)).await
    }

    /// Describes a model: as it is in memory, else as it is on disk.
    pub(super) async fn describe(&self, model: &ModelName) -> Result<ModelInfo, Error> {
        let resident =
            self.engine.stats().await?.models.into_iter().find(|resident| resident.model == *model);
        let resident = match (resident, self.known.resident.get(model)) {
            (Some(resident), Some(assets)) => {
                return Ok(ModelInfo::of_resident(resident, Some(assets.facts.clone())));
            }
            (resident, _) => resident,
        };
        let (catalog, name) = (Arc::clone(&self.catalog), model.clone());
        let (folder, facts) = blocking(move || {
            let folder = catalog.resolve(&name)?;
            let facts = catalog.facts_of(&folder)?;
            Ok((folder, facts))
        })
        .await?;
        Ok(self.info(folder, Some(facts), resident))
    }

    async fn list(
        &self,
        after: &str,
        size: usize,
        resident_only: bool,
    ) -> Result<(Vec<ModelInfo>, Option<String>), Error> {
        let resident = self.engine.stats().await?.models;
        let mut folders: BTreeMap<String, ModelFolder> =
            resident.iter().map(|model| (model.model.to_string(), folder_of(model))).collect();
        if !resident_only {
            let catalog = Arc::clone(&self.catalog);
            for folder in blocking(move || Ok(catalog.list())).await? {
                folders.entry(folder.name.clone()).or_insert(folder);
            }
        }
        let mut rest = folders.into_values().skip_while(|folder| folder.name.as_str() <= after).peekable();
        let chosen: Vec<ModelFolder> = rest.by_ref().take(size).collect();
        let next = rest.peek().and(chosen.last()).map(|last| last.name.clone());
        let catalog = Arc::clone(&self.catalog);
        let described = blocking(move || Ok(facts_of(&catalog, chosen))).await?;
        let models = described.into_iter().map(|(folder, facts)| {
            let resident = resident.iter().find(|resident| resident.model.as_str() == folder.name);
            self.info(folder, facts, resident.cloned())
        });
        Ok((models.collect(), next))
    }

    fn info(
        &self,
        folder: ModelFolder,
        facts: Option<ModelFacts>,
        resident: Option<ResidentModel>,
    ) -> ModelInfo {
        match resident {
            Some(resident) => ModelInfo::of_resident(resident, facts),
            None => {
                let ModelFolder { name, revision, .. } = folder;
                let is_loading = self.known.loading.contains_key(&ModelName::from(name.as_str()));
                let state = if is_loading { ModelState::Loading } else { ModelState::Available };
                ModelInfo { name, revision, state, facts, resident: None }
            }
        }
    }

    async fn load(&self, assets: &Arc<ModelAssets>) -> Result<(), Error> {
        let mut events = self.start_load(assets, (ComputeDtype::Auto, KvDtype::Auto))?;
        loop {
            match events.recv().await {
                Some(LoadEvent::Loaded(resident)) if resident.revision == assets.revision => return Ok(()),
                Some(LoadEvent::Loaded(_)) => {
                    // Weights of other files than the tokenizer's: unloaded, so that a retry reads both anew.
                    self.engine.unload(assets.name.clone()).await?;
                    return Err(Error::ModelUnloaded(assets.name.clone()));
                }
                Some(LoadEvent::Failed(error)) => return Err(error),
                Some(LoadEvent::Progress { .. } | LoadEvent::Warming) => {}
                None => return Err(Error::EngineDead),
            }
        }
    }

    /// Starts a load or joins the one that runs. It is followed to its end even if the receiver is dropped,
    /// because the engine does not stop it either.
    fn start_load(
        &self,
        assets: &Arc<ModelAssets>,
        (dtype, kv): (ComputeDtype, KvDtype),
    ) -> Result<mpsc::Receiver<LoadEvent>, Error> {
        let from_engine = self.engine.load(load_spec(assets, dtype, kv))?;
        let (to_caller, events) = mpsc::channel(EVENTS_BUFFERED_MAX);
        let follow = follow(Arc::clone(&self.known), Arc::clone(assets), from_engine, to_caller);
        tokio::spawn(follow.in_current_span());
        Ok(events)
    }
}

impl ModelInfo {
    /// Describes a resident model, whose folder may have changed or gone since.
    fn of_resident(resident: ResidentModel, facts: Option<ModelFacts>) -> Self {
        let (name, revision) = (resident.model.to_string(), resident.revision.clone());
        Self { name, revision, state: ModelState::Resident, facts, resident: Some(resident) }
    }
}

fn folder_of(resident: &ResidentModel) -> ModelFolder {
    ModelFolder {
        name: resident.model.to_string(),
        path: std::path::PathBuf::new(),
        revision: resident.revision.clone(),
    }
}

/// Adds what the files say; a model whose files are damaged is listed without.
fn facts_of(catalog: &ModelCatalog, folders: Vec<ModelFolder>) -> Vec<(ModelFolder, Option<ModelFacts>)> {
    let with_facts = folders.into_iter().map(|mut folder| {
        if folder.path.as_os_str().is_empty()
            && let Ok(found) = catalog.resolve(&folder.name.as_str().into())
        {
            folder.path = found.path;
        }
        let facts = catalog.facts_of(&folder).ok();
        (folder, facts)
    });
    with_facts.collect()
}

fn load_spec(assets: &ModelAssets, dtype: ComputeDtype, kv: KvDtype) -> LoadSpec {
    LoadSpec { files: Arc::clone(&assets.files), dtype, kv }
}

async fn follow(
    known: Arc<Known>,
    assets: Arc<ModelAssets>,
    mut from_engine: mpsc::Receiver<LoadEvent>,
    to_caller: mpsc::Sender<LoadEvent>,
) {
    let name = assets.name.clone();
    *known.loading.entry(name.clone()).or_default() += 1;
    while let Some(event) = from_engine.recv().await {
        match &event {
            LoadEvent::Loaded(resident) if resident.revision == assets.revision => {
                tracing::info!(model = %name, weight_bytes = resident.weight_bytes, "the model is resident");
                known.resident.insert(name.clone(), Arc::clone(&assets));
            }
            // Other files than those that were read: they changed between two loads.
            LoadEvent::Loaded(_) | LoadEvent::Progress { .. } | LoadEvent::Warming => {}
            LoadEvent::Failed(error) => tracing::warn!(model = %name, %error, "the load failed"),
        }
        let is_last = matches!(event, LoadEvent::Loaded(_) | LoadEvent::Failed(_));
        if is_last {
            known.end_loading(&name);
            // The caller may be gone.
            drop(to_caller.send(event).await);
            return;
        }
        drop(to_caller.try_send(event));
    }
    known.end_loading(&name);
}

impl Known {
    fn end_loading(&self, name: &ModelName) {
        if let Some(mut calls) = self.loading.get_mut(name) {
            *calls -= 1;
        }
        self.loading.remove_if(name, |_, calls| *calls == 0);
    }
}
