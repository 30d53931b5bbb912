//! Downloads of models from a Hugging Face hub into the standard cache, which Python's tools share.
//!
//! [`fetch`] asks the hub for the commit and its files (`api`, `client`), chooses what a loader reads
//! (`select`), checks the disk, downloads blobs in parts that a later call continues (`transfer`, `partial`),
//! verifies their hashes, and only then shows a snapshot (`store`). It blocks; the connections run on a small
//! runtime of its own, so that they share no thread with anyone's calls.

mod api;
mod client;
mod error;
mod partial;
mod progress;
mod remove;
mod repo;
mod select;
mod settings;
mod stop;
mod store;
mod transfer;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

pub use error::FetchError;
pub use progress::{FileProgress, FileState, Progress};
pub use remove::remove;
pub use repo::RepoName;
pub use settings::HubSettings;
pub use stop::Stop;

use self::api::Listed;
use self::client::Client;
use self::store::RepoFolder;
use self::transfer::Transfer;
use super::inspect::{INDEX_BYTES_MAX, check_present};
use super::read::read_object;
use super::resolve::incomplete;

/// Files that are downloaded at one time.
const FILES: usize = 4;

/// Bytes that a download leaves free: a full disk stops more than this download.
const SPARE_BYTES: u64 = 64 << 20;

/// A download that is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// The commit.
    pub commit: String,
    /// The folder of its files.
    pub snapshot: PathBuf,
    /// Number of files that were looked for at the hub; 0 offline.
    pub files_count: usize,
    /// Their size in bytes.
    pub bytes: u64,
}

/// Downloads what the cache lacks of a repo, and returns its folder. Blocks until then, or until `stop`.
///
/// # Errors
/// The hub does not answer, refuses or lies, the repo has nothing to load, or the disk has no room. What was
/// downloaded stays, and the next call continues it.
pub fn fetch(
    settings: &HubSettings,
    repo: &RepoName,
    progress: &Arc<Progress>,
    stop: &Stop,
) -> Result<Fetched, FetchError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(FetchError::io(&settings.cache))?;
    let fetched = runtime.block_on(async {
        tokio::select! {
            biased;
            () = stop.wait() => Err(FetchError::Stopped),
            fetched = run(settings, repo, progress) => fetched,
        }
    });
    // A hash that is being computed is not waited for.
    runtime.shutdown_background();
    fetched
}

async fn run(
    settings: &HubSettings,
    repo: &RepoName,
    progress: &Arc<Progress>,
) -> Result<Fetched, FetchError> {
    if settings.offline {
        return offline(settings, repo);
    }
    let client = Client::new(settings)?;
    let commit = api::commit(&client, repo).await?;
    let listed = api::files(&client, repo, &commit).await?;
    select::check(repo.id(), &listed)?;
    let index = select::index(&listed);
    let store = RepoFolder::new(&settings.cache, repo);
    store.create()?;
    let transfer = Arc::new(Transfer {
        client,
        repo: repo.clone(),
        commit: commit.clone(),
        store,
        progress: Arc::clone(progress),
        connections: settings.connections,
        permits: Semaphore::new(settings.connections),
        places: Mutex::new(HashMap::new()),
    });
    let named = match index {
        Some(index) => Some(read_index(settings, &transfer, index).await?),
        None => None,
    };
    let wanted = select::wanted(repo.id(), &listed, named.as_ref())?;
    download(settings, &transfer, &wanted).await?;
    let snapshot = transfer.store.publish(&commit, &wanted)?;
    transfer.store.write_ref(repo, &commit)?;
    let bytes = wanted.iter().map(|file| file.size).sum();
    Ok(Fetched { commit, snapshot, files_count: wanted.len(), bytes })
}

/// Returns what the cache has of a repo, without asking anyone.
fn offline(settings: &HubSettings, repo: &RepoName) -> Result<Fetched, FetchError> {
    let missing = || FetchError::Offline { repo: repo.to_string() };
    let store = RepoFolder::new(&settings.cache, repo);
    let commit = store.known_commit(repo).filter(|commit| repo::is_hex(commit, 40)).ok_or_else(missing)?;
    let snapshot = store.snapshot(&commit);
    if !snapshot.is_dir() || incomplete(&snapshot).is_some() || check_present(&snapshot).is_err() {
        return Err(missing());
    }
    Ok(Fetched { commit, snapshot, files_count: 0, bytes: 0 })
}

/// Downloads the index of the weights and returns the files that it names.
async fn read_index(
    settings: &HubSettings,
    transfer: &Arc<Transfer>,
    index: &Listed,
) -> Result<BTreeSet<String>, FetchError> {
    let bad = |why: String| FetchError::bad(&index.path, why);
    if index.size > INDEX_BYTES_MAX {
        return Err(bad(format!("lists an index of {} bytes; at most {INDEX_BYTES_MAX}", index.size)));
    }
    download(settings, transfer, std::slice::from_ref(index)).await?;
    let blob = transfer.store.blob(&index.digest);
    let value =
        read_object(&blob, INDEX_BYTES_MAX).map_err(|_| bad("sends an index that is not JSON".into()))?;
    let map = value.get("weight_map").and_then(Value::as_object);
    Ok(map.into_iter().flat_map(|map| map.values()).filter_map(Value::as_str).map(str::to_owned).collect())
}

/// Downloads files, if the disk has room for what is missing of all of them.
async fn download(
    settings: &HubSettings,
    transfer: &Arc<Transfer>,
    files: &[Listed],
) -> Result<(), FetchError> {
    check_disk(settings, transfer, files)?;
    for file in files {
        transfer.progress.file(&file.path, file.size);
    }
    let mut rest = files.iter().cloned();
    let mut tasks = JoinSet::new();
    for file in rest.by_ref().take(FILES) {
        tasks.spawn(Arc::clone(transfer).file(file));
    }
    while let Some(ended) = tasks.join_next().await {
        let ended = ended.unwrap_or(Err(FetchError::Stopped));
        if let Err(error) = ended {
            tasks.shutdown().await;
            if error.is_out_of_space() {
                // Says how much is missing now; somebody else may have written.
                check_disk(settings, transfer, files)?;
            }
            return Err(error);
        }
        if let Some(file) = rest.next() {
            tasks.spawn(Arc::clone(transfer).file(file));
        }
    }
    Ok(())
}

fn check_disk(settings: &HubSettings, transfer: &Transfer, files: &[Listed]) -> Result<(), FetchError> {
    let store = &transfer.store;
    let missing = |file: &&Listed| !store.has(file);
    let left = |file: &Listed| file.size - partial::bytes_left(&store.blob(&file.digest), file.size);
    let missing_bytes: u64 = files.iter().filter(missing).map(left).sum();
    let needed_bytes = missing_bytes.saturating_add(SPARE_BYTES);
    let available_bytes = (settings.free_bytes)(&store.path).map_err(FetchError::io(&store.path))?;
    if missing_bytes > 0 && needed_bytes > available_bytes {
        return Err(FetchError::DiskFull { needed_bytes, available_bytes });
    }
    Ok(())
}
