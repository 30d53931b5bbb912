//! Records make the session that they were made of, whatever it went through, and bytes that are not records
//! make none.

use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;
use crate::ids::{SessionId, SessionKey, TokenizerHash};
use crate::session::{
    AnswerForms, AnswerStart, History, InputKind, Lease, Part, Role, Session, SessionView, Terms, ToolCall,
    ToolResult, TurnContent, TurnId, TurnRequest,
};

fn key() -> SessionKey {
    SessionKey { owner: "uid:1".into(), name: "a/b".into() }
}

fn session() -> Session {
    Session::new(key(), "m".into(), Terms::after_use(Duration::from_secs(10)), at(5))
        .with_id(SessionId(7))
        .with_history(History::Append)
        .with_cache_salt("salt".into())
        .with_tokenizer(TokenizerHash([9; 32]))
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// Something that happens to a session.
#[derive(Clone, Debug)]
enum Event {
    /// A turn that keeps this many tokens and bytes of text of what is there, and adds some.
    Chat {
        keep_tokens: usize,
        keep_text: usize,
        message: Message,
        text: String,
        tokens: Vec<u32>,
        whole: bool,
    },
    Raw(Vec<u32>),
    Turns(usize),
    Tokens(usize),
    Terms(Terms),
}

fn any_terms() -> impl Strategy<Value = Terms> {
    let lease = prop_oneof![
        (0_u64..1 << 40).prop_map(|ns| Lease::AfterUse(Duration::from_nanos(ns))),
        (0_u64..1 << 40).prop_map(|s| Lease::Until(at(s % (1 << 32)))),
    ];
    let labels = prop::collection::btree_map("[a-c]{1,2}", ".{0,3}", 0..3);
    (lease, any::<bool>(), labels).prop_map(|(lease, pinned, labels)| Terms {
        lease,
        pinned,
        labels: Arc::new(labels),
    })
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((".{0,4}", inner), 0..4)
                .prop_map(|entries| entries.into_iter().collect::<Map<_, _>>().into()),
        ]
    })
}

fn any_message() -> impl Strategy<Value = Message> {
    let role =
        prop::sample::select(vec![Role::System, Role::User, Role::Assistant, Role::Tool, Role::Developer]);
    let call = ("[a-z]{0,3}", "[a-z]{1,3}", prop::collection::vec((".{0,4}", any_value()), 0..4));
    let call = call.prop_map(|(id, name, arguments)| {
        Part::ToolCall(ToolCall { id, name, arguments: arguments.into_iter().collect() })
    });
    let result = (".{0,4}", ".{0,8}");
    let result = result.prop_map(|(call_id, text)| Part::ToolResult(ToolResult { call_id, text }));
    let part = prop_oneof![".{0,12}".prop_map(Part::Text), ".{0,8}".prop_map(Part::Reasoning), call, result];
    (role, ".{0,4}", prop::collection::vec(part, 0..4)).prop_map(|(role, name, parts)| Message {
        role,
        name,
        parts,
    })
}

fn any_event() -> impl Strategy<Value = Event> {
    let tokens = || prop::collection::vec(0_u32..300, 0..12);
    let chat = (any::<usize>(), any::<usize>(), any_message(), ".{0,20}", tokens(), any::<bool>());
    prop_oneof![
        4 => chat.prop_map(|(keep_tokens, keep_text, message, text, tokens, whole)| Event::Chat {
            keep_tokens, keep_text, message, text, tokens, whole
        }),
        2 => tokens().prop_map(Event::Raw),
        1 => any::<usize>().prop_map(Event::Turns),
        1 => any::<usize>().prop_map(Event::Tokens),
        1 => any_terms().prop_map(Event::Terms),
    ]
}

