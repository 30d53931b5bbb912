//! `SessionService`.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tonic::{Request, Response, Status};

use super::event::{duration, timestamp};
use super::gate::open;
use super::history;
use super::message;
use super::page::{FIELD_BYTES, fitting};
use super::pb::{self, session_service_server::SessionService, truncate_session_request::To};
use super::status::answer;
use crate::count::count;
use crate::error::Error;
use crate::service::{
    CreateSession, ForkSession, Service, SessionContent, SessionPage, SessionView, TruncateSession,
    TruncateTo, TurnEnd,
};

const NANOS_PER_SECOND: i32 = 1_000_000_000;

/// Bytes of the token of a next page, with its tag.
const PAGE_END_BYTES: usize = 32;

pub(super) struct Sessions(pub(super) Arc<Service>);

#[tonic::async_trait]
impl SessionService for Sessions {
    async fn create_session(
        &self,
        request: Request<pb::CreateSessionRequest>,
    ) -> Result<Response<pb::CreateSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        let created = async {
            let pb::CreateSessionRequest { name, model, ttl, history: sent, cache_salt } = request;
            let history = history::from_wire(sent)?.unwrap_or_default();
            let create = CreateSession { name, model, ttl: lifetime(ttl)?, history, cache_salt };
            let session = self.0.create_session(&caller, create).await?;
            Ok(pb::CreateSessionResponse { session: Some(wire(session)) })
        };
        answer(created.await)
    }

    async fn get_session(
        &self,
        request: Request<pb::GetSessionRequest>,
    ) -> Result<Response<pb::GetSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        let bytes_max = self.0.limits().answer_bytes_max;
        let session = self.0.get_session(&caller, &request.name).await;
        answer(session.and_then(|session| content(session, &request, bytes_max)))
    }

    async fn list_sessions(
        &self,
        request: Request<pb::ListSessionsRequest>,
    ) -> Result<Response<pb::ListSessionsResponse>, Status> {
        let (caller, request) = open(request)?;
        let pb::ListSessionsRequest { page_size, page_token, model } = request;
        let page = SessionPage { size: page_size, token: page_token, model };
        let bytes_max = self.0.limits().answer_bytes_max;
        let listed = self.0.list_sessions(&caller, &page);
        answer(listed.and_then(|(sessions, next)| {
            let entries = sessions.into_iter().map(wire);
            let (sessions, next) = fitting(entries, |session| &session.name, next, bytes_max)?;
            Ok(pb::ListSessionsResponse { sessions, next_page_token: next.unwrap_or_default() })
        }))
    }

    async fn fork_session(
        &self,
        request: Request<pb::ForkSessionRequest>,
    ) -> Result<Response<pb::ForkSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        let pb::ForkSessionRequest { name, new_name, ttl, expected_token_count } = request;
        let forked = async {
            let fork = ForkSession { name, new_name, ttl: lifetime(ttl)?, expected_token_count };
            self.0.fork_session(&caller, &fork).await
        };
        answer(forked.await.map(|session| pb::ForkSessionResponse { session: Some(wire(session)) }))
    }

    async fn truncate_session(
        &self,
        request: Request<pb::TruncateSessionRequest>,
    ) -> Result<Response<pb::TruncateSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        let pb::TruncateSessionRequest { name, to, expected_token_count } = request;
        let to = match to {
            Some(To::TurnCount(turns)) => Ok(TruncateTo::Turns(turns)),
            Some(To::TokenCount(tokens)) => Ok(TruncateTo::Tokens(tokens)),
            None => Err(Error::field("to", "must be given")),
        };
        let truncated = async {
            let truncate = TruncateSession { name, to: to?, expected_token_count };
            self.0.truncate_session(&caller, &truncate).await
        };
        answer(truncated.await.map(|session| pb::TruncateSessionResponse { session: Some(wire(session)) }))
    }

    async fn delete_session(
        &self,
        request: Request<pb::DeleteSessionRequest>,
    ) -> Result<Response<pb::DeleteSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        let deleted = self.0.delete_session(&caller, &request.name).await;
        answer(deleted.map(|()| pb::DeleteSessionResponse {}))
    }
}

/// Returns what was asked for of a session, with as many messages as fit in an answer of `bytes_max`.
fn content(
    session: SessionContent,
    request: &pb::GetSessionRequest,
    bytes_max: usize,
) -> Result<pb::GetSessionResponse, Error> {
    let SessionContent { view, messages, tokens } = session;
    let mut answer = pb::GetSessionResponse {
        session: Some(wire(view)),
        token_ids: if request.include_token_ids { tokens.to_vec() } else { Vec::new() },
        ..Default::default()
    };
    if !request.include_messages {
        return Ok(answer);
    }
    let start = first_message(&request.message_page_token)?;
    let size = if request.message_page_size == 0 { u32::MAX } else { request.message_page_size };
    let mut room = bytes_max.saturating_sub(answer.encoded_len() + PAGE_END_BYTES);
    for message in messages.iter().skip(start).take(size as usize) {
        let message = message::wire(message);
        let Some(left) = room.checked_sub(message.encoded_len() + FIELD_BYTES) else { break };
        room = left;
        answer.messages.push(message);
    }
    let end = start + answer.messages.len();
    if end < messages.len() {
        if answer.messages.is_empty() {
            return Err(Error::AnswerTooLarge { limit_bytes: bytes_max as u64 });
        }
        answer.next_message_page_token = end.to_string();
    }
    Ok(answer)
}

/// Returns the index of a page's first message, which its token says.
fn first_message(token: &str) -> Result<usize, Error> {
    if token.is_empty() {
        return Ok(0);
    }
    token.parse().map_err(|_| Error::field("message_page_token", "is not a token of this daemon"))
}

fn wire(view: SessionView) -> pb::Session {
    let SessionView { key, model, token_count, turns, busy, ttl, created, used, history } = view;
    pb::Session {
        name: key.name.to_string(),
        model: model.to_string(),
        owner: key.owner.to_string(),
        token_count: count(token_count),
        turns: turns.iter().map(turn).collect(),
        busy,
        ttl: duration(ttl),
        create_time: timestamp(created),
        last_use_time: timestamp(used),
        expire_time: used.checked_add(ttl).and_then(timestamp),
        history: history::to_wire(history),
    }
}

fn turn(turn: &TurnEnd) -> pb::Turn {
    let message_count = if turn.raw { 0 } else { count(turn.message_count) };
    pb::Turn { message_count, token_count: count(turn.token_count) }
}

/// Reads a lifetime. prost would repair a malformed one; it is refused.
fn lifetime(sent: Option<prost_types::Duration>) -> Result<Option<Duration>, Error> {
    let Some(sent) = sent else { return Ok(None) };
    let is_plain = sent.seconds >= 0 && (0..NANOS_PER_SECOND).contains(&sent.nanos);
    match Duration::try_from(sent) {
        Ok(ttl) if is_plain => Ok(Some(ttl)),
        Ok(_) | Err(_) => Err(Error::field("ttl", "must be a duration above 0")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_lifetime_is_refused() {
        let read = |seconds, nanos| lifetime(Some(prost_types::Duration { seconds, nanos }));
        assert_eq!(lifetime(None), Ok(None));
        assert_eq!(read(1, 5), Ok(Some(Duration::new(1, 5))));
        for (seconds, nanos) in [(-1, 0), (1, -5), (1, 1_000_000_000)] {
            let refused = read(seconds, nanos);
            assert!(matches!(refused, Err(Error::InvalidField { field, .. }) if field == "ttl"));
        }
    }
}
