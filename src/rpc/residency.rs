//! Which models are resident, as the edge knows it, and making one so. The engine has the last word: a model
//! that it no longer has is found out when it refuses the work, and loaded again.

use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::Instrument;

use super::edge::{Edge, blocking};
use crate::engine::{ComputeDtype, KvDtype, LoadEvent, LoadSpec};
use crate::error::Error;
use crate::hub::ModelAssets;
use crate::ids::ModelName;

/// Events of a load that may wait for a slow caller; progress beyond that is skipped.
const EVENTS_BUFFERED_MAX: usize = 16;

impl Edge {
    /// The assets of a model: of the weights that are resident, else as the files are now.
    pub(super) async fn assets(&self, model: &ModelName) -> Result<Arc<ModelAssets>, Error> {
        if let Some(resident) = self.resident.get(model) {
            return Ok(Arc::clone(&resident));
        }
        let (shelf, model) = (Arc::clone(&self.shelf), model.clone());
        blocking(move || shelf.assets(&model)).await
    }

    /// The assets of a model that is resident, loaded now if need be and allowed.
    pub(super) async fn ensure_loaded(
        self: &Arc<Self>,
        model: &ModelName,
    ) -> Result<Arc<ModelAssets>, Error> {
        if let Some(resident) = self.resident.get(model) {
            return Ok(Arc::clone(&resident));
        }
        let assets = self.assets(model).await?;
        if !self.auto_load {
            return Err(Error::ModelNotLoaded(model.clone()));
        }
        self.load(assets).await
    }

    /// Loads a model at start.
    ///
    /// # Errors
    /// There is no such model, or it cannot be loaded.
    pub async fn preload(self: &Arc<Self>, model: &ModelName) -> Result<(), Error> {
        let assets = self.assets(model).await?;
        self.load(assets).await.map(drop)
    }

    async fn load(self: &Arc<Self>, assets: Arc<ModelAssets>) -> Result<Arc<ModelAssets>, Error> {
        let mut events = self.start_load(&assets, (ComputeDtype::Auto, KvDtype::Auto))?;
        loop {
            match events.recv().await {
                Some(LoadEvent::Loaded(resident)) if resident.revision == assets.revision => {
                    return Ok(assets);
                }
                Some(LoadEvent::Loaded(_)) => {
                    // Weights of other files than the tokenizer's: they go, and the caller comes again.
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
    pub(super) fn start_load(
        self: &Arc<Self>,
        assets: &Arc<ModelAssets>,
        (dtype, kv): (ComputeDtype, KvDtype),
    ) -> Result<mpsc::Receiver<LoadEvent>, Error> {
        let from_engine = self.engine.load(load_spec(assets, dtype, kv))?;
        let (to_caller, events) = mpsc::channel(EVENTS_BUFFERED_MAX);
        let follow = follow(Arc::clone(self), Arc::clone(assets), from_engine, to_caller);
        tokio::spawn(follow.in_current_span());
        Ok(events)
    }
}

/// What the engine is told of a model.
pub(super) fn load_spec(assets: &ModelAssets, dtype: ComputeDtype, kv: KvDtype) -> LoadSpec {
    let ModelAssets { name, folder, revision, .. } = assets;
    LoadSpec { model: name.clone(), folder: folder.clone(), revision: revision.clone(), dtype, kv }
}

async fn follow(
    edge: Arc<Edge>,
    assets: Arc<ModelAssets>,
    mut from_engine: mpsc::Receiver<LoadEvent>,
    to_caller: mpsc::Sender<LoadEvent>,
) {
    let name = assets.name.clone();
    *edge.loading.entry(name.clone()).or_default() += 1;
    while let Some(event) = from_engine.recv().await {
        match &event {
            LoadEvent::Loaded(resident) if resident.revision == assets.revision => {
                tracing::info!(model = %name, weight_bytes = resident.weight_bytes, "the model is resident");
                edge.resident.insert(name.clone(), Arc::clone(&assets));
            }
            // Other files than those that were read: they changed between two loads.
            LoadEvent::Loaded(_) | LoadEvent::Progress { .. } | LoadEvent::Warming => {}
            LoadEvent::Failed(error) => tracing::warn!(model = %name, %error, "the load failed"),
        }
        let is_last = matches!(event, LoadEvent::Loaded(_) | LoadEvent::Failed(_));
        if is_last {
            forget_loading(&edge, &name);
            // The caller may be gone.
            drop(to_caller.send(event).await);
            return;
        }
        drop(to_caller.try_send(event));
    }
    forget_loading(&edge, &name);
}

fn forget_loading(edge: &Edge, name: &ModelName) {
    if let Some(mut calls) = edge.loading.get_mut(name) {
        *calls -= 1;
    }
    edge.loading.remove_if(name, |_, calls| *calls == 0);
}
