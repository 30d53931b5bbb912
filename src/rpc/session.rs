//! `SessionService`.

use std::pin::Pin;
use std::sync::Arc;

use prost::Message as _;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::described::{time, time_span, wire};
use super::event;
use super::gate::open;
use super::history;
use super::inference::{missing_input, priority};
use super::message;
use super::page::{FIELD_BYTES, fitting};
use super::pb::{
    self, extend_session_request::Input as Addition, session_service_server::SessionService,
    truncate_session_request::To, update_session_request::Lifetime as New,
};
use super::portable;
use super::status::answer;
use super::stay;
use super::watch;
use crate::error::Error;
use crate::service::{
    CreateSession, ExtendRequest, Extended, ForkSession, Input, Lifetime, Message, SavedSession, Service,
    SessionContent, SessionPage, SessionView, TruncateSession, TruncateTo, UpdateSession,
};

/// Bytes of the token of a next page, with its tag.
const PAGE_END_BYTES: usize = 32;

/// The events of a call.
type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(super) struct Sessions(pub(super) Arc<Service>);

#[tonic::async_trait]
impl SessionService for Sessions {
    async fn create_session(
        &self,
        request: Request<pb::CreateSessionRequest>,
    ) -> Result<Response<pb::CreateSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        let created = async {
            let pb::CreateSessionRequest {
                name,
                model,
                ttl,
                labels,
                pinned,
                history: sent,
                expire_time,
                cache_salt,
            } = request;
            let lifetime = Lifetime { ttl: time_span(ttl)?, expire_time: time(expire_time)? };
            let (labels, history) =
                (labels.into_iter().collect(), history::from_wire(sent)?.unwrap_or_default());
            let create = CreateSession { name, model, lifetime, labels, pinned, history, cache_salt };
            let view = self.0.create_session(&caller, create).await?;
            Ok(pb::CreateSessionResponse { session: self.described(view).await })
        };
        answer(created.await)
    }

    async fn get_session(
        &self,
        request: Request<pb::GetSessionRequest>,
    ) -> Result<Response<pb::GetSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        let bytes_max = self.0.limits().answer_bytes_max;
        let got = async {
            let SessionContent { view, messages } = self.0.get_session(&caller, &request.name).await?;
            let token_ids = if request.include_token_ids { view.tokens.to_vec() } else { Vec::new() };
            let session = self.described(view).await;
            let described = pb::GetSessionResponse { session, token_ids, ..Default::default() };
            with_messages(described, &messages, &request, bytes_max)
        };
        answer(got.await)
    }

    async fn list_sessions(
        &self,
        request: Request<pb::ListSessionsRequest>,
    ) -> Result<Response<pb::ListSessionsResponse>, Status> {
        let (caller, request) = open(request)?;
        let pb::ListSessionsRequest { page_size, page_token, model, labels, name_prefix, pinned } = request;
        let labels = labels.into_iter().collect();
        let page = SessionPage { size: page_size, token: page_token, model, labels, name_prefix, pinned };
        let bytes_max = self.0.limits().answer_bytes_max;
        let listed = async {
            let (views, next) = self.0.list_sessions(&caller, page)?;
            let entries = self.0.describe_sessions(views).await.into_iter().map(wire);
            let (sessions, next) = fitting(entries, |session| &session.name, next, bytes_max)?;
            Ok(pb::ListSessionsResponse { sessions, next_page_token: next.unwrap_or_default() })
        };
        answer(listed.await)
    }

    async fn update_session(
        &self,
        request: Request<pb::UpdateSessionRequest>,
    ) -> Result<Response<pb::UpdateSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        let updated = async {
            let pb::UpdateSessionRequest { name, lifetime, labels, remove_labels, pinned } = request;
            let lifetime = match lifetime {
                Some(New::Ttl(ttl)) => Lifetime { ttl: time_span(Some(ttl))?, expire_time: None },
                Some(New::ExpireTime(end)) => Lifetime { ttl: None, expire_time: time(Some(end))? },
                None => Lifetime::default(),
            };
            let labels = labels.into_iter().collect();
            let update = UpdateSession { name, lifetime, labels, remove_labels, pinned };
            let view = self.0.update_session(&caller, update).await?;
            Ok(pb::UpdateSessionResponse { session: self.described(view).await })
        };
        answer(updated.await)
    }

    async fn extend_session(
        &self,
        request: Request<pb::ExtendSessionRequest>,
    ) -> Result<Response<pb::ExtendSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        let extended = async {
            let extended = Box::pin(self.0.extend_session(&caller, extend_request(request)?)).await?;
            let Extended { view, usage } = extended;
            let session = self.described(view).await;
            Ok(pb::ExtendSessionResponse { session, usage: Some(event::usage(usage)) })
        };
        answer(extended.await)
    }

    async fn save_session(
        &self,
        request: Request<pb::SaveSessionRequest>,
    ) -> Result<Response<pb::SaveSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        let pb::SaveSessionRequest { name, expected_token_count } = request;
        let saved = async {
            let saved = Box::pin(self.0.save_session(&caller, &name, expected_token_count)).await?;
            let SavedSession { view, tokens: token_count, bytes } = saved;
            Ok(pb::SaveSessionResponse { session: self.described(view).await, token_count, bytes })
        };
        answer(saved.await)
    }

    async fn fork_session(
        &self,
        request: Request<pb::ForkSessionRequest>,
    ) -> Result<Response<pb::ForkSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        let pb::ForkSessionRequest { name, new_name, ttl, expected_token_count, turn_count, pinned } =
            request;
        let forked = async {
            let ttl = time_span(ttl)?;
            let fork = ForkSession { name, new_name, ttl, pinned, turn_count, expected_token_count };
            let view = self.0.fork_session(&caller, &fork).await?;
            Ok(pb::ForkSessionResponse { session: self.described(view).await })
        };
        answer(forked.await)
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
            Some(To::MessageCount(messages)) => Ok(TruncateTo::Messages(messages)),
            None => Err(Error::field("to", "must be given")),
        };
        let truncated = async {
            let truncate = TruncateSession { name, to: to?, expected_token_count };
            let view = self.0.truncate_session(&caller, &truncate).await?;
            Ok(pb::TruncateSessionResponse { session: self.described(view).await })
        };
        answer(truncated.await)
    }

    async fn delete_session(
        &self,
        request: Request<pb::DeleteSessionRequest>,
    ) -> Result<Response<pb::DeleteSessionResponse>, Status> {
        let (caller, request) = open(request)?;
        let deleted = self.0.delete_session(&caller, &request.name).await;
        answer(deleted.map(|()| pb::DeleteSessionResponse {}))
    }

    type ExportSessionStream = Events<pb::ExportSessionResponse>;

    async fn export_session(
        &self,
        request: Request<pb::ExportSessionRequest>,
    ) -> Result<Response<Self::ExportSessionStream>, Status> {
        let (caller, request) = open(request)?;
        let pb::ExportSessionRequest { name, expected_token_count } = request;
        let export = self.0.export_session(&caller, &name, expected_token_count).await;
        answer(export.map(|export| Box::pin(portable::pieces(export)) as Events<_>))
    }

    async fn import_session(
        &self,
        request: Request<Streaming<pb::ImportSessionRequest>>,
    ) -> Result<Response<pb::ImportSessionResponse>, Status> {
        let (caller, parts) = open(request)?;
        let imported = portable::import(&self.0, &caller, parts).await;
        let view = imported.map_err(portable::Ended::into_status)?;
        Ok(Response::new(pb::ImportSessionResponse { session: self.described(view).await }))
    }

    type WatchSessionsStream = Events<pb::WatchSessionsResponse>;

    async fn watch_sessions(
        &self,
        request: Request<pb::WatchSessionsRequest>,
    ) -> Result<Response<Self::WatchSessionsStream>, Status> {
        let (caller, request) = open(request)?;
        let watching = self.0.watch_sessions(&caller, watch::request(request));
        answer(watching.map(|watching| Box::pin(watch::events(watching)) as Events<_>))
    }
}

fn extend_request(request: pb::ExtendSessionRequest) -> Result<ExtendRequest, Error> {
    let pb::ExtendSessionRequest { name, input, expected_token_count, priority: order, keep_alive } = request;
    let input = match input.ok_or_else(missing_input)? {
        Addition::Prompt(text) => Input::Text(text),
        Addition::TokenIds(list) => Input::Ids(list.ids),
        Addition::Chat(chat) => Input::Chat(message::chat(chat)?),
    };
    let (priority, keep_alive) = (priority(order)?, stay::from_wire(keep_alive)?);
    Ok(ExtendRequest { name, input, expected_token_count, priority, keep_alive })
}

impl Sessions {
    /// Returns a session as it is sent.
    async fn described(&self, view: SessionView) -> Option<pb::Session> {
        Some(wire(self.0.describe_session(view).await))
    }
}

/// Adds as many of a session's messages as were asked for and fit in an answer of `bytes_max`.
fn with_messages(
    mut answer: pb::GetSessionResponse,
    messages: &[Arc<Message>],
    request: &pb::GetSessionRequest,
    bytes_max: usize,
) -> Result<pb::GetSessionResponse, Error> {
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
