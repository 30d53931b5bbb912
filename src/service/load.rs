//! LoadModel: a model that is missing is downloaded first, if the caller may have it downloaded; then the
//! engine loads it, and callers of one model share its load. Both stop when nobody waits any more.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::caller::Caller;
use super::downloads::Download;
use super::fields::model_name;
use super::models::{ModelInfo, Models, hide};
use super::sessions::TurnHold;
use super::{Service, blocking};
use crate::engine::{Formats, LoadEvent, LoadSpec, ResidentModel};
use crate::error::{Error, MemoryRule, Shortage};
use crate::hub::ModelAssets;
use crate::ids::{ModelName, Principal};
use crate::residency::{Fit, ModelState, Stay};
use crate::session::SessionBook;

/// Time between two looks at a download.
const TICK: Duration = Duration::from_millis(250);

/// A load, or the question whether one would fit.
#[derive(Clone, Debug)]
pub struct LoadRequest {
    /// The model's name.
    pub model: String,
    /// Only says whether it would fit.
    pub validate_only: bool,
    /// Its number formats.
    pub formats: Formats,
    /// How long it stays, and whether it is pinned.
    pub stay: Stay,
}

/// An event of a load: `Validated` alone, or progress and then one `Loaded`.
#[derive(Debug)]
pub enum LoadUpdate {
    /// Whether it would fit.
    Validated(Fit),
    /// Its files are looked for, or were found and checked.
    Resolving,
    /// Its files are being downloaded; bytes on disk.
    Downloading {
        /// Bytes that are there.
        done_bytes: u64,
        /// Bytes of all files.
        total_bytes: u64,
    },
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

/// A load as one of its callers follows it. When this is dropped, it goes on if others wait for it.
pub struct Load {
    models: Arc<Models>,
    sessions: Arc<SessionBook<TurnHold>>,
    /// Whose sessions its caller may know of; None is everybody's.
    counted: Option<Principal>,
    stage: Stage,
}

enum Stage {
    /// Waits for the model's files.
    Downloading { download: Download, wish: Wish, told_bytes: Option<(u64, u64)> },
    /// The engine loads it. What is said first comes before its events.
    Loading { first: Option<LoadUpdate>, events: mpsc::Receiver<LoadEvent> },
    /// Only this is left to say.
    Last(Option<LoadUpdate>),
}

/// What a load is to do once the files are there.
struct Wish {
    model: ModelName,
    /// Whether the owner asks, who may load anything.
    is_owners: bool,
    formats: Formats,
    stay: Stay,
}

impl Wish {
    async fn of(self, assets: Arc<ModelAssets>) -> Result<(LoadSpec, Stay), Error> {
        let Self { model: _, is_owners: _, formats, stay } = self;
        Ok((blocking(move || LoadSpec::new(assets, formats)).await?, stay))
    }
}

impl Service {
    /// Starts a load, joins the one that runs, or says whether it would fit. Refusals that the files cause
    /// come before the first event, unless they must be downloaded first.
    ///
    /// # Errors
    /// The request is refused, the caller may not load or download the model, its files cannot be used, or
    /// the engine is dead.
    pub async fn load(&self, caller: &Caller, request: LoadRequest) -> Result<Load, Error> {
        let LoadRequest { model, validate_only, formats, stay } = request;
        if stay.pin.is_some() && !caller.is_owner() {
            return Err(Error::OwnerOnly("pin"));
        }
        let model = model_name("model", &model)?;
        let wish = Wish { model, is_owners: caller.is_owner(), formats, stay };
        let stage = match self.models.assets(&wish.model).await {
            Ok(assets) if validate_only => {
                let assets = self.models.changed(&assets).await.unwrap_or(assets);
                let (spec, _) = wish.of(assets).await?;
                Stage::Last(Some(LoadUpdate::Validated(self.engine.fits(spec).await?)))
            }
            Ok(assets) => {
                let changed = self.models.changed(&assets).await;
                let replaced = changed.is_some().then(|| assets.files.revision.clone());
                let (spec, mut stay) = self.models.allowed(changed.unwrap_or(assets), wish).await?;
                if let Some(revision) = replaced
                    && self.models.make_way(&revision, &spec).await?
                {
                    stay.pin = stay.pin.or(Some(true));
                }
                self.models.begin_load(spec, stay).await?
            }
            Err(error) if validate_only => return Err(error),
            Err(error) => {
                let download = self.models.download(&wish.model, wish.is_owners, error)?;
                Stage::Downloading { download, wish, told_bytes: None }
            }
        };
        let counted = caller.counted().cloned();
        let (models, sessions) = (Arc::clone(&self.models), Arc::clone(&self.sessions));
        Ok(Load { models, sessions, counted, stage })
    }
}

impl Models {
    /// Returns what the engine is to load, if whoever wishes it may load these files.
    async fn allowed(&self, assets: Arc<ModelAssets>, wish: Wish) -> Result<(LoadSpec, Stay), Error> {
        if !wish.is_owners {
            self.check_allowed(&assets).await?;
        }
        wish.of(assets).await
    }

