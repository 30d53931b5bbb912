//! Sessions: names and counts, and as content two messages, each a page of its own. The file of one is
//! `file of ` and its name, in two chunks; a watch tells what there is and ends with the daemon.

use std::pin::Pin;

use mlxd_client::v1::{
    CreateSessionRequest, CreateSessionResponse, DeleteSessionRequest, DeleteSessionResponse, ExportFinished,
    ExportSessionRequest, ExportSessionResponse, ExtendSessionRequest, ExtendSessionResponse,
    ForkSessionRequest, ForkSessionResponse, GetSessionRequest, GetSessionResponse, ImportSessionRequest,
    ImportSessionResponse, ListSessionsRequest, ListSessionsResponse, Message, SaveSessionRequest,
    SaveSessionResponse, Session, SessionChange, SessionChangeKind, TruncateSessionRequest,
    TruncateSessionResponse, Turn, UpdateSessionRequest, UpdateSessionResponse, Usage, WatchReady,
    WatchSessionsRequest, WatchSessionsResponse, export_session_response, import_session_request::Part,
    truncate_session_request, watch_sessions_response,
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request, Response, Status, Streaming};

use super::services::session_service_server::SessionService;
use super::{Fake, refusal};

impl Fake {
    fn session(&self, name: &str) -> Result<Session, Status> {
        self.state().sessions.get(name).cloned().ok_or_else(|| {
            let message = format!("no session named {name:?}");
            refusal(Code::NotFound, "SESSION_NOT_FOUND", &message, &[])
        })
    }

    fn add(&self, session: &Session) -> Result<(), Status> {
        let mut state = self.state();
        if state.sessions.contains_key(&session.name) {
            let message = format!("a session named {:?} exists", session.name);
            return Err(refusal(Code::AlreadyExists, "SESSION_EXISTS", &message, &[]));
        }
        state.sessions.insert(session.name.clone(), session.clone());
        Ok(())
    }
}

/// The events of a call.
type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the file of every session begins with.
const FILE: &[u8] = b"file of ";

#[tonic::async_trait]
impl SessionService for Fake {
    async fn create_session(
        &self,
        request: Request<CreateSessionRequest>,
    ) -> Result<Response<CreateSessionResponse>, Status> {
        let CreateSessionRequest { name, model, ttl, labels, pinned, expire_time, history, cache_salt: _ } =
            self.note("CreateSession", request);
        self.model(&model)?;
        let name = if name.is_empty() { "chosen".to_owned() } else { name };
        let owner = "uid:0".into();
        let session =
            Session { name, model, ttl, owner, labels, pinned, expire_time, history, ..Session::default() };
        self.add(&session)?;
        Ok(Response::new(CreateSessionResponse { session: Some(session) }))
    }

    async fn get_session(
        &self,
        request: Request<GetSessionRequest>,
    ) -> Result<Response<GetSessionResponse>, Status> {
        let request = self.note_page("GetSession", request).await;
        let session = Some(self.session(&request.name)?);
        if !request.include_messages {
            return Ok(Response::new(GetSessionResponse { session, ..GetSessionResponse::default() }));
        }
        let (said, next) = if request.message_page_token.is_empty() { ("one", "1") } else { ("two", "") };
        let messages = vec![Message::user(said)];
        let next_message_page_token = next.to_owned();
        Ok(Response::new(GetSessionResponse {
            session,
            messages,
            next_message_page_token,
            ..GetSessionResponse::default()
        }))
    }

    async fn list_sessions(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        let request = self.note_page("ListSessions", request).await;
        let state = self.state();
        // One session a page.
        let mut rest = state.sessions.values().filter(|session| session.name > request.page_token).cloned();
        let sessions: Vec<_> = rest.by_ref().take(1).collect();
        let more = rest.next().is_some();
        let last = sessions.last().filter(|_| more).map(|session| session.name.clone());
        Ok(Response::new(ListSessionsResponse { sessions, next_page_token: last.unwrap_or_default() }))
    }

    async fn update_session(
        &self,
        request: Request<UpdateSessionRequest>,
    ) -> Result<Response<UpdateSessionResponse>, Status> {
        let request = self.note("UpdateSession", request);
        let mut session = self.session(&request.name)?;
        request.remove_labels.iter().for_each(|key| drop(session.labels.remove(key)));
        session.labels.extend(request.labels);
        session.pinned = request.pinned.unwrap_or(session.pinned);
        self.state().sessions.insert(session.name.clone(), session.clone());
        Ok(Response::new(UpdateSessionResponse { session: Some(session) }))
    }

    async fn extend_session(
        &self,
        request: Request<ExtendSessionRequest>,
    ) -> Result<Response<ExtendSessionResponse>, Status> {
        let request = self.note("ExtendSession", request);
        let mut session = self.session(&request.name)?;
        let cached_tokens = session.token_count;
        session.token_count += 3;
        session.turns.push(Turn { message_count: 1, token_count: session.token_count });
        self.state().sessions.insert(session.name.clone(), session.clone());
        let usage = Usage { prompt_tokens: session.token_count, cached_tokens, ..Usage::default() };
        Ok(Response::new(ExtendSessionResponse { session: Some(session), usage: Some(usage) }))
    }

