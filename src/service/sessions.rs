//! Sessions: the caller's own, by name. Their rules are in `session`; here names, lifetimes and pages are
//! checked, and the engine is told to drop the KV caches of sessions that are gone.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use super::answer::shortened;
use super::cache::check_salt;
use super::caller::Caller;
use super::fields::{fresh_session_name, model_name, optional_model, page_size, page_token, session_name};
use super::terms::{Lifetime, label_keys, labels, name_prefix, wanted_labels};
use super::{Service, blocking};
use crate::engine::TurnTie;
use crate::error::Error;
use crate::ids::{SessionKey, TokenizerHash};
use crate::session::{
    AnswerCut, History, Labels, Lease, ListPage, Message, NewFork, NewSession, SessionBook, SessionFilter,
    SessionView, Terms, TermsChange, TurnContent, TurnGuard, TurnRequest, TurnStart,
};

/// The session book's hold on a running turn; told when the session is deleted.
pub(super) type TurnHold = watch::Sender<bool>;

/// A session's running turn. Dropping it rolls the turn back.
pub(super) struct Turn {
    key: SessionKey,
    /// None once the turn was rolled back because its stream was not read.
    guard: Arc<Mutex<Option<TurnGuard<TurnHold>>>>,
    deleted: watch::Receiver<bool>,
    /// Rolls the turn back when its work has ended and nobody reads the outcome.
    watchdog: Option<AbortHandle>,
}

impl Turn {
    /// Begins a turn, if it may; returns what it builds on.
    pub(super) fn begin(
        sessions: &Arc<SessionBook<TurnHold>>,
        key: &SessionKey,
        request: &TurnRequest,
    ) -> Result<(Self, TurnStart), Error> {
        let (hold, deleted) = watch::channel(false);
        let (guard, start) = sessions.begin(key, request, hold)?;
        let guard = Arc::new(Mutex::new(Some(guard)));
        Ok((Self { key: key.clone(), guard, deleted, watchdog: None }, start))
    }

    /// Returns the key of its session.
    pub(super) fn key(&self) -> &SessionKey {
        &self.key
    }

    /// Refuses bytes that are to be added beyond a limit.
    pub(super) fn reserve(&self, bytes: usize) -> Result<(), Error> {
        let mut guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
        guard.as_mut().map_or(Ok(()), |guard| guard.reserve(bytes))
    }

    /// Returns what ties the engine's work to it. The turn is rolled back if that work has ended for `limit`
    /// and it is not committed.
    pub(super) fn tie(&mut self, limit: Duration) -> TurnTie {
        let (working, mut ended) = mpsc::channel::<Infallible>(1);
        let guard = Arc::clone(&self.guard);
        let watchdog = tokio::spawn(async move {
            // Nothing is ever sent: this waits for the end of the work.
            let _ = ended.recv().await;
            tokio::time::sleep(limit).await;
            drop(take(&guard));
        });
        self.watchdog = Some(watchdog.abort_handle());
        TurnTie { deleted: self.deleted.clone(), working }
    }

    /// Commits the turn; returns the session's token count.
    pub(super) fn commit(
        self,
        limit: Duration,
        (tokens, tokenizer): (Arc<[u32]>, TokenizerHash),
        content: TurnContent,
    ) -> Result<(), Error> {
        let guard = take(&self.guard).ok_or(Error::SlowReader { limit })?;
        guard.of_tokenizer(tokenizer).commit(tokens, content).map(drop)
    }

    async fn deleted(&mut self) {
        if self.deleted.wait_for(|deleted| *deleted).await.is_err() {
            // The turn has ended otherwise.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(watchdog) = &self.watchdog {
            watchdog.abort();
        }
        drop(take(&self.guard));
    }
}

