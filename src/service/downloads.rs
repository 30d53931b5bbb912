//! Downloads of models for calls: one for each repo, shared by those who wait for it. It stops when nobody
//! waits any more, and the next one goes on where it ended.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{Semaphore, watch};

use super::blocking;
use crate::error::Error;
use crate::hub::{HubSettings, Progress, RepoName, Stop, fetch};
use crate::ids::ModelName;

/// The downloads that run or wait for their turn.
pub(super) struct Downloads {
    running: Mutex<BTreeMap<RepoName, Weak<Running>>>,
    places: Arc<Semaphore>,
}

/// A share of a download.
pub(super) struct Download(Arc<Running>);

struct Running {
    progress: Arc<Progress>,
    stop: Stop,
    ended: watch::Receiver<Option<Result<(), Error>>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

impl Downloads {
    /// No downloads; `running_max` may run at one time.
    pub(super) fn new(running_max: usize) -> Self {
        Self { running: Mutex::default(), places: Arc::new(Semaphore::new(running_max)) }
    }

    /// Joins the download of a repo into a cache, or begins it.
    pub(super) fn join(&self, repo: RepoName, cache: PathBuf) -> Download {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|_, download| download.strong_count() > 0);
        let known = running.get(&repo).and_then(Weak::upgrade);
        if let Some(known) = known.filter(|known| known.ended.borrow().is_none()) {
            return Download(known);
        }
        let begun = Arc::new(self.begin(repo.clone(), cache));
        running.insert(repo, Arc::downgrade(&begun));
        Download(begun)
    }

    fn begin(&self, repo: RepoName, cache: PathBuf) -> Running {
        let (progress, stop) = (Arc::new(Progress::default()), Stop::new());
        let (end, ended) = watch::channel(None);
        let running = Running { progress: Arc::clone(&progress), stop: stop.clone(), ended };
        let places = Arc::clone(&self.places);
        tokio::spawn(async move {
            // Without this one who comes and goes again and again would make a long queue.
            let place = tokio::select! {
                biased;
                () = stop.wait() => return,
                place = places.acquire_owned() => place,
            };
            let work = move || {
                let _place = place;
                download(&repo, cache, &progress, &stop)
            };
            end.send_replace(Some(blocking(work).await));
        });
        running
    }
}

impl Download {
    /// Returns the bytes on disk, and those of all files as far as they are known.
    pub(super) fn bytes(&self) -> (u64, u64) {
        self.0.progress.bytes()
    }

    /// Returns when the model is in the cache.
    ///
    /// # Errors
    /// It cannot be downloaded.
    pub(super) async fn ended(&self) -> Result<(), Error> {
        let mut ended = self.0.ended.clone();
        let ended = ended.wait_for(Option::is_some).await.map(|ended| ended.clone());
        // Without an end the task was lost with the runtime.
        ended.ok().flatten().unwrap_or(Err(Error::Draining))
    }
}

fn download(repo: &RepoName, cache: PathBuf, progress: &Arc<Progress>, stop: &Stop) -> Result<(), Error> {
    tracing::info!(%repo, "a download begins");
    let settings = HubSettings::from_environment(cache);
    let fetched = settings.and_then(|settings| fetch(&settings, repo, progress, stop));
    let received_bytes = progress.received_bytes();
    match fetched {
        Ok(fetched) => {
            tracing::info!(%repo, commit = fetched.commit, received_bytes, "the download is complete");
            Ok(())
        }
        Err(error) => {
            tracing::warn!(%repo, received_bytes, %error, "the download ended");
            Err(error.into_error(&ModelName::from(repo.to_string().as_str())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(name: &str) -> RepoName {
        RepoName::parse(name).unwrap()
    }

    #[tokio::test]
    async fn callers_share_a_download_and_the_last_one_stops_it() {
        // Without a place none begins.
        let downloads = Downloads::new(0);
        let first = downloads.join(repo("a/b"), "/cache".into());
        let second = downloads.join(repo("a/b"), "/cache".into());
        let other = downloads.join(repo("a/c"), "/cache".into());
        assert!(Arc::ptr_eq(&first.0, &second.0) && !Arc::ptr_eq(&first.0, &other.0));
        let (stop, ended) = (first.0.stop.clone(), first.0.ended.clone());
        drop(first);
        assert!(ended.has_changed().is_ok());
        drop(second);
        stop.wait().await;
        // Its task has left the queue.
        let mut ended = ended;
        assert!(ended.changed().await.is_err());
        let again = downloads.join(repo("a/b"), "/cache".into());
        assert!(again.0.ended.borrow().is_none());
    }

    #[tokio::test]
    async fn who_comes_after_a_failure_begins_again() {
        let downloads = Downloads::new(1);
        // The cache's disk cannot be asked, or the hub does not answer: an error either way.
        let failed = downloads.join(repo("a/b"), "/nonexistent/cache".into());
        failed.ended().await.unwrap_err();
        let again = downloads.join(repo("a/b"), "/nonexistent/cache".into());
        assert!(!Arc::ptr_eq(&failed.0, &again.0));
    }
}
