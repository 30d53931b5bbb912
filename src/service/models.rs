//! Models: finding, unloading, describing, and the lease that a call holds. Which models are in memory is the
//! engine's to say; it publishes a table, which is read here without a round trip. `load` loads them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::caller::Caller;
use super::downloads::{Download, Downloads};
use super::fields::{model_name, page_size, page_token};
use super::waiting::{Wait, Waiting};
use super::{Service, blocking};
use crate::engine::{EngineHandle, Formats, LoadSpec, ResidentModel};
use crate::error::Error;
use crate::hub::{
    HubError, Listed, ModelAccess, ModelAssets, ModelCatalog, ModelFacts, ModelFiles, ModelFolder, RepoName,
};
use crate::ids::{ConnectionId, ModelName};
use crate::residency::{ModelLease, ModelState};

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
    /// What keeps it from being loaded, as far as its files were looked at; empty if nothing.
    pub problem: String,
    /// Its memory and sequences; none unless resident.
    pub resident: Option<ResidentModel>,
    /// Sessions that are bound to it.
    pub sessions: usize,
    /// The folder of its files; empty if it is unknown.
    pub path: PathBuf,
}

/// Hides what is cached of sessions and prompts, of which others are not to know.
pub(super) fn hide(resident: &mut ResidentModel) {
    (resident.kv_idle_bytes, resident.kv_reserved_bytes) = (0, 0);
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
    catalog: RwLock<Arc<ModelCatalog>>,
    access: RwLock<Arc<ModelAccess>>,
    downloads: Downloads,
    waiting: Arc<Waiting>,
    /// The models whose files are being read, each by one call at a time.
    reading: Mutex<HashMap<ModelName, Arc<tokio::sync::Mutex<()>>>>,
}

/// A model as a call finds it. One that is not resident is loaded once the call has all that can be refused
/// without it.
pub(super) enum Found {
    /// In memory, with a lease.
    Resident(ModelLease),
    /// To be loaded. A call that waited for its download keeps its place among those who wait.
    OnDisk(Arc<ModelAssets>, Option<Wait>),
}

impl Found {
    /// Returns its assets.
    pub(super) fn assets(&self) -> &Arc<ModelAssets> {
        match self {
            Self::Resident(lease) => lease.assets(),
            Self::OnDisk(assets, _) => assets,
        }
    }
}

impl Service {
    /// Frees a model; returns the bytes given back.
    ///
    /// # Errors
    /// The model is not resident or busy, or the engine is dead.
    pub async fn unload(&self, model: &str) -> Result<u64, Error> {
        let model = model_name("model", model)?;
        self.engine.unload(model).await
    }

    /// Describes a model: as it is in memory, else as it is on disk.
    ///
    /// # Errors
    /// The model is unknown or its files cannot be used, or the engine is dead.
    pub async fn get_model(&self, caller: &Caller, model: &str) -> Result<ModelInfo, Error> {
        let mut described = [self.models.describe(&model_name("model", model)?).await?];
        self.count_sessions(caller, &mut described);
        let [described] = described;
        Ok(described)
    }

    /// Adds the numbers of sessions that a caller may know of, and hides what is cached of others'.
    pub(super) fn count_sessions(&self, caller: &Caller, models: &mut [ModelInfo]) {
        let counts = self.sessions.count_by_model(caller.counted());
        for model in models {
            model.resident.iter_mut().filter(|_| !caller.is_owner()).for_each(hide);
            model.sessions = counts.get(&ModelName::from(model.name.as_str())).copied().unwrap_or_default();
        }
    }

    /// Describes a page of models by name; returns the token of the next page too, none after the last.
    ///
    /// # Errors
    /// A field is refused, or the engine is dead.
    pub async fn list_models(
        &self,
        caller: &Caller,
        page: &ModelPage,
    ) -> Result<(Vec<ModelInfo>, Option<String>), Error> {
        let after = page_token(&page.token, model_name)?;
        let after = after.as_ref().map_or("", ModelName::as_str);
        let listed = self.models.list(after, page_size(page.size)?, page.resident_only).await;
        let (mut models, next) = listed?;
        self.count_sessions(caller, &mut models);
        Ok((models, next))
    }

