//! A changed configuration, taken over while the daemon runs.

use std::convert::Infallible;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::catalog;
use crate::config::Config;
use crate::service::Service;

/// Keys that say where models are, and how they write.
const PLACES: [&str; 4] = ["model_roots", "model_links_anywhere", "hf_cache", "model"];

/// Takes over what can change of each configuration that comes.
pub(super) async fn take_over(
    service: &Arc<Service>,
    config: &Config,
    mut reloads: mpsc::Receiver<Config>,
) -> Infallible {
    let mut running = config.clone();
    while let Some(new) = reloads.recv().await {
        let (live, fixed) = running.renew(new);
        tracing::info!(changed = live.join(" "), "SIGHUP: the configuration was read again");
        if !fixed.is_empty() {
            tracing::warn!(keys = fixed.join(" "), "these keys have changed and take a restart");
        }
        warn_of_budget(service, &running);
        let catalog = live.iter().any(|key| PLACES.contains(key)).then(|| catalog(&running));
        let configured = service.configure(running.residency.clone(), catalog, running.access.clone()).await;
        if let Err(error) = configured {
            tracing::error!(%error, "the configuration could not be taken over");
        }
    }
    std::future::pending().await
}

/// Warns of a budget that the device cannot keep.
pub(super) fn warn_of_budget(service: &Service, config: &Config) {
    let (budget, memory) = (config.residency.memory_budget_bytes, service.device().memory_bytes);
    if let (Some(budget), Some(memory)) = (budget, memory)
        && budget > memory
    {
        tracing::warn!(budget, memory, "memory_budget_bytes is more than the memory that there is");
    }
}
