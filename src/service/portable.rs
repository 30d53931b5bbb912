//! Sessions as files: one goes out in pieces that a task makes as they are read, and comes in in pieces that
//! are checked one by one, counted for the owner, and become a session when all of it is there.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::cache::check_salt;
use super::caller::Caller;
use super::fields::{model_name, optional_model, session_name};
use super::terms::{Lifetime, labels};
use super::{Service, blocking};
use crate::error::Error;
use crate::ids::{ModelName, SessionName};
use crate::session::{Arrived, Incoming, Lease, Replace, SessionView, Snapshot, Terms};
use crate::store::{Export, Import, PortableError};

/// Bytes of one piece of a file.
const PIECE_BYTES: usize = 64 << 10;

/// Pieces that wait for the reader.
const PIECES_WAITING_MAX: usize = 1;

/// A session on its way out. Dropping it ends it.
#[derive(Debug)]
pub struct SessionExport {
    pieces: mpsc::Receiver<Result<Piece, Error>>,
    slow_reader: Duration,
    has_ended: bool,
}

/// A part of a session's file.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// The next bytes.
    Bytes(Vec<u8>),
    /// All are sent; their number.
    End(u64),
}

/// What to make of a session's file.
#[derive(Clone, Debug, Default)]
pub struct ImportSession {
    /// Name; empty for that of the file.
    pub name: String,
    /// The model to bind it to; empty for that of the file.
    pub model: String,
    /// Whether it is pinned; unset for as it was.
    pub pinned: Option<bool>,
    /// Lifetime after the last use; unset for what it was.
    pub ttl: Option<Duration>,
    /// Whether it takes the place of a session of its name.
    pub replace: bool,
    /// Number of tokens that that has to have.
    pub expected_token_count: Option<u32>,
}

/// A session on its way in. Dropping it leaves nothing behind.
pub struct SessionImport<'a> {
    service: &'a Service,
    caller: &'a Caller,
    name: Option<SessionName>,
    model: Option<ModelName>,
    pinned: Option<bool>,
    lease: Option<Lease>,
    replace: Option<Replace>,
    import: Import,
    incoming: Incoming,
}

impl Service {
    /// Sends a session, as it is now, as a file.
    ///
    /// # Errors
    /// The caller has no such session, it moved, or what was stored of it is damaged.
    pub async fn export_session(
        &self,
        caller: &Caller,
        name: &str,
        expected_token_count: Option<u32>,
    ) -> Result<SessionExport, Error> {
        let key = caller.session(session_name("name", name)?);
        self.saves.warm(&self.sessions, &key).await?;
        let snapshot = self.sessions.read(&key, |session| {
            session.expect_tokens(expected_token_count)?;
            Ok(session.snapshot())
        })?;
        let Snapshot { outline, contents } = snapshot;
        let contents = contents.ok_or_else(|| Error::Internal(format!("{key} was not read")))?;
        let slow_reader = self.engine.settings().slow_reader;
        let (sender, pieces) = mpsc::channel(PIECES_WAITING_MAX);
        tokio::spawn(send(Export::new(&outline, contents), sender, slow_reader));
        Ok(SessionExport { pieces, slow_reader, has_ended: false })
    }

    /// Begins to take in a session.
    ///
    /// # Errors
    /// A field is refused, the name is taken, what is to be replaced is not as expected, or the caller has
    /// too many sessions.
    pub fn import_session<'a>(
        &'a self,
        caller: &'a Caller,
        start: ImportSession,
    ) -> Result<SessionImport<'a>, Error> {
        let ImportSession { name, model, pinned, ttl, replace, expected_token_count } = start;
        if expected_token_count.is_some() && !replace {
            return Err(Error::field("start.expected_token_count", "must not be given without `replace`"));
        }
        let replace = replace.then_some(Replace { expected_token_count });
        let name = (!name.is_empty()).then(|| session_name("start.name", &name)).transpose()?;
        let model = optional_model("start.model", &model)?;
        let lease = Lifetime { ttl, expire_time: None }.lease(&self.limits, self.clock.wall())?;
        // Before anything is sent for nothing. Which one a file's own name replaces is known at its end.
        if name.is_some() || replace.is_none() {
            let probe = name.clone().unwrap_or_else(|| "".into());
            self.sessions.refuse_arrival(&caller.session(probe), replace)?;
        }
        let incoming = self.sessions.expect(&caller.principal);
        let limit = usize::try_from(self.limits.session_bytes_max).unwrap_or(usize::MAX);
        let import = Import::new(limit);
        Ok(SessionImport { service: self, caller, name, model, pinned, lease, replace, import, incoming })
    }
}

