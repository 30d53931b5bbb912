//! `SessionService`.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::caller::{Caller, open};
use super::convert;
use super::edge::{Edge, blocking};
use super::pb::{self, session_service_server::SessionService, truncate_session_request::To};
use super::status::status;
use crate::error::Error;
use crate::session::NewSession;

pub(super) struct Sessions(pub(super) Arc<Edge>);

fn answer<T>(answer: Result<T, Error>) -> Result<Response<T>, Status> {
    answer.map(Response::new).map_err(|error| status(&error))
}

#[tonic::async_trait]
impl SessionService for Sessions {
    async fn create_session(
        &self,
        request: Request<pb::CreateSessionRequest>,
    ) -> Result<Response<pb::CreateSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        answer(create(&self.0, &caller, request).await)
    }

    async fn get_session(
        &self,
        request: Request<pb::GetSessionRequest>,
    ) -> Result<Response<pb::GetSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        answer(get(&self.0, &caller, &request))
    }

    async fn list_sessions(
        &self,
        request: Request<pb::ListSessionsRequest>,
    ) -> Result<Response<pb::ListSessionsResponse>, Status> {
        let (caller, request) = open(request)?;
        answer(list(&self.0, &caller, &request))
    }

    async fn fork_session(
        &self,
        request: Request<pb::ForkSessionRequest>,
    ) -> Result<Response<pb::ForkSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        answer(fork(&self.0, &caller, request))
    }

    async fn truncate_session(
        &self,
        request: Request<pb::TruncateSessionRequest>,
    ) -> Result<Response<pb::TruncateSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        answer(truncate(&self.0, &caller, &request))
    }

    async fn delete_session(
        &self,
        request: Request<pb::DeleteSessionRequest>,
    ) -> Result<Response<pb::DeleteSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        answer(delete(&self.0, &caller, &request).await)
    }
}

async fn create(
    edge: &Arc<Edge>,
    caller: &Caller,
    request: pb::CreateSessionRequest,
) -> Result<pb::CreateSessionResponse, Error> {
    let pb::CreateSessionRequest { name, model, ttl } = request;
    let key = caller.session(convert::fresh_session_name("name", &name)?);
    let model = convert::model_name("model", &model)?;
    let ttl = convert::ttl(ttl, edge.limits.session_ttl_max)?.unwrap_or(edge.limits.session_ttl);
    let (shelf, named) = (Arc::clone(&edge.shelf), model.clone());
    blocking(move || shelf.resolve(&named)).await?;
    let view = edge.sessions.create(NewSession { key, model, ttl })?;
    Ok(pb::CreateSessionResponse { session: Some(convert::session(edge, view)) })
}

fn get(
    edge: &Edge,
    caller: &Caller,
    request: &pb::GetSessionRequest,
) -> Result<pb::GetSessionResponse, Error> {
    let pb::GetSessionRequest { name, include_messages, include_token_ids } = request;
    let key = caller.session(convert::session_name("name", name)?);
    edge.sessions.with(&key, |session, _| {
        let messages = session.messages().iter().filter(|_| *include_messages);
        Ok(pb::GetSessionResponse {
            session: Some(convert::session(edge, session.view())),
            messages: messages.map(convert::message).collect(),
            token_ids: if *include_token_ids { session.tokens().to_vec() } else { Vec::new() },
        })
    })
}

fn list(
    edge: &Edge,
    caller: &Caller,
    request: &pb::ListSessionsRequest,
) -> Result<pb::ListSessionsResponse, Error> {
    let pb::ListSessionsRequest { page_size, page_token, model } = request;
    let page = convert::session_page(*page_size, page_token, model)?;
    let (views, more) = edge.sessions.list(&caller.principal, &page);
    let last = views.last().filter(|_| more).map(|view| view.key.name.to_string());
    Ok(pb::ListSessionsResponse {
        sessions: views.into_iter().map(|view| convert::session(edge, view)).collect(),
        next_page_token: last.unwrap_or_default(),
    })
}

fn fork(
    edge: &Edge,
    caller: &Caller,
    request: pb::ForkSessionRequest,
) -> Result<pb::ForkSessionResponse, Error> {
    let pb::ForkSessionRequest { name, new_name, ttl, expected_token_count } = request;
    let from = caller.session(convert::session_name("name", &name)?);
    let to = convert::fresh_session_name("new_name", &new_name)?;
    let ttl = convert::ttl(ttl, edge.limits.session_ttl_max)?;
    let view = edge.sessions.fork(&from, to, ttl, expected_token_count)?;
    Ok(pb::ForkSessionResponse { session: Some(convert::session(edge, view)) })
}

fn truncate(
    edge: &Edge,
    caller: &Caller,
    request: &pb::TruncateSessionRequest,
) -> Result<pb::TruncateSessionResponse, Error> {
    let pb::TruncateSessionRequest { name, to, expected_token_count } = request;
    let key = caller.session(convert::session_name("name", name)?);
    let to = to.ok_or_else(|| Error::field("to", "must be given"))?;
    edge.sessions.with(&key, |session, now| {
        session.expect_tokens(*expected_token_count)?;
        match to {
            To::TurnCount(turns) => session.truncate_turns(turns as usize, now)?,
            To::TokenCount(tokens) => session.truncate_tokens(tokens as usize, now)?,
        }
        Ok(pb::TruncateSessionResponse { session: Some(convert::session(edge, session.view())) })
    })
}

async fn delete(
    edge: &Edge,
    caller: &Caller,
    request: &pb::DeleteSessionRequest,
) -> Result<pb::DeleteSessionResponse, Error> {
    let key = caller.session(convert::session_name("name", &request.name)?);
    edge.sessions.delete(&key)?;
    edge.engine.forget(key).await?;
    Ok(pb::DeleteSessionResponse {})
}