    async fn save_session(
        &self,
        request: Request<SaveSessionRequest>,
    ) -> Result<Response<SaveSessionResponse>, Status> {
        let request = self.note("SaveSession", request);
        let session = self.session(&request.name)?;
        let token_count = session.token_count;
        Ok(Response::new(SaveSessionResponse { session: Some(session), token_count, bytes: 9 }))
    }

    async fn fork_session(
        &self,
        request: Request<ForkSessionRequest>,
    ) -> Result<Response<ForkSessionResponse>, Status> {
        let request = self.note("ForkSession", request);
        let session = Session { name: request.new_name, ..self.session(&request.name)? };
        self.add(&session)?;
        Ok(Response::new(ForkSessionResponse { session: Some(session) }))
    }

    async fn truncate_session(
        &self,
        request: Request<TruncateSessionRequest>,
    ) -> Result<Response<TruncateSessionResponse>, Status> {
        let request = self.note("TruncateSession", request);
        let mut session = self.session(&request.name)?;
        if let Some(truncate_session_request::To::TurnCount(turns)) = request.to {
            session.turns.truncate(turns as usize);
            session.token_count = session.turns.last().map_or(0, |turn| turn.token_count);
        }
        self.state().sessions.insert(session.name.clone(), session.clone());
        Ok(Response::new(TruncateSessionResponse { session: Some(session) }))
    }

    async fn delete_session(
        &self,
        request: Request<DeleteSessionRequest>,
    ) -> Result<Response<DeleteSessionResponse>, Status> {
        let name = self.note("DeleteSession", request).name;
        self.session(&name)?;
        self.state().sessions.remove(&name);
        Ok(Response::new(DeleteSessionResponse {}))
    }

    type ExportSessionStream = Events<ExportSessionResponse>;

    async fn export_session(
        &self,
        request: Request<ExportSessionRequest>,
    ) -> Result<Response<Self::ExportSessionStream>, Status> {
        use export_session_response::Event;
        let name = self.session(&self.note("ExportSession", request).name)?.name;
        let file_bytes = (FILE.len() + name.len()) as u64;
        let mut events = vec![Event::Chunk(FILE.into()), Event::Chunk(name.clone().into())];
        // A session of this name is one that the daemon does not send whole.
        if name != "cut" {
            events.push(Event::Finished(ExportFinished { file_bytes }));
        }
        let events = events.into_iter().map(|event| Ok(ExportSessionResponse { event: Some(event) }));
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }

    async fn import_session(
        &self,
        request: Request<Streaming<ImportSessionRequest>>,
    ) -> Result<Response<ImportSessionResponse>, Status> {
        let mut parts = self.note("ImportSession", request);
        let Some(Part::Start(start)) = parts.next().await.transpose()?.and_then(|first| first.part) else {
            return Err(refusal(Code::InvalidArgument, "INVALID_FIELD", "start", &[]));
        };
        let mut file = Vec::new();
        while let Some(next) = parts.next().await.transpose()? {
            let Some(Part::Chunk(bytes)) = next.part else { panic!("the start twice") };
            assert!(!bytes.is_empty());
            file.extend(bytes);
        }
        let Some(name) = file.strip_prefix(FILE) else {
            let message = "the file is not a session as it was exported: it ends too early";
            return Err(refusal(Code::InvalidArgument, "SESSION_FILE_INVALID", message, &[]));
        };
        let name = if start.name.is_empty() { String::from_utf8_lossy(name).into() } else { start.name };
        let (model, pinned) = (start.model, start.pinned.unwrap_or(false));
        let session = Session { name, model, pinned, token_count: 3, ..Session::default() };
        if start.replace {
            self.state().sessions.remove(&session.name);
        }
        self.add(&session)?;
        Ok(Response::new(ImportSessionResponse { session: Some(session) }))
    }

    type WatchSessionsStream = Events<WatchSessionsResponse>;

    async fn watch_sessions(
        &self,
        request: Request<WatchSessionsRequest>,
    ) -> Result<Response<Self::WatchSessionsStream>, Status> {
        use watch_sessions_response::Event;
        let request = self.note("WatchSessions", request);
        let change = |kind: SessionChangeKind, session: &Session| {
            Event::Change(SessionChange {
                kind: kind.into(),
                name: session.name.clone(),
                session: Some(session.clone()),
                ..SessionChange::default()
            })
        };
        let mut events = Vec::new();
        for session in self.state().sessions.values() {
            if !request.changes_only {
                events.push(change(SessionChangeKind::Listed, session));
            }
        }
        events.push(Event::Ready(WatchReady {}));
        for session in self.state().sessions.values() {
            let Event::Change(changed) = change(SessionChangeKind::Changed, session) else { continue };
            let changed_fields = vec!["token_count".to_owned(), "turns".to_owned()];
            events.push(Event::Change(SessionChange { changed_fields, merged_changes: 2, ..changed }));
        }
        let events = events.into_iter().map(|event| Ok(WatchSessionsResponse { event: Some(event) }));
        let end = Err(refusal(Code::Unavailable, "DRAINING", "the daemon is shutting down", &[]));
        Ok(Response::new(Box::pin(tokio_stream::iter(events.chain([end])))))
    }
}