/// Lets an event happen; one that is refused changes nothing.
fn happen(session: &mut Session, event: Event, now: SystemTime) {
    let request =
        |input| TurnRequest { model: None, input, expected_token_count: None, input_bytes: 0, history: None };
    match event {
        Event::Chat { keep_tokens, keep_text, message, text, tokens, whole } => {
            let Ok(start) = session.begin(TurnId(1), &request(InputKind::Chat), now) else { return };
            let kept = &start.tokens[..keep_tokens % (start.tokens.len() + 1)];
            let old = start.text.unwrap_or_default();
            let old = &old[..old.floor_char_boundary(keep_text % (old.len() + 1))];
            let before = AnswerStart {
                tokens: kept.len(),
                text_bytes: (keep_text % 5 > 0).then_some(old.len()),
                ending_bytes: (keep_text % 3 > 0).then(|| keep_text % 3 - 1),
                forms: AnswerForms {
                    tools: (keep_text % 2 > 0).then(|| "hermes".into()),
                    reasoning: (keep_tokens % 2 > 0).then(|| "think".into()),
                    begins_reasoning: keep_tokens % 4 > 2,
                },
            };
            let tokens = [kept, &tokens].concat();
            let text = [old, &text].concat().into();
            let content = TurnContent::Chat {
                messages: vec![message],
                text: (keep_text % 5 > 0).then_some(text),
                text_is_whole: whole,
                answer: (keep_text % 3 > 0).then_some(before),
            };
            assert!(session.commit(TurnId(1), tokens.into(), content, now));
        }
        Event::Raw(tokens) => {
            let start = session.begin(TurnId(1), &request(InputKind::Raw), now).unwrap();
            let tokens = [&*start.tokens, &tokens].concat();
            assert!(session.commit(TurnId(1), tokens.into(), TurnContent::Raw, now));
        }
        Event::Turns(turns) => {
            let turns = turns % (session.view().turns.len() + 1);
            session.truncate_turns(turns, now).unwrap();
        }
        Event::Tokens(tokens) => {
            let tokens = tokens % (session.tokens().len() + 1);
            if let Ok(Some(cut)) = session.truncate_tokens(tokens, now) {
                assert_eq!(
                    session.cut_answer(&cut, ("cut", Message::text(Role::Assistant, "cut")), now),
                    Ok(true)
                );
            }
        }
        Event::Terms(terms) => session.set_terms(terms, now),
    }
}

fn replay(records: &[Record]) -> Result<Snapshot, RecordError> {
    let (mut replay, mut cold) = (Replay::default(), Replay::default());
    for Record { outline, content } in records {
        let keeps = replay.outline(outline)?;
        replay.content(keeps, content)?;
        assert_eq!(cold.outline(outline)?, keeps);
    }
    let outline = cold.into_outline();
    assert_eq!(outline, replay.outline, "without the content it is the same session");
    let outline = outline.expect("a record");
    Ok(Snapshot { outline, contents: Some(replay.into_contents()) })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn records_make_the_session_that_they_were_made_of(
        events in prop::collection::vec(any_event(), 0..12),
        every in 1_usize..4,
    ) {
        let mut session = session();
        let mut told = session.snapshot();
        let mut records = whole(&told).to_vec();
        for (index, event) in events.into_iter().enumerate() {
            happen(&mut session, event, at(10 + index as u64));
            if index % every == 0 {
                let now = session.snapshot();
                records.extend(record(Some(&told), &now));
                prop_assert_eq!(record(Some(&now), &now), None);
                told = now;
            }
        }
        prop_assert_eq!(&replay(&records).unwrap(), &told);
        prop_assert_eq!(&replay(&whole(&told)).unwrap(), &told);
        // It goes on as the one that it was.
        let mut back = Session::stored(Default::default(), &mut Default::default(), told.outline.clone(), None);
        prop_assert!(back.is_cold() && back.refuse_without_content().is_err());
        let cold = SessionView { tokens: [].into(), ..session_of(&told).view() };
        prop_assert_eq!(back.view(), cold);
        prop_assert_eq!(back.snapshot(), Snapshot { contents: None, ..told.clone() });
        back.fill(told.contents.clone().unwrap());
        prop_assert_eq!(&back.snapshot(), &told);
    }

    #[test]
    fn bytes_that_are_not_a_record_make_no_session_and_no_panic(
        mut outline in prop::collection::vec(any::<u8>(), 0..200),
        content in prop::collection::vec(any::<u8>(), 0..200),
        real in any::<bool>(),
        at in any::<usize>(),
        bit in 0_u8..8,
    ) {
        if real {
            let mut session = session();
            happen(&mut session, Event::Raw(vec![1, 2, 3]), super::tests::at(9));
            let [_, record] = whole(&session.snapshot());
            outline = record.outline;
            let at = at % outline.len();
            outline[at] ^= 1 << bit;
        }
        let mut replay = Replay::default();
        if let Ok(keeps) = replay.outline(&outline) {
            prop_assert!(replay.outline.as_ref().unwrap().is_sound());
            drop(replay.content(keeps, &content));
        }
        drop(Replay::alone(&outline));
        drop(values::from_bytes(&content));
    }

    #[test]
    fn json_keeps_the_bits_of_its_numbers_and_the_order_of_its_keys(
        entries in prop::collection::vec((".{0,4}", any_value()), 0..6),
    ) {
        let object: Map<String, Value> = entries.into_iter().collect();
        let back = values::from_bytes(&values::to_bytes(&object)).unwrap();
        prop_assert_eq!(Value::from(object.clone()).to_string(), Value::from(back.clone()).to_string());
        prop_assert_eq!(back, object);
    }
}

