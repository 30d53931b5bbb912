//! The download of one file: its lock, its parts over several connections, its hash, and its place among the
//! blobs. A connection that breaks costs what was not yet received; a part goes on where it ended.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::{CONTENT_RANGE, HeaderMap};
use reqwest::{StatusCode, Url};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::FetchError;
use super::api::Listed;
use super::client::{Answer, Ask, Client, broken, wait_after};
use super::partial::{Partial, part_bytes};
use super::progress::{FileProgress, FileState, Progress};
use super::repo::RepoName;
use super::store::{BlobLock, RepoFolder};

/// Time between looks at a lock that another process holds.
const LOCK_POLL: Duration = Duration::from_millis(50);

/// Tries of a part in a row that bring nothing.
const TRIES: u32 = 6;

/// Progress after which a try counts as the first again. A hub that closes each connection after a few bytes
/// would be asked without end otherwise.
const TRY_BYTES: u64 = 64 << 10;

/// Bytes of a part after which its count is recorded.
const RECORD_BYTES: u64 = 1 << 20;

/// Times that a file is begun anew: after a hash that does not fit, or where a hub cannot continue.
const RESTARTS_MAX: u32 = 3;

/// What all files of a download share.
pub(super) struct Transfer {
    pub(super) client: Client,
    pub(super) repo: RepoName,
    pub(super) commit: String,
    pub(super) store: RepoFolder,
    pub(super) progress: Arc<Progress>,
    pub(super) connections: usize,
    /// One permit by connection.
    pub(super) permits: Semaphore,
    /// Where the hub's storage has each file, from its redirects.
    pub(super) places: Mutex<HashMap<String, Url>>,
}

/// A part of a file that is downloaded.
struct Part<'a> {
    partial: &'a Partial,
    index: usize,
    file: &'a Listed,
    shown: &'a FileProgress,
}

impl Part<'_> {
    /// Returns the range of its bytes that are not there yet.
    fn missing(&self) -> Option<Range<u64>> {
        self.partial.missing(self.index)
    }
}

/// How a request for a part ended.
enum End {
    Complete,
    /// The hub sends the whole file, whatever range is asked for.
    NoRanges,
}

impl Transfer {
    /// Downloads a file unless it is in the cache.
    pub(super) async fn file(self: Arc<Self>, file: Listed) -> Result<(), FetchError> {
        let shown = self.progress.file(&file.path, file.size);
        if let Some(_lock) = self.lock(&file).await? {
            self.content(&file, &shown).await?;
        }
        shown.set_done(file.size);
        shown.set(FileState::Done);
        Ok(())
    }

