//! Sessions and their messages, as the caller sees them.

use super::{count, duration, timestamp};
use crate::rpc::edge::Edge;
use crate::rpc::pb::{self, content_part::Part};
use crate::session::{Message, Role, SessionView, ToolCall, TurnEnd};

pub(in crate::rpc) fn session(edge: &Edge, view: SessionView) -> pb::Session {
    let SessionView { key, model, token_count, turns, busy, ttl, created, used } = view;
    pb::Session {
        name: key.name.to_string(),
        model: model.to_string(),
        owner: key.owner.to_string(),
        token_count: count(token_count),
        turns: turns.iter().map(turn).collect(),
        busy,
        ttl: duration(ttl),
        create_time: timestamp(edge.wall(created)),
        last_use_time: timestamp(edge.wall(used)),
        expire_time: timestamp(edge.wall(used.after(ttl))),
    }
}

fn turn(turn: &TurnEnd) -> pb::Turn {
    let message_count = if turn.raw { 0 } else { count(turn.message_count) };
    pb::Turn { message_count, token_count: count(turn.token_count) }
}

pub(in crate::rpc) fn message(message: &Message) -> pb::Message {
    let Message { role, text, name, tool_calls, tool_call_id } = message;
    let role = match role {
        Role::System => pb::Role::System,
        Role::User => pb::Role::User,
        Role::Assistant => pb::Role::Assistant,
        Role::Tool => pb::Role::Tool,
        Role::Developer => pb::Role::Developer,
    };
    pb::Message {
        role: role.into(),
        content: vec![pb::ContentPart { part: Some(Part::Text(text.clone())) }],
        name: name.clone(),
        tool_calls: tool_calls.iter().map(tool_call).collect(),
        tool_call_id: tool_call_id.clone(),
    }
}

fn tool_call(call: &ToolCall) -> pb::ToolCall {
    let ToolCall { id, name, arguments } = call;
    let arguments_json = serde_json::Value::Object(arguments.clone()).to_string();
    pb::ToolCall { id: id.clone(), name: name.clone(), arguments_json }
}
