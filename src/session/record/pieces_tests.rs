//! Pieces make the session that they were made of, and what is not one is refused before it takes memory.

use std::time::{Duration, SystemTime};

use prost::Message as _;
use serde_json::json;

use super::*;
use crate::count::count;
use crate::ids::{SessionKey, TokenizerHash};
use crate::session::{
    InputKind, Part, Role, Session, Snapshot, Terms, ToolCall, TurnContent, TurnId, TurnRequest,
};

const NOW: SystemTime = SystemTime::UNIX_EPOCH;
const LIMIT: usize = 64 << 20;

fn session() -> Session {
    let key = SessionKey { owner: "uid:1".into(), name: "s".into() };
    Session::new(key, "m".into(), Terms::after_use(Duration::from_secs(9)), NOW)
        .with_id(SessionId(7))
        .with_cache_salt("salt".into())
        .with_tokenizer(TokenizerHash([3; 32]))
}

/// Adds a turn whose messages have the texts.
fn say(session: &mut Session, number: u64, texts: &[&str]) {
    let request = TurnRequest {
        model: None,
        input: InputKind::Chat,
        expected_token_count: None,
        input_bytes: 0,
        history: None,
    };
    let start = session.begin(TurnId(number), &request, NOW).unwrap();
    let arguments = json!({ "a": [null, 1, { "b": "c" }] }).as_object().cloned().unwrap();
    let call = Part::ToolCall(ToolCall { id: "1".into(), name: "f".into(), arguments });
    let messages = texts.iter().map(|text| {
        let mut message = Message::text(Role::User, *text);
        message.parts.push(call.clone());
        message
    });
    let tokens: Vec<u32> = start.tokens.iter().copied().chain(0..count(texts.concat().len())).collect();
    let text = Some([start.text.as_deref().unwrap_or(""), &*texts.concat()].concat().into());
    let content = TurnContent::Chat { messages: messages.collect(), text, text_is_whole: true, answer: None };
    assert!(session.commit(TurnId(number), tokens.into(), content, NOW));
}

fn pieces(session: &Session) -> Vec<Record> {
    let Snapshot { outline, contents } = session.snapshot();
    Pieces::new(&outline, contents.unwrap()).collect()
}

fn join(records: &[Record], limit: usize) -> Result<(Outline, Contents), PieceError> {
    let mut joined = Joined::default();
    for record in records {
        joined.add(&record.outline, &record.content, limit)?;
    }
    Ok(joined.into_session()?)
}

#[test]
fn a_session_of_many_pieces_is_put_together_as_it_was() {
    let mut session = session();
    let long = "ä".repeat(PIECE_BYTES);
    for (number, texts) in [(1, &["one", "two"][..]), (2, &[&long, "x"]), (3, &["three"])] {
        say(&mut session, number, texts);
    }
    let records = pieces(&session);
    assert!(records.len() > 8, "{}", records.len());
    let largest = records.iter().map(|record| record.content.len()).max().unwrap();
    assert!(largest < 2 * PIECE_BYTES + 1024, "a message of its own at most: {largest}");
    let (outline, contents) = join(&records, LIMIT).unwrap();
    let before = session.snapshot();
    assert_eq!(Some(contents), before.contents);
    let nobodys = SessionKey { owner: "".into(), name: "s".into() };
    let mut told = Outline { id: SessionId(0), key: nobodys, content_number: 0, ..before.outline };
    told.turn_charges.iter_mut().for_each(|charged| charged.number = 0);
    assert_eq!(outline, told);
}

#[test]
fn an_empty_session_is_one_piece() {
    let session = session();
    let records = pieces(&session);
    assert_eq!(records.len(), 1);
    assert_eq!(join(&records, LIMIT).unwrap().1, Contents::default());
}

#[test]
fn a_missing_or_repeated_piece_is_refused() {
    let mut session = session();
    say(&mut session, 1, &[&"a".repeat(PIECE_BYTES), &"b".repeat(PIECE_BYTES), "c"]);
    let records = pieces(&session);
    assert!(records.len() >= 3);
    for place in 0..records.len() {
        let mut fewer = records.clone();
        fewer.remove(place);
        assert!(join(&fewer, LIMIT).is_err(), "without {place}");
        let mut more = records.clone();
        more.insert(place, records[place].clone());
        assert!(join(&more, LIMIT).is_err(), "{place} twice");
    }
    assert!(join(&[], LIMIT).is_err());
}