/// Sends a file until it ends or nobody reads it for `limit`.
async fn send(mut export: Export, to: mpsc::Sender<Result<Piece, Error>>, limit: Duration) {
    let mut file_bytes = 0;
    loop {
        let made = blocking(move || {
            let part = export.next();
            Ok((export, part))
        });
        let part = match made.await {
            Ok((rest, part)) => {
                export = rest;
                part
            }
            Err(error) => {
                drop(to.send_timeout(Err(error), limit).await);
                return;
            }
        };
        let Some(part) = part else { break };
        file_bytes += part.len() as u64;
        for bytes in part.chunks(PIECE_BYTES) {
            if to.send_timeout(Ok(Piece::Bytes(bytes.to_vec())), limit).await.is_err() {
                return;
            }
        }
    }
    drop(to.send_timeout(Ok(Piece::End(file_bytes)), limit).await);
}

impl SessionExport {
    /// Returns the next piece; none after the last.
    ///
    /// # Errors
    /// It was not read for too long.
    pub async fn next(&mut self) -> Result<Option<Piece>, Error> {
        if self.has_ended {
            return Ok(None);
        }
        match self.pieces.recv().await {
            Some(piece) => {
                self.has_ended = matches!(piece, Ok(Piece::End(_)));
                piece.map(Some)
            }
            None => Err(Error::SlowReader { limit: self.slow_reader }),
        }
    }
}

impl SessionImport<'_> {
    /// Takes the next bytes of the file.
    ///
    /// # Errors
    /// They are not those of a session, or it exceeds a limit.
    pub async fn add(&mut self, bytes: Vec<u8>) -> Result<(), Error> {
        if bytes.is_empty() {
            return Err(Error::field("chunk", "must not be empty"));
        }
        let held = self.import.bytes() + bytes.len();
        self.service.sessions.grow(&mut self.incoming, held)?;
        let mut import = std::mem::replace(&mut self.import, Import::new(0));
        let limit = self.service.limits.session_bytes_max;
        let added = blocking(move || {
            import.add(&bytes).map_err(|error| refused(&error, limit))?;
            Ok(import)
        });
        self.import = added.await?;
        self.service.sessions.grow(&mut self.incoming, self.import.bytes())
    }

    /// Makes the session, once all of the file is there; returns when it is saved.
    ///
    /// # Errors
    /// The file is damaged, a limit is exceeded, the name is taken, the model is unknown, what is to be
    /// replaced is not as expected, or the engine is dead.
    pub async fn finish(self) -> Result<SessionView, Error> {
        let Self { service, caller, name, model, pinned, lease, replace, import, incoming } = self;
        let limit = service.limits.session_bytes_max;
        let finished = blocking(move || import.finish().map_err(|error| refused(&error, limit)));
        let (outline, contents) = finished.await?;
        let of_file = |_| Error::SessionFileInvalid("a name or label in it is not one".into());
        let name = match name {
            Some(name) => name,
            None => session_name("name", outline.key.name.as_str()).map_err(of_file)?,
        };
        let model = match model {
            Some(model) => model,
            None => model_name("model", outline.model.as_str()).map_err(of_file)?,
        };
        labels((*outline.terms.labels).clone()).map_err(of_file)?;
        let terms = Terms {
            lease: lease.unwrap_or_else(|| service.lease_here(outline.terms.lease)),
            pinned: pinned.unwrap_or(outline.terms.pinned),
            labels: Arc::clone(&outline.terms.labels),
        };
        check_salt("cache_salt", &outline.cache_salt).map_err(of_file)?;
        service.models.check_exists(&model).await?;
        let key = caller.session(name);
        let arrived = Arrived { key: key.clone(), model, terms, outline, contents, replace };
        let view = service.sessions.take_in(incoming, arrived)?;
        if replace.is_some() {
            service.forget_gone();
            service.engine.forget(key.clone()).await?;
        }
        service.saves.saved(&key).await;
        Ok(view)
    }
}