fn take(guard: &Mutex<Option<TurnGuard<TurnHold>>>) -> Option<TurnGuard<TurnHold>> {
    guard.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Runs `work` unless the session of `turn` is deleted first.
pub(super) async fn or_session_deleted<T>(
    turn: Option<&mut Turn>,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let Some(turn) = turn else { return work.await };
    tokio::select! {
        biased;
        outcome = work => outcome,
        () = turn.deleted() => Err(Error::Cancelled("the session was deleted".into())),
    }
}

/// A session to create.
#[derive(Clone, Debug)]
pub struct CreateSession {
    /// Name; empty for a random one.
    pub name: String,
    /// The model to bind it to.
    pub model: String,
    /// How long it stays.
    pub lifetime: Lifetime,
    /// Labels.
    pub labels: Labels,
    /// Whether it is pinned.
    pub pinned: bool,
    /// How its chat turns go on.
    pub history: History,
    /// Salt of its cached KV; empty for none.
    pub cache_salt: String,
}

/// A change of a session's terms; what is unset stays.
#[derive(Clone, Debug)]
pub struct UpdateSession {
    /// The session.
    pub name: String,
    /// How long it stays from now on.
    pub lifetime: Lifetime,
    /// Labels to add or replace.
    pub labels: Labels,
    /// Keys of labels to remove first.
    pub remove_labels: Vec<String>,
    /// Whether it is pinned.
    pub pinned: Option<bool>,
}

/// A session to copy.
#[derive(Clone, Debug)]
pub struct ForkSession {
    /// The session to copy.
    pub name: String,
    /// Name of the copy; empty for a random one.
    pub new_name: String,
    /// Lifetime after the last use; unset takes the original's.
    pub ttl: Option<Duration>,
    /// Whether it is pinned; unset takes over the original's pin.
    pub pinned: Option<bool>,
    /// Number of turns to copy; unset copies all.
    pub turn_count: Option<u32>,
    /// The session's token count as the caller last saw it.
    pub expected_token_count: Option<u32>,
}

/// A session to shorten.
#[derive(Clone, Debug)]
pub struct TruncateSession {
    /// The session.
    pub name: String,
    /// The part that remains.
    pub to: TruncateTo,
    /// The session's token count as the caller last saw it.
    pub expected_token_count: Option<u32>,
}

/// The part of a shortened session that remains.
#[derive(Clone, Copy, Debug)]
pub enum TruncateTo {
    /// The first turns.
    Turns(u32),
    /// The first tokens.
    Tokens(u32),
    /// The first messages.
    Messages(u32),
}

/// A page of a caller's sessions.
#[derive(Clone, Debug)]
pub struct SessionPage {
    /// Entries; 0 is the default.
    pub size: u32,
    /// The token that came with the page before; empty for the first page.
    pub token: String,
    /// Model name; empty for the sessions of every model.
    pub model: String,
    /// Labels that they have.
    pub labels: Labels,
    /// How their names begin; empty for all.
    pub name_prefix: String,
    /// Whether they are pinned; unset for both.
    pub pinned: Option<bool>,
}

/// All of a session.
#[derive(Clone, Debug)]
pub struct SessionContent {
    /// Its facts.
    pub view: SessionView,
    /// Its messages; none once a turn was raw.
    pub messages: Vec<Arc<Message>>,
}

impl Service {
    /// Creates an empty session.
    ///
    /// # Errors
    /// A field is refused, the name is taken, the caller has too many, or the model is unknown.
    pub async fn create_session(&self, caller: &Caller, create: CreateSession) -> Result<SessionView, Error> {
        let CreateSession { name, model, lifetime, labels: own, pinned, history, cache_salt } = create;
        let key = caller.session(fresh_session_name("name", &name)?);
        let model = model_name("model", &model)?;
        let lease = lifetime.lease(&self.limits, self.clock.wall())?;
        let lease = lease.unwrap_or(Lease::AfterUse(self.limits.session_ttl));
        let terms = Terms { lease, pinned, labels: Arc::new(labels(own)?) };
        check_salt("cache_salt", &cache_salt)?;
        self.models.check_exists(&model).await?;
        let cache_salt = cache_salt.into();
        let created = self.sessions.create(NewSession { key, model, terms, history, cache_salt })?;
        self.saves.saved(&created.key).await;
        Ok(created)
    }

    /// Changes how long a session stays, or its labels.
    ///
    /// # Errors
    /// A field is refused, the caller has no such session or too much of something, or the engine is dead.
    pub async fn update_session(&self, caller: &Caller, update: UpdateSession) -> Result<SessionView, Error> {
        let UpdateSession { name, lifetime, labels: set, remove_labels, pinned } = update;
        let key = caller.session(session_name("name", &name)?);
        let change = TermsChange {
            lease: lifetime.lease(&self.limits, self.clock.wall())?,
            pinned,
            set_labels: labels(set)?,
            remove_labels: label_keys(remove_labels, &self.limits)?,
        };
        let view = self.sessions.update(&key, change)?;
        if pinned.is_some() {
            self.engine.pin_session(key, view.terms.pinned).await?;
        }
        self.saves.saved(&view.key).await;
        Ok(view)
    }

    /// Returns all of a session.
    ///
    /// # Errors
    /// The caller has no such session, or what was stored of it is damaged.
    pub async fn get_session(&self, caller: &Caller, name: &str) -> Result<SessionContent, Error> {
        let key = caller.session(session_name("name", name)?);
        self.saves.warm(&self.sessions, &key).await?;
        self.sessions.read(&key, |session| {
            Ok(SessionContent { view: session.view(), messages: session.messages().to_vec() })
        })
    }

    /// Returns a page of the caller's sessions by name, and the token of the next page; none after the last.
    ///
    /// # Errors
    /// A field is refused.
    pub fn list_sessions(
        &self,
        caller: &Caller,
        page: SessionPage,
    ) -> Result<(Vec<SessionView>, Option<String>), Error> {
        let SessionPage { size, token, model, labels, name_prefix, pinned } = page;
        let filter = self.session_filter(&model, labels, name_prefix, pinned)?;
        let (size, after) = (page_size(size)?, page_token(&token, session_name)?);
        let page = ListPage { after, size, filter };
        let (views, more) = self.sessions.list(&caller.principal, &page);
        let last = views.last().filter(|_| more).map(|view| view.key.name.to_string());
        Ok((views, last))
    }

    /// Reads which sessions are to be listed, or watched.
    pub(super) fn session_filter(
        &self,
        model: &str,
        labels: Labels,
        prefix: String,
        pinned: Option<bool>,
    ) -> Result<SessionFilter, Error> {
        Ok(SessionFilter {
            model: optional_model("model", model)?,
            labels: wanted_labels(labels, &self.limits)?,
            name_prefix: name_prefix(prefix)?,
            pinned,
        })
    }

    /// Copies a session, or its first turns.
    ///
    /// # Errors
    /// A field is refused, the name is taken, the caller has too many, the session moved, or what was stored
    /// of it is damaged.
    pub async fn fork_session(&self, caller: &Caller, fork: &ForkSession) -> Result<SessionView, Error> {
        let ForkSession { name, new_name, ttl, pinned, turn_count, expected_token_count } = fork;
        let from = caller.session(session_name("name", name)?);
        let lifetime = Lifetime { ttl: *ttl, expire_time: None };
        let lease = lifetime.lease(&self.limits, self.clock.wall())?;
        let fork = NewFork {
            name: fresh_session_name("new_name", new_name)?,
            change: TermsChange { lease, pinned: *pinned, ..TermsChange::default() },
            turn_count: *turn_count,
            expected_token_count: *expected_token_count,
        };
        self.saves.warm(&self.sessions, &from).await?;
        let original = self.sessions.read(&from, |session| Ok(session.id()))?;
        let forked = self.sessions.fork(&from, fork)?;
        self.snapshots.fork(original, (forked.id, Arc::clone(&forked.tokens)));
        self.saves.saved(&forked.key).await;
        Ok(forked)
    }

    /// Shortens a session. Within an answer the model's tokenizer says what remains of its text.
    ///
    /// # Errors
    /// A turn runs in it, it moved, it cannot end there, the model's files cannot be used, or what was stored
    /// of it is damaged.
    pub async fn truncate_session(
        &self,
        caller: &Caller,
        truncate: &TruncateSession,
    ) -> Result<SessionView, Error> {
        let TruncateSession { name, to, expected_token_count } = truncate;
        let key = caller.session(session_name("name", name)?);
        self.saves.warm(&self.sessions, &key).await?;
        loop {
            let (view, cut) = self.sessions.with(&key, |session, now| {
                session.expect_tokens(*expected_token_count)?;
                let cut = match *to {
                    TruncateTo::Turns(turns) => session.truncate_turns(turns as usize, now).map(|()| None),
                    TruncateTo::Tokens(tokens) => session.truncate_tokens(tokens as usize, now),
                    TruncateTo::Messages(messages) => {
                        session.truncate_messages(messages as usize, now).map(|()| None)
                    }
                }?;
                Ok((session.view(), cut))
            })?;
            let view = match cut {
                None => Some(view),
                // Meanwhile the session may have moved: then it is asked again.
                Some(cut) => self.cut_answer(&key, cut).await?,
            };
            if let Some(view) = view {
                self.saves.saved(&key).await;
                return Ok(view);
            }
        }
    }

    /// Shortens an answer; returns None if the session moved.
    async fn cut_answer(&self, key: &SessionKey, cut: AnswerCut) -> Result<Option<SessionView>, Error> {
        let assets = self.models.assets(&cut.model).await?;
        if cut.tokenizer.is_some_and(|tokenizer| tokenizer != assets.tokenizer_hash) {
            return Err(Error::SessionTokenizerChanged(cut.model));
        }
        let (cut, text, answer) = blocking(move || {
            let mut detokenizer = assets.tokenizer.detokenizer();
            let mut text: String = cut.remaining().iter().map(|id| detokenizer.push(*id)).collect();
            text.push_str(&detokenizer.finish());
            let answer = shortened(&cut.answer, &cut.forms, &text);
            Ok((cut, text, answer))
        })
        .await?;
        self.sessions.with(key, |session, now| {
            let done = session.cut_answer(&cut, (&text, answer), now)?;
            Ok(done.then(|| session.view()))
        })
    }

    /// Deletes a session, stops its running turn and drops its KV caches.
    ///
    /// # Errors
    /// The caller has no such session, or the engine is dead.
    pub async fn delete_session(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        let key = caller.session(session_name("name", name)?);
        // First the turn, so that it leaves no cache behind after those that are dropped.
        if let Some(turn) = self.sessions.delete(&key)? {
            turn.send_replace(true);
        }
        self.forget_gone();
        self.engine.forget(key.clone()).await?;
        self.saves.saved(&key).await;
        Ok(())
    }

    /// Removes the snapshots of sessions that are gone.
    pub(super) fn forget_gone(&self) {
        self.sessions.take_gone().into_iter().for_each(|gone| self.snapshots.forget(gone));
    }

    /// Removes expired sessions and drops their KV caches.
    ///
    /// # Errors
    /// The engine is dead.
    pub async fn sweep_sessions(&self) -> Result<(), Error> {
        for session in self.sessions.sweep() {
            tracing::debug!(%session, "the session expired");
            self.engine.forget(session).await?;
        }
        self.forget_gone();
        Ok(())
    }
}