    /// Unloads a model of a resident `revision` for what is to be loaded, if that can be in its place.
    /// Returns whether it was pinned.
    async fn make_way(&self, revision: &str, spec: &LoadSpec) -> Result<bool, Error> {
        let Fit { needed_bytes, available_bytes, budget_bytes, refused, .. } =
            self.engine().fits(spec.clone()).await?;
        let model = spec.model().clone();
        if let Some((rule, in_the_way)) = refused {
            let shortage = Shortage { model, needed_bytes, available_bytes, budget_bytes, rule, in_the_way };
            let refusal = match shortage.rule {
                MemoryRule::WholeBudget => Error::ModelTooLarge,
                MemoryRule::Pinned { .. } | MemoryRule::InUse { .. } | MemoryRule::System => {
                    Error::MemoryBudget
                }
            };
            return Err(refusal(Box::new(shortage)));
        }
        let models = self.engine().stats().await?.models.into_iter();
        // Somebody else may have unloaded it for the same reason.
        let is_old = |old: &ResidentModel| old.model == model && old.revision == revision;
        let Some(old) = models.into_iter().find(is_old) else { return Ok(false) };
        match self.engine().unload(model.clone()).await {
            Ok(_) | Err(Error::ModelNotLoaded(_)) => {}
            Err(error) => return Err(error),
        }
        tracing::info!(%model, "the files have changed: it is loaded again");
        Ok(old.pinned)
    }

    async fn begin_load(&self, spec: LoadSpec, stay: Stay) -> Result<Stage, Error> {
        let was_resident = self.engine().state(spec.model()) == ModelState::Resident;
        let events = self.engine().load(spec, stay).await?;
        Ok(Stage::Loading { first: (!was_resident).then_some(LoadUpdate::Resolving), events })
    }
}

impl Load {
    /// Returns the next event; none after the last.
    ///
    /// # Errors
    /// The model cannot be downloaded, the load failed, or the engine is dead.
    pub async fn next(&mut self) -> Result<Option<LoadUpdate>, Error> {
        loop {
            match &mut self.stage {
                Stage::Last(update) => return Ok(update.take()),
                Stage::Downloading { download, told_bytes, .. } => {
                    if let Some(update) = look_at(download, told_bytes).await? {
                        return Ok(Some(update));
                    }
                    let stage = std::mem::replace(&mut self.stage, Stage::Last(None));
                    let Stage::Downloading { wish, .. } = stage else { return Ok(None) };
                    let assets = self.models.assets(&wish.model).await?;
                    let (spec, stay) = self.models.allowed(assets, wish).await?;
                    self.stage = self.models.begin_load(spec, stay).await?;
                }
                Stage::Loading { first, events } => {
                    if let Some(first) = first.take() {
                        return Ok(Some(first));
                    }
                    let event = events.recv().await.ok_or(Error::EngineDead)?;
                    return self.update(event).map(Some);
                }
            }
        }
    }

    fn update(&mut self, event: LoadEvent) -> Result<LoadUpdate, Error> {
        Ok(match event {
            LoadEvent::Progress { done_bytes, total_bytes } => {
                LoadUpdate::Reading { done_bytes, total_bytes }
            }
            LoadEvent::Warming => LoadUpdate::Warming,
            LoadEvent::Failed(error) => return Err(error),
            LoadEvent::Loaded(mut resident, door, _) => {
                self.stage = Stage::Last(None);
                let facts = door.assets().files.facts.clone();
                let mut counts = self.sessions.count_by_model(self.counted.as_ref());
                let sessions = counts.remove(&resident.model).unwrap_or_default();
                self.counted.iter().for_each(|_| hide(&mut resident));
                let info = ModelInfo::of_resident(*resident, Some(facts));
                LoadUpdate::Loaded(Box::new(ModelInfo { sessions, ..info }))
            }
        })
    }
}

/// Returns what is new of a download; nothing once it is complete.
async fn look_at(
    download: &Download,
    told_bytes: &mut Option<(u64, u64)>,
) -> Result<Option<LoadUpdate>, Error> {
    if told_bytes.is_none() {
        *told_bytes = Some((0, 0));
        return Ok(Some(LoadUpdate::Resolving));
    }
    loop {
        let is_complete = tokio::select! {
            biased;
            ended = download.ended() => ended.map(|()| true)?,
            () = tokio::time::sleep(TICK) => false,
        };
        let bytes @ (done_bytes, total_bytes) = download.bytes();
        if total_bytes > 0 && *told_bytes != Some(bytes) {
            *told_bytes = Some(bytes);
            return Ok(Some(LoadUpdate::Downloading { done_bytes, total_bytes }));
        }
        if is_complete {
            return Ok(None);
        }
    }
}