impl Service {
    /// Returns the lease of a session from elsewhere, as this daemon's limits allow.
    fn lease_here(&self, lease: Lease) -> Lease {
        let (now, ttl_max) = (self.clock.wall(), self.limits.session_ttl_max);
        match lease {
            Lease::AfterUse(ttl) if ttl.is_zero() => Lease::AfterUse(self.limits.session_ttl),
            Lease::AfterUse(ttl) => Lease::AfterUse(ttl.min(ttl_max)),
            Lease::Until(end) if end <= now => Lease::AfterUse(self.limits.session_ttl),
            Lease::Until(end) => Lease::Until(now.checked_add(ttl_max).map_or(end, |last| end.min(last))),
        }
    }
}

fn refused(error: &PortableError, session_bytes_max: u64) -> Error {
    match *error {
        PortableError::TooLarge { .. } => {
            Error::SessionLimit { limit: "session_bytes_max", value: session_bytes_max }
        }
        PortableError::Format { found, known } => Error::SessionFileUnsupported { found, known },
        PortableError::Foreign
        | PortableError::Damaged { .. }
        | PortableError::Incomplete
        | PortableError::Overlong
        | PortableError::Record(_) => Error::SessionFileInvalid(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::ids::SessionKey;
    use crate::session::{InputKind, Session, TurnContent, TurnId, TurnRequest};

    /// A session whose file has many pieces.
    fn session() -> Snapshot {
        let (now, key) = (SystemTime::UNIX_EPOCH, SessionKey { owner: "uid:1".into(), name: "s".into() });
        let mut session = Session::new(key, "m".into(), Terms::after_use(Duration::from_secs(9)), now);
        let (model, input, history) = (None, InputKind::Raw, None);
        let request = TurnRequest { model, input, expected_token_count: None, input_bytes: 0, history };
        session.begin(TurnId(1), &request, now).unwrap();
        session.commit(TurnId(1), vec![1_000_000; 200_000].into(), TurnContent::Raw, now);
        session.snapshot()
    }

    fn export() -> Export {
        let Snapshot { outline, contents } = session();
        Export::new(&outline, contents.unwrap())
    }

    #[tokio::test]
    async fn an_export_comes_in_small_pieces_and_says_its_size() {
        let limit = Duration::from_secs(60);
        let (sender, pieces) = mpsc::channel(PIECES_WAITING_MAX);
        let mut sent = SessionExport { pieces, slow_reader: limit, has_ended: false };
        let sending = tokio::spawn(send(export(), sender, limit));
        let (mut file, mut end) = (Vec::new(), None);
        while let Some(piece) = sent.next().await.unwrap() {
            match piece {
                Piece::Bytes(bytes) => {
                    assert!(bytes.len() <= PIECE_BYTES);
                    file.extend(bytes);
                }
                Piece::End(bytes) => end = Some(bytes),
            }
        }
        sending.await.unwrap();
        assert_eq!(end, Some(file.len() as u64));
        assert_eq!(file, export().flatten().collect::<Vec<u8>>());
    }

    #[tokio::test]
    async fn an_export_that_nobody_reads_is_given_up() {
        let limit = Duration::from_millis(1);
        let (sender, pieces) = mpsc::channel(PIECES_WAITING_MAX);
        let mut sent = SessionExport { pieces, slow_reader: limit, has_ended: false };
        // It returns though nobody reads.
        send(export(), sender, limit).await;
        assert!(matches!(sent.next().await, Ok(Some(Piece::Bytes(_)))), "what was waiting");
        assert_eq!(sent.next().await, Err(Error::SlowReader { limit }));
    }
}
