//! The changes of sessions on the wire.

use tokio_stream::Stream;
use tonic::Status;

use super::described::wire;
use super::pb::{self, SessionChangeKind as Kind, watch_sessions_response::Event};
use super::status::status;
use crate::service::{ViewField, WatchEvent, WatchSessions, WatchedChange, Watching};

pub(super) fn request(request: pb::WatchSessionsRequest) -> WatchSessions {
    let pb::WatchSessionsRequest { model, labels, name_prefix, pinned, changes_only } = request;
    WatchSessions { model, labels: labels.into_iter().collect(), name_prefix, pinned, changes_only }
}

/// The stream that the caller reads; dropping it ends the watch.
pub(super) fn events(
    mut watching: Watching,
) -> impl Stream<Item = Result<pb::WatchSessionsResponse, Status>> + Send {
    async_stream::stream! {
        loop {
            match watching.next().await {
                Ok(events) => {
                    for event in events {
                        yield Ok(pb::WatchSessionsResponse { event: Some(self::event(event)) });
                    }
                }
                Err(error) => {
                    yield Err(status(&error));
                    return;
                }
            }
        }
    }
}

fn event(event: WatchEvent) -> Event {
    match event {
        WatchEvent::Ready => Event::Ready(pb::WatchReady {}),
        WatchEvent::Change { name, change, merged } => Event::Change(self::change(name, change, merged)),
    }
}

fn change(name: String, change: WatchedChange, merged_changes: u32) -> pb::SessionChange {
    let none = |kind| (kind, None, Vec::new());
    let (kind, session, fields) = match change {
        WatchedChange::Listed(session) => (Kind::Listed, Some(session), Vec::new()),
        WatchedChange::Created(session) => (Kind::Created, Some(session), Vec::new()),
        WatchedChange::Changed(session, fields) => (Kind::Changed, Some(session), fields),
        WatchedChange::Deleted => none(Kind::Deleted),
        WatchedChange::Expired => none(Kind::Expired),
        WatchedChange::Unlisted => none(Kind::Unlisted),
    };
    pb::SessionChange {
        kind: kind.into(),
        name,
        session: session.map(|session| wire(*session)),
        changed_fields: fields.into_iter().map(|field| field_name(field).to_owned()).collect(),
        merged_changes,
    }
}

/// Returns the name of a field of the message `Session`.
const fn field_name(field: ViewField) -> &'static str {
    match field {
        ViewField::TokenCount => "token_count",
        ViewField::Turns => "turns",
        ViewField::Busy => "busy",
        ViewField::Ttl => "ttl",
        ViewField::LastUse => "last_use_time",
        ViewField::Expiry => "expire_time",
        ViewField::Labels => "labels",
        ViewField::Pinned => "pinned",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_fields_are_fields_of_a_session() {
        use prost::Message as _;
        let files = prost_types::FileDescriptorSet::decode(pb::DESCRIPTOR_SET).unwrap();
        let messages = files.file.iter().flat_map(|file| &file.message_type);
        let session = messages.into_iter().find(|message| message.name() == "Session").unwrap();
        let fields: Vec<&str> = session.field.iter().map(prost_types::FieldDescriptorProto::name).collect();
        let all = [
            ViewField::TokenCount,
            ViewField::Turns,
            ViewField::Busy,
            ViewField::Ttl,
            ViewField::LastUse,
            ViewField::Expiry,
            ViewField::Labels,
            ViewField::Pinned,
        ];
        for field in all {
            assert!(fields.contains(&field_name(field)), "{field:?}");
        }
    }
}