    /// Says what is wrong with the model roots.
    ///
    /// # Errors
    /// The daemon ends.
    pub async fn root_problems(&self) -> Result<Vec<String>, Error> {
        let catalog = self.models.catalog();
        blocking(move || Ok(catalog.root_problems())).await
    }
}

impl Models {
    pub(super) fn new(
        engine: EngineHandle,
        catalog: ModelCatalog,
        access: ModelAccess,
        downloads_running_max: usize,
    ) -> Self {
        Self {
            engine,
            catalog: RwLock::new(Arc::new(catalog)),
            access: RwLock::new(Arc::new(access)),
            downloads: Downloads::new(downloads_running_max),
            waiting: Arc::default(),
            reading: Mutex::default(),
        }
    }

    pub(super) fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Returns the models on disk.
    fn catalog(&self) -> Arc<ModelCatalog> {
        Arc::clone(&self.catalog.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks for models elsewhere from now on; what is resident stays.
    pub(super) fn look_in(&self, catalog: ModelCatalog) {
        *self.catalog.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(catalog);
    }

    /// Changes what calls may load and download.
    pub(super) fn allow(&self, access: ModelAccess) {
        *self.access.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(access);
    }

    fn access(&self) -> Arc<ModelAccess> {
        Arc::clone(&self.access.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Refuses a model that calls may not load.
    pub(super) async fn check_allowed(&self, assets: &ModelAssets) -> Result<(), Error> {
        let (access, files) = (self.access(), Arc::clone(&assets.files));
        blocking(move || {
            let ModelFiles { name, folder, .. } = &*files;
            let refusal = || Error::ModelNotAllowed { model: name.clone(), key: "loads_allowed" };
            if access.may_load(name.as_str(), folder) { Ok(()) } else { Err(refusal()) }
        })
        .await
    }

    /// Joins or begins the download of a model whose files are missing, as `missing` says, if it can be
    /// downloaded and the owner asks or allows it; otherwise returns why not.
    pub(super) fn download(
        &self,
        model: &ModelName,
        is_owners: bool,
        missing: Error,
    ) -> Result<Download, Error> {
        let (repo, cache) = self.downloadable(model, is_owners, missing)?;
        Ok(self.downloads.join(repo, cache))
    }

    /// Returns what is to be downloaded, and the cache it goes to.
    fn downloadable(
        &self,
        model: &ModelName,
        is_owners: bool,
        missing: Error,
    ) -> Result<(RepoName, PathBuf), Error> {
        let is_missing = matches!(missing, Error::ModelNotFound { .. } | Error::ModelIncomplete { .. });
        let repo = RepoName::of_model(model.as_str()).filter(|_| is_missing);
        let catalog = self.catalog();
        let (Some(repo), Some(cache)) = (repo, catalog.hf_cache()) else { return Err(missing) };
        if is_owners || self.access().may_download(&repo) {
            Ok((repo, cache.to_path_buf()))
        } else {
            Err(Error::ModelNotAllowed { model: model.clone(), key: "downloads_allowed" })
        }
    }

    /// Returns the assets of a model: of the resident weights, else as the files are now.
    pub(super) async fn assets(&self, model: &ModelName) -> Result<Arc<ModelAssets>, Error> {
        if let Some(door) = self.engine.door(model) {
            return Ok(Arc::clone(door.assets()));
        }
        // Those who wait find in the catalog what the first one read. It reads on when its caller leaves.
        let reading = self.reading(model).lock_owned().await;
        let (catalog, model) = (self.catalog(), model.clone());
        blocking(move || {
            let _reading = reading;
            catalog.assets(&model)
        })
        .await
    }

    /// Returns the assets of a model as its files are now, if they are usable and others than these.
    pub(super) async fn changed(&self, assets: &Arc<ModelAssets>) -> Option<Arc<ModelAssets>> {
        let reading = self.reading(&assets.files.name).lock_owned().await;
        let (catalog, known) = (self.catalog(), Arc::clone(assets));
        let found = blocking(move || {
            let _reading = reading;
            let ModelFiles { name, revision, .. } = &*known.files;
            let is_same = catalog.resolve(name)?.revision == *revision;
            if is_same { Ok(None) } else { catalog.assets(name).map(Some) }
        });
        found.await.unwrap_or_else(|error| {
            tracing::warn!(model = %assets.files.name, %error, "the files on disk cannot be used");
            None
        })
    }

    fn reading(&self, model: &ModelName) -> Arc<tokio::sync::Mutex<()>> {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        reading.retain(|_, calls| Arc::strong_count(calls) > 1);
        Arc::clone(reading.entry(model.clone()).or_default())
    }

    /// Finds a model for a call that needs it resident. It is downloaded if calls may have that; who waits
    /// for that is counted among those who wait, and its bytes are set aside.
    pub(super) async fn find(&self, model: &ModelName, caller: &Caller) -> Result<Found, Error> {
        if let Some(lease) = self.engine.lease(model) {
            return Ok(Found::Resident(lease));
        }
        let may_load = self.access().auto_load;
        let (assets, wait) = match self.assets(model).await {
            Err(missing) if may_load => {
                let (repo, cache) = self.downloadable(model, false, missing)?;
                let wait = self.waiting.enter(caller.connection, self.engine.settings())?;
                caller.claim.set_aside()?;
                self.downloads.join(repo, cache).ended().await?;
                (self.assets(model).await?, Some(wait))
            }
            found => (found?, None),
        };
        if !may_load {
            return Err(Error::ModelNotLoaded(model.clone()));
        }
        self.check_allowed(&assets).await?;
        Ok(Found::OnDisk(assets, wait))
    }

    /// Returns a lease of a model that was found, which is loaded first unless it is resident; as many of a
    /// connection may wait for that as in the engine's queue.
    pub(super) async fn lease(&self, found: Found, connection: ConnectionId) -> Result<ModelLease, Error> {
        let (assets, wait) = match found {
            Found::Resident(lease) => return Ok(lease),
            Found::OnDisk(assets, wait) => (assets, wait),
        };
        let ModelFiles { name, revision, .. } = &*assets.files;
        let lease = match self.engine.lease(name) {
            Some(lease) => lease,
            None => {
                let enter = || self.waiting.enter(connection, self.engine.settings());
                let _wait = wait.map_or_else(enter, Ok)?;
                self.load(Arc::clone(&assets)).await?
            }
        };
        // Somebody may have loaded other files of that name meanwhile.
        let is_same = lease.assets().files.revision == *revision;
        if is_same { Ok(lease) } else { Err(Error::ModelUnloaded(name.clone())) }
    }

    /// Loads a model that the owner wants to be there, whatever calls may load.
    pub(super) async fn preload(&self, model: &ModelName) -> Result<(), Error> {
        let assets = match self.assets(model).await {
            Err(missing) => {
                self.download(model, false, missing)?.ended().await?;
                self.assets(model).await?
            }
            Ok(assets) => assets,
        };
        self.load(assets).await.map(drop)
    }

    async fn load(&self, assets: Arc<ModelAssets>) -> Result<ModelLease, Error> {
        let spec = LoadSpec::new(assets, Formats::default())?;
        self.engine.load_to_use(spec).await
    }

    /// Refuses the name of an unknown model.
    pub(super) async fn check_exists(&self, model: &ModelName) -> Result<(), Error> {
        let (catalog, model) = (self.catalog(), model.clone());
        blocking(move || catalog.resolve(&model).map(drop)).await
    }

    /// Describes a model: as it is in memory, else as it is on disk.
    pub(super) async fn describe(&self, model: &ModelName) -> Result<ModelInfo, Error> {
        let resident =
            self.engine.stats().await?.models.into_iter().find(|resident| resident.model == *model);
        let resident = match (resident, self.engine.door(model)) {
            (Some(resident), Some(door)) => {
                let facts = door.assets().files.facts.clone();
                return Ok(ModelInfo::of_resident(resident, Some(facts)));
            }
            (resident, _) => resident,
        };
        let (catalog, name) = (self.catalog(), model.clone());
        let (folder, facts) = blocking(move || {
            let folder = catalog.resolve(&name)?;
            let facts = catalog.facts_of(&folder)?;
            Ok((folder, facts))
        })
        .await?;
        Ok(self.info(Described::of(folder, Ok(facts)), resident))
    }

    async fn list(
        &self,
        after: &str,
        size: usize,
        resident_only: bool,
    ) -> Result<(Vec<ModelInfo>, Option<String>), Error> {
        let resident = self.engine.stats().await?.models;
        let mut folders: Listed =
            resident.iter().map(|model| (model.model.to_string(), Ok(folder_of(model)))).collect();
        if !resident_only {
            let catalog = self.catalog();
            for (name, found) in blocking(move || Ok(catalog.list())).await? {
                folders.entry(name).or_insert(found);
            }
        }
        let mut rest = folders.into_iter().skip_while(|(name, _)| name.as_str() <= after).peekable();
        let chosen: Vec<_> = rest.by_ref().take(size).collect();
        let next = rest.peek().and(chosen.last()).map(|(last, _)| last.clone());
        let catalog = self.catalog();
        let described = blocking(move || Ok(facts_of(&catalog, chosen))).await?;
        let models = described.into_iter().map(|described| {
            let resident = resident.iter().find(|resident| resident.model.as_str() == described.name);
            self.info(described, resident.cloned())
        });
        Ok((models.collect(), next))
    }

    fn info(&self, described: Described, resident: Option<ResidentModel>) -> ModelInfo {
        let Described { name, revision, path, facts, problem } = described;
        match resident {
            Some(resident) => ModelInfo::of_resident(resident, facts),
            None => {
                let state = match self.engine.state(&ModelName::from(name.as_str())) {
                    ModelState::Loading => ModelState::Loading,
                    // Loaded since the engine was asked: described as it was then.
                    ModelState::Available | ModelState::Resident => ModelState::Available,
                };
                ModelInfo { name, revision, state, facts, problem, resident: None, sessions: 0, path }
            }
        }
    }
}

impl ModelInfo {
    /// Describes a resident model, whose folder may have changed or gone since.
    pub(super) fn of_resident(resident: ResidentModel, facts: Option<ModelFacts>) -> Self {
        let (name, revision) = (resident.model.to_string(), resident.revision.clone());
        let (problem, path) = (String::new(), resident.path.clone());
        let state = ModelState::Resident;
        Self { name, revision, state, facts, problem, resident: Some(resident), sessions: 0, path }
    }
}

fn folder_of(resident: &ResidentModel) -> ModelFolder {
    ModelFolder {
        name: resident.model.to_string(),
        path: PathBuf::new(),
        revision: resident.revision.clone(),
    }
}

/// A model as its files describe it.
struct Described {
    name: String,
    revision: String,
    path: PathBuf,
    facts: Option<ModelFacts>,
    /// What is wrong with its files; empty if nothing.
    problem: String,
}

impl Described {
    fn of(folder: ModelFolder, facts: Result<ModelFacts, Error>) -> Self {
        let ModelFolder { name, revision, path } = folder;
        let problem = facts.as_ref().err().map(ToString::to_string).unwrap_or_default();
        Self { name, revision, path, facts: facts.ok(), problem }
    }
}

/// Adds what the files say, or what is wrong with them.
fn facts_of(catalog: &ModelCatalog, models: Vec<(String, Result<ModelFolder, HubError>)>) -> Vec<Described> {
    let described = models.into_iter().map(|(name, found)| {
        let mut folder = match found {
            Ok(folder) => folder,
            Err(error) => {
                let problem = error.into_error(&name.as_str().into()).to_string();
                return Described {
                    name,
                    revision: String::new(),
                    path: PathBuf::new(),
                    facts: None,
                    problem,
                };
            }
        };
        if folder.path.as_os_str().is_empty()
            && let Ok(found) = catalog.resolve(&name.as_str().into())
        {
            folder.path = found.path;
        }
        let facts = catalog.facts_of(&folder);
        Described::of(folder, facts)
    });
    described.collect()
}
