//! Sessions as files on the wire: an export's pieces as events, an import's messages as they come.

use std::time::Duration;

use tokio_stream::{Stream, StreamExt as _};
use tonic::{Status, Streaming};

use super::described::time_span;
use super::pb::{self, export_session_response::Event, import_session_request::Part};
use super::status::status;
use crate::error::Error;
use crate::service::{Caller, ImportSession, Piece, Service, SessionExport, SessionImport, SessionView};

/// The stream that the caller reads.
pub(super) fn pieces(
    mut export: SessionExport,
) -> impl Stream<Item = Result<pb::ExportSessionResponse, Status>> + Send {
    async_stream::stream! {
        loop {
            let event = match export.next().await {
                Ok(Some(Piece::Bytes(bytes))) => Event::Chunk(bytes),
                Ok(Some(Piece::End(file_bytes))) => Event::Finished(pb::ExportFinished { file_bytes }),
                Ok(None) => return,
                Err(error) => {
                    yield Err(status(&error));
                    return;
                }
            };
            yield Ok(pb::ExportSessionResponse { event: Some(event) });
        }
    }
}

/// Why an import ends: an error of ours, or a status that its body had.
pub(super) enum Ended {
    Refused(Error),
    Broken(Status),
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

impl From<Status> for Ended {
    fn from(status: Status) -> Self {
        Self::Broken(status)
    }
}

impl Ended {
    pub(super) fn into_status(self) -> Status {
        match self {
            Self::Refused(error) => status(&error),
            Self::Broken(status) => status,
        }
    }
}

/// Takes in a session; returns when it is saved.
pub(super) async fn import(
    service: &Service,
    caller: &Caller,
    mut parts: Streaming<pb::ImportSessionRequest>,
) -> Result<SessionView, Ended> {
    let mut import = match parts.next().await.transpose()?.and_then(|first| first.part) {
        Some(Part::Start(start)) => begin(service, caller, start)?,
        Some(Part::Chunk(_)) | None => return Err(Error::field("start", "must be the first message").into()),
    };
    while let Some(next) = parts.next().await.transpose()? {
        match next.part {
            Some(Part::Chunk(bytes)) => import.add(bytes).await?,
            Some(Part::Start(_)) => return Err(Error::field("start", "must be given once").into()),
            None => return Err(Error::field("part", "must be given").into()),
        }
    }
    Ok(import.finish().await?)
}

fn begin<'a>(
    service: &'a Service,
    caller: &'a Caller,
    start: pb::ImportStart,
) -> Result<SessionImport<'a>, Error> {
    let pb::ImportStart { name, model, pinned, ttl, replace, expected_token_count } = start;
    let ttl: Option<Duration> = time_span(ttl)?;
    service.import_session(caller, ImportSession { name, model, pinned, ttl, replace, expected_token_count })
}