/// A session that has what a snapshot tells.
fn session_of(told: &Snapshot) -> Session {
    let mut session =
        Session::stored(Default::default(), &mut Default::default(), told.outline.clone(), None);
    session.fill(told.contents.clone().unwrap());
    session
}

#[test]
fn a_turn_that_goes_on_writes_only_what_is_new() {
    let mut session = session();
    happen(&mut session, Event::Raw((0..10_000).collect()), at(6));
    let before = session.snapshot();
    happen(&mut session, Event::Raw(vec![1, 2, 3]), at(7));
    let Record { outline, content } = record(Some(&before), &session.snapshot()).unwrap();
    assert!(outline.len() < 120 && content.len() < 10, "{} {}", outline.len(), content.len());
}

#[test]
fn a_change_of_a_cold_session_keeps_the_content_that_nobody_read() {
    let mut session = session();
    happen(&mut session, Event::Raw(vec![1, 2, 3]), at(6));
    let told = session.snapshot();
    let cold = Snapshot { contents: None, ..told.clone() };
    let later = Snapshot { outline: Outline { used: at(99), ..cold.outline.clone() }, contents: None };
    for before in [&told, &cold] {
        let records = [&whole(&told)[..], &[record(Some(before), &later).unwrap()]].concat();
        let back = replay(&records).unwrap();
        assert_eq!((back.outline.used, back.contents), (at(99), told.contents.clone()));
    }
}

#[test]
fn a_record_that_does_not_follow_is_refused() {
    let mut session = session();
    happen(&mut session, Event::Raw(vec![1, 2, 3]), at(6));
    let first = session.snapshot();
    happen(&mut session, Event::Raw(vec![4]), at(7));
    let [facts, all] = whole(&first);
    let more = record(Some(&first), &session.snapshot()).unwrap();
    assert!(replay(&[facts.clone(), all.clone(), more.clone()]).is_ok());
    assert!(matches!(replay(&[facts.clone(), more.clone()]), Err(RecordError::Contradiction(_))));
    assert!(matches!(replay(&[facts.clone(), all.clone(), more.clone(), more]), Ok(_) | Err(_)));
    let mut other = first.clone();
    other.outline.key.name = "other".into();
    let [_, foreign] = whole(&other);
    assert!(matches!(replay(&[facts, all, foreign]), Err(RecordError::Contradiction(_))));
}

#[test]
fn a_deep_value_is_refused_before_the_stack_ends() {
    let mut deep = json!(1);
    for _ in 0..100 {
        deep = json!([deep]);
    }
    let object = |value: Value| Map::from_iter([("a".to_owned(), value)]);
    assert!(values::from_bytes(&values::to_bytes(&object(deep))).is_some());
    // A list of one list of one list …
    let mut bytes = [1_u64.to_le_bytes(), 0_u64.to_le_bytes()].concat();
    for _ in 0..1_000_000 {
        bytes.push(7);
        bytes.extend(1_u64.to_le_bytes());
    }
    assert_eq!(values::from_bytes(&bytes), None);
}