    /// Takes the lock of a file's blob; `None` once the blob is there.
    async fn lock(&self, file: &Listed) -> Result<Option<BlobLock>, FetchError> {
        while !self.store.has(file) {
            if let Some(lock) = self.store.try_lock(&file.digest)? {
                // Its last owner may have made the blob just before.
                return Ok(Some(lock).filter(|_| !self.store.has(file)));
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
        Ok(None)
    }

    async fn content(self: &Arc<Self>, file: &Listed, shown: &Arc<FileProgress>) -> Result<(), FetchError> {
        let blob = self.store.blob(&file.digest);
        let mut partial = Partial::open(&blob, file.size, part_bytes(file.size, self.connections))?;
        for _ in 0..RESTARTS_MAX {
            let was_resumed = partial.is_resumed;
            shown.set_done(partial.done_bytes());
            shown.set(FileState::Downloading);
            let (back, end) = self.parts(partial, file, shown).await?;
            partial = back;
            if matches!(end, End::NoRanges) {
                partial.restart(file.size)?;
                continue;
            }
            shown.set(FileState::Verifying);
            let digest = file.digest.clone();
            let hashed = tokio::task::spawn_blocking(move || (partial.is_content_of(&digest), partial)).await;
            let (is_right, back) = hashed.map_err(|_| FetchError::Stopped)?;
            partial = back;
            if is_right? {
                return partial.finish(&blob);
            }
            if !was_resumed {
                partial.discard()?;
                return Err(FetchError::bad(
                    &file.path,
                    "sends a file whose hash is not the one that it lists",
                ));
            }
            // What an earlier download left may have lost bytes with the power.
            partial.restart(part_bytes(file.size, self.connections))?;
        }
        Err(FetchError::unreachable(format!("{} ends early, and cannot be continued", file.path)))
    }

    /// Downloads the missing parts; gives the blob back.
    async fn parts(
        self: &Arc<Self>,
        partial: Partial,
        file: &Listed,
        shown: &Arc<FileProgress>,
    ) -> Result<(Partial, End), FetchError> {
        let partial = Arc::new(partial);
        let mut tasks = JoinSet::new();
        for index in (0..partial.parts_count()).filter(|index| partial.missing(*index).is_some()) {
            let (transfer, partial) = (Arc::clone(self), Arc::clone(&partial));
            let (file, shown) = (file.clone(), Arc::clone(shown));
            tasks.spawn(async move {
                let part = Part { partial: &partial, index, file: &file, shown: &shown };
                transfer.part(&part).await
            });
        }
        let mut end = Ok(End::Complete);
        while let Some(ended) = tasks.join_next().await {
            match ended.unwrap_or(Err(FetchError::Stopped)) {
                Ok(End::Complete) => {}
                other => {
                    end = other;
                    break;
                }
            }
        }
        tasks.shutdown().await;
        let partial = Arc::into_inner(partial).ok_or(FetchError::Stopped)?;
        Ok((partial, end?))
    }

    async fn part(&self, part: &Part<'_>) -> Result<End, FetchError> {
        let mut failed = 0;
        while let Some(range) = part.missing() {
            let permit = self.permits.acquire().await.map_err(|_| FetchError::Stopped)?;
            let ended = self.request(part).await;
            drop(permit);
            part.partial.record(part.index)?;
            let error = match ended {
                Ok(End::Complete) => continue,
                Ok(End::NoRanges) => return Ok(End::NoRanges),
                Err(error) => error,
            };
            let came = part.missing().map_or(u64::MAX, |left| left.start - range.start);
            failed = if came >= TRY_BYTES { 0 } else { failed + 1 };
            match wait_after(&error, failed.max(1)).filter(|_| failed < TRIES) {
                Some(wait) if failed > 0 => tokio::time::sleep(wait).await,
                Some(_) => {}
                None => return Err(error),
            }
        }
        Ok(End::Complete)
    }

    /// Asks for the missing bytes of a part and writes what comes.
    async fn request(&self, part: &Part<'_>) -> Result<End, FetchError> {
        let Some(range) = part.missing() else { return Ok(End::Complete) };
        let Part { partial, index, file, shown } = *part;
        let is_whole = range == (0..file.size);
        let answer = self.open(file, Some(&range).filter(|_| !is_whole)).await;
        let mut response = answer.inspect_err(|_| self.forget(file))?.response;
        if !is_whole && response.status() != StatusCode::PARTIAL_CONTENT {
            return Ok(End::NoRanges);
        }
        let promised = response.content_length();
        let length = range.end - range.start;
        if let Some(why) = size_fault(response.headers(), promised, &range, file.size) {
            return Err(FetchError::bad(&file.path, why));
        }
        let (mut came, mut recorded) = (0, 0);
        while let Some(chunk) = response.chunk().await.map_err(broken).inspect_err(|_| self.forget(file))? {
            came += chunk.len() as u64;
            if came > length {
                return Err(FetchError::bad(&file.path, "sends more bytes than it lists"));
            }
            partial.write(index, &chunk)?;
            shown.add(chunk.len() as u64);
            self.progress.receive(chunk.len() as u64);
            if came - recorded >= RECORD_BYTES {
                partial.record(index)?;
                recorded = came;
            }
        }
        if came < length {
            return Err(FetchError::unreachable(format!("{} ends early", file.path)));
        }
        Ok(End::Complete)
    }

    async fn open(&self, file: &Listed, range: Option<&Range<u64>>) -> Result<Answer, FetchError> {
        let place = self.places().get(&file.path).cloned();
        let mut parts = vec!["resolve", self.commit.as_str()];
        parts.extend(file.path.split('/'));
        let url = place.unwrap_or_else(|| self.client.url(&[], self.repo.id(), &parts));
        let what = format!("file {} in repo {}", file.path, self.repo);
        let answer = self.client.get(&url, &Ask { what, repo: &self.repo }, range).await?;
        if !self.client.is_hub(&answer.from) {
            self.places().insert(file.path.clone(), answer.from.clone());
        }
        Ok(answer)
    }

    /// Asks the hub again where a file is: addresses of its storage expire.
    fn forget(&self, file: &Listed) {
        self.places().remove(&file.path);
    }

    fn places(&self) -> std::sync::MutexGuard<'_, HashMap<String, Url>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says how an answer contradicts the list of files; nothing if it does not.
fn size_fault(headers: &HeaderMap, promised: Option<u64>, range: &Range<u64>, size: u64) -> Option<String> {
    let length = range.end - range.start;
    if let Some(given) = headers.get(CONTENT_RANGE).map(|given| given.to_str().unwrap_or_default()) {
        let right = format!("bytes {}-{}/{size}", range.start, range.end - 1);
        if given != right {
            return Some(format!("sends {given:?} where {right:?} was asked for"));
        }
    }
    let wrong = promised.filter(|promised| *promised != length)?;
    Some(format!("sends {wrong} bytes where it lists {length}"))
}