#[test]
fn turns_are_charged_with_what_they_hold_whatever_the_file_says() {
    let mut session = session();
    say(&mut session, 1, &["one", "two"]);
    let Snapshot { mut outline, contents } = session.snapshot();
    let bytes = outline.turn_charges[0].bytes;
    // A number that another session's charge may have: the two would count once.
    (outline.turn_charges, outline.content_number) = (vec![Charged { bytes: 1, number: 5 }], 6);
    let records: Vec<Record> = Pieces::new(&outline, contents.clone().unwrap()).collect();
    let joined = join(&records, LIMIT).unwrap().0;
    assert_eq!((joined.turn_charges, joined.content_number), (vec![Charged { bytes, number: 0 }], 0));
    // Content that is of no turn would be charged to none.
    (outline.turns, outline.turn_charges) = (Vec::new(), Vec::new());
    let records: Vec<Record> = Pieces::new(&outline, contents.unwrap()).collect();
    assert!(join(&records, LIMIT).is_err());
}

#[test]
fn a_session_above_the_limit_is_refused_by_the_record_that_exceeds_it() {
    let mut session = session();
    say(&mut session, 1, &[&"a".repeat(PIECE_BYTES), &"b".repeat(PIECE_BYTES)]);
    let records = pieces(&session);
    let mut joined = Joined::default();
    let limit_bytes = PIECE_BYTES + 1000;
    joined.add(&records[0].outline, &records[0].content, limit_bytes).unwrap();
    let refused = joined.add(&records[1].outline, &records[1].content, limit_bytes);
    assert_eq!(refused, Err(PieceError::TooLarge { limit_bytes }));
}

#[test]
fn what_becomes_large_in_memory_is_weighed_before_it_is_decoded() {
    let outline = pieces(&session())[0].outline.clone();
    // Empty messages of two bytes, parts of two bytes in one message, and values of one byte in a call.
    let messages = [0x0a, 0].repeat(1 << 20);
    let parts = field(1, &[0x1a, 0].repeat(1 << 20));
    let values = [&1_u64.to_le_bytes()[..], &0_u64.to_le_bytes(), &[7], &(1_u64 << 20).to_le_bytes()];
    let values = [values.concat(), vec![0; 1 << 20]].concat();
    let call = field(1, &field(3, &field(2, &field(3, &values))));
    let tokens = field(2, &[1].repeat(1 << 20));
    for (content, limit) in [(messages, 16 << 20), (parts, 16 << 20), (call, 2 << 20), (tokens, 1 << 20)] {
        assert!(content_weight(&content).unwrap() > 2 * limit, "{}", content.len());
        let refused = Joined::default().add(&outline, &content, limit);
        assert_eq!(refused, Err(PieceError::TooLarge { limit_bytes: limit }));
    }
    let turns = [0x4a, 0].repeat(1 << 20);
    assert_eq!(
        Joined::default().add(&turns, &[], 1 << 20),
        Err(PieceError::TooLarge { limit_bytes: 1 << 20 })
    );
}

/// Returns a field of bytes.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    prost::encoding::encode_varint(content.len() as u64, &mut bytes);
    bytes.extend(content);
    bytes
}

#[test]
fn arguments_that_end_too_early_are_refused_before_they_are_made() {
    let mut values = [&1_u64.to_le_bytes()[..], &0_u64.to_le_bytes(), &[7], &u64::MAX.to_le_bytes()].concat();
    values.extend(vec![0; 1000]);
    let content = field(1, &field(3, &field(2, &field(3, &values))));
    assert!(content_weight(&content).is_err());
}

#[test]
fn what_is_weighed_is_what_is_charged_and_little_more() {
    let mut session = session();
    say(&mut session, 1, &["one", "two"]);
    let records = pieces(&session);
    let mut joined = Joined::default();
    joined.add(&records[0].outline, &records[0].content, LIMIT).unwrap();
    let weight = content_weight(&records[0].content).unwrap();
    assert!(joined.bytes() <= weight && weight < 2 * joined.bytes(), "{weight} for {}", joined.bytes());
    // The arguments are weighed exactly.
    let bytes = ContentRecord::decode(&*records[0].content).unwrap().into_parts().unwrap().0[0]
        .tool_calls()
        .map(|call| crate::session::object_bytes(&call.arguments))
        .sum::<usize>();
    let call = json!({ "a": [null, 1, { "b": "c" }] }).as_object().cloned().unwrap();
    assert_eq!(values::charge(&values::to_bytes(&call)), Some(bytes));
}
