//! What may follow what in a session, and that text and tokens agree whatever happens.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::session::{Role, joined};

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

fn session() -> Session {
    let key = SessionKey { owner: "uid:1".into(), name: "s".into() };
    Session::new(key, "m".into(), Terms::after_use(Duration::from_secs(60)), NOW)
}

fn request(input: InputKind) -> TurnRequest {
    TurnRequest { model: None, input, expected_token_count: None, input_bytes: 0, history: None }
}

fn chat(text: &str) -> TurnContent {
    let messages = vec![Message::text(Role::User, "q"), Message::text(Role::Assistant, "a")];
    TurnContent::Chat { messages, text: Some(text.into()), text_is_whole: true, answer: None }
}

/// A chat turn of which the last `answer` tokens, and bytes of text, are the answer.
fn answered(text: &str, answer: usize) -> TurnContent {
    let start = text.len() - answer;
    let messages = vec![Message::text(Role::User, "q"), Message::text(Role::Assistant, &text[start..])];
    let at = AnswerStart { tokens: start, text_bytes: Some(start), ..AnswerStart::default() };
    TurnContent::Chat { messages, text: Some(text.into()), text_is_whole: true, answer: Some(at.unended()) }
}

/// What remains of an answer that is only text.
fn said(text: &str) -> (&str, Message) {
    (text, Message::text(Role::Assistant, text))
}

fn texts(session: &Session) -> Vec<String> {
    session.messages().iter().map(|message| message.joined_text()).collect()
}

fn turn(session: &mut Session, id: u64, tokens: Vec<u32>, content: TurnContent) {
    let input = if matches!(content, TurnContent::Raw) { InputKind::Raw } else { InputKind::Chat };
    session.begin(TurnId(id), &request(input), NOW).unwrap();
    assert!(session.commit(TurnId(id), tokens.into(), content, NOW));
}

#[test]
fn a_turn_that_is_rolled_back_leaves_no_trace() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], chat("ab"));
    let before = session.clone();
    session.begin(TurnId(2), &request(InputKind::Chat), NOW).unwrap();
    session.roll_back(TurnId(2), NOW);
    assert_eq!(session, before);
}

#[test]
fn a_second_turn_is_refused_while_one_runs() {
    let mut session = session();
    session.begin(TurnId(1), &request(InputKind::Chat), NOW).unwrap();
    let refused = session.begin(TurnId(2), &request(InputKind::Chat), NOW);
    assert_eq!(refused, Err(Error::SessionBusy("s".into())));
    assert_eq!(session.truncate_turns(0, NOW), Err(Error::SessionBusy("s".into())));
}

#[test]
fn a_commit_of_another_turn_is_refused() {
    let mut session = session();
    session.begin(TurnId(1), &request(InputKind::Raw), NOW).unwrap();
    assert!(!session.commit(TurnId(2), [1].into(), TurnContent::Raw, NOW));
    assert!(session.tokens().is_empty());
}

#[test]
fn an_unexpected_token_count_is_refused_with_both_counts() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], chat("ab"));
    let stale = TurnRequest { expected_token_count: Some(1), ..request(InputKind::Chat) };
    let moved = Error::SessionMoved { session: "s".into(), expected: 1, actual: 2 };
    assert_eq!(session.begin(TurnId(2), &stale, NOW), Err(moved));
}

#[test]
fn another_model_is_refused() {
    let other = TurnRequest { model: Some("n".into()), ..request(InputKind::Raw) };
    let refused = Error::SessionWrongModel { session: "s".into(), model: "m".into() };
    assert_eq!(session().begin(TurnId(1), &other, NOW), Err(refused));
}

#[test]
fn chat_after_raw_is_refused_until_the_raw_turn_is_cut_off() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], chat("ab"));
    turn(&mut session, 2, vec![1, 2, 3], TurnContent::Raw);
    assert!(session.messages().is_empty());
    let refused = session.begin(TurnId(3), &request(InputKind::Chat), NOW);
    assert_eq!(refused, Err(Error::SessionNotChat("s".into())));
    session.truncate_turns(1, NOW).unwrap();
    assert_eq!(session.messages().len(), 2);
    let start = session.begin(TurnId(4), &request(InputKind::Chat), NOW).unwrap();
    assert_eq!((start.text.as_deref(), &*start.tokens), (Some("ab"), &[1, 2][..]));
}

#[test]
fn truncation_restores_text_and_tokens_of_the_turn() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], chat("ab"));
    turn(&mut session, 2, vec![1, 2, 3, 4], chat("abcd"));
    assert_eq!(session.truncate_tokens(2, NOW), Ok(None));
    let start = session.begin(TurnId(3), &request(InputKind::Chat), NOW).unwrap();
    assert_eq!((start.text.as_deref(), &*start.tokens), (Some("ab"), &[1, 2][..]));
}

#[test]
fn a_rewritten_beginning_moves_earlier_turn_ends_back() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2, 3], chat("abc"));
    turn(&mut session, 2, vec![1, 2, 9, 9], chat("abXY"));
    session.truncate_turns(1, NOW).unwrap();
    let start = session.begin(TurnId(3), &request(InputKind::Chat), NOW).unwrap();
    assert_eq!((start.text, &*start.tokens, start.messages.len()), (None, &[1, 2][..], 2));
}

#[test]
fn a_text_that_lacks_a_part_of_the_tokens_is_not_built_upon() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], chat("ab"));
    let TurnContent::Chat { messages, .. } = chat("") else { unreachable!() };
    let content =
        TurnContent::Chat { messages, text: Some("abc".into()), text_is_whole: false, answer: None };
    turn(&mut session, 2, vec![1, 2, 3, 4], content);
    let start = session.begin(TurnId(3), &request(InputKind::Chat), NOW).unwrap();
    assert_eq!(start.text, None);
    session.roll_back(TurnId(3), NOW);
    session.truncate_turns(1, NOW).unwrap();
    let start = session.begin(TurnId(4), &request(InputKind::Chat), NOW).unwrap();
    assert_eq!(start.text.as_deref(), Some("ab"));
}

#[test]
fn a_turn_of_which_only_the_ending_is_another_token_is_whole() {
    let mut session = session();
    let messages = vec![Message::text(Role::User, "q"), Message::text(Role::Assistant, "a")];
    let answer = Some(AnswerStart { tokens: 1, text_bytes: Some(2), ..AnswerStart::default() });
    let text = Some("q:a!".into());
    turn(&mut session, 1, vec![1, 2, 9], TurnContent::Chat { messages, text, text_is_whole: true, answer });
    turn(&mut session, 2, vec![1, 2, 8, 3], chat("q:a.more"));
    session.truncate_turns(1, NOW).unwrap();
    let start = session.begin(TurnId(3), &request(InputKind::Chat), NOW).unwrap();
    assert_eq!((start.text.as_deref(), &*start.tokens, start.is_whole), (Some("q:a"), &[1, 2][..], true));
}

/// Adds a message without an answer.
fn added(text: Option<&str>) -> TurnContent {
    let messages = vec![Message::text(Role::User, "q")];
    TurnContent::Chat { messages, text: text.map(Into::into), text_is_whole: true, answer: None }
}

#[test]
fn what_is_added_after_an_answer_leaves_its_end_known_in_forks_and_cuts_too() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], answered("ab", 1));
    turn(&mut session, 2, vec![1, 2, 3, 4], answered("abcd", 1));
    turn(&mut session, 3, vec![1, 2, 3, 4, 5], added(Some("abcde")));
    turn(&mut session, 4, vec![1, 2, 3, 4, 5, 6], added(Some("abcdef")));
    let answer = |session: &Session| session.start(&request(InputKind::Chat)).unwrap().answer;
    let second = Some(AnswerEnd { message: 3, tokens: 4, text_bytes: Some(4) });
    assert_eq!(answer(&session), second);
    let key = SessionKey { owner: "uid:1".into(), name: "f".into() };
    let mut fork = session.fork(key, NOW);
    fork.truncate_turns(3, NOW).unwrap();
    assert_eq!(answer(&fork), second);
    // The second answer is cut off, its question stays.
    session.truncate_messages(3, NOW).unwrap();
    assert_eq!(answer(&session), Some(AnswerEnd { message: 1, tokens: 2, text_bytes: Some(2) }));
    session.truncate_turns(0, NOW).unwrap();
    assert_eq!(answer(&session), None);
}

#[test]
fn an_earlier_turn_does_not_end_within_a_later_answer() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], added(Some("ab")));
    turn(&mut session, 2, vec![1, 2, 3], answered("abc", 2));
    session.truncate_messages(2, NOW).unwrap();
    assert_eq!(session.turns.iter().map(|turn| turn.token_count).collect::<Vec<_>>(), [1, 1]);
}

#[test]
fn an_answer_of_no_tokens_does_not_end_before_it_begins() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], answered("ab", 0));
    turn(&mut session, 2, vec![1, 3], chat("a"));
    assert_eq!((&session.turns[0].answer, session.turns[0].token_count), (&None, 1));
}

#[test]
fn an_answer_of_unknown_text_is_known_by_its_tokens_whatever_follows_it() {
    // The second time, another token than its own ends it in what follows.
    for after in [vec![1, 2, 3, 4], vec![1, 2, 9, 4]] {
        let mut session = session();
        let messages = vec![Message::text(Role::User, "q"), Message::text(Role::Assistant, "a")];
        let answer = Some(AnswerStart { tokens: 1, ..AnswerStart::default() });
        let content = TurnContent::Chat { messages, text: None, text_is_whole: false, answer };
        turn(&mut session, 1, vec![1, 2, 3], content);
        let end = if after[2] == 3 { 3 } else { 2 };
        turn(&mut session, 2, after, added(None));
        let start = session.start(&request(InputKind::Chat)).unwrap();
        assert_eq!(start.answer, Some(AnswerEnd { message: 1, tokens: end, text_bytes: None }));
        assert!(start.is_whole);
    }
}

#[test]
fn what_is_known_of_a_text_ends_before_an_answer_that_was_cut() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], chat("ab"));
    let answer = Some(AnswerStart { tokens: 3, text_bytes: Some(3), ..AnswerStart::default() });
    let (messages, text) = (vec![Message::text(Role::Assistant, "d")], Some("abcd".into()));
    turn(
        &mut session,
        2,
        vec![1, 2, 3, 4, 5],
        TurnContent::Chat { messages, text, text_is_whole: false, answer },
    );
    let start = session.start(&request(InputKind::Chat)).unwrap();
    assert_eq!((start.text, &*start.known), (None, "abc"));
}

#[test]
fn tokens_of_another_tokenizer_are_compared_with_none() {
    let mut session = session();
    let (old, new) = (TokenizerHash([1; 32]), TokenizerHash([2; 32]));
    session.begin(TurnId(1), &request(InputKind::Chat), NOW).unwrap();
    session.note_tokenizer(TurnId(1), old);
    assert!(session.commit(TurnId(1), [1, 2].into(), chat("ab"), NOW));
    let start = session.begin(TurnId(2), &request(InputKind::Chat), NOW).unwrap();
    assert!(start.is_of(old) && !start.is_of(new));
    session.note_tokenizer(TurnId(9), new);
    assert_eq!(session.tokenizer, Some(old), "a turn that does not run changes nothing");
    session.note_tokenizer(TurnId(2), new);
    assert!(session.commit(TurnId(2), [1, 2, 3].into(), chat("abc"), NOW));
    session.truncate_turns(1, NOW).unwrap();
    let start = session.begin(TurnId(3), &request(InputKind::Chat), NOW).unwrap();
    assert!(start.tokens.is_empty() && start.text.is_none() && !start.is_whole);
}

#[test]
fn a_session_cut_back_to_a_rewritten_turn_does_not_hold_it_whole() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2, 3], chat("abc"));
    turn(&mut session, 2, vec![1, 2, 9, 9], chat("abXY"));
    let start = session.begin(TurnId(3), &request(InputKind::Chat), NOW).unwrap();
    assert!(start.is_whole);
    session.roll_back(TurnId(3), NOW);
    session.truncate_turns(1, NOW).unwrap();
    assert!(!session.begin(TurnId(4), &request(InputKind::Chat), NOW).unwrap().is_whole);
}

#[test]
fn a_turn_after_tokens_of_unknown_text_forgets_no_earlier_text() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], chat("ab"));
    for (id, tokens) in [(2, vec![1, 2, 3]), (3, vec![1, 2, 3, 4])] {
        let TurnContent::Chat { messages, .. } = chat("") else { unreachable!() };
        let content = TurnContent::Chat { messages, text: None, text_is_whole: true, answer: None };
        turn(&mut session, id, tokens, content);
        let start = session.start(&request(InputKind::Chat)).unwrap();
        assert!(start.text.is_none() && start.is_whole);
    }
    session.truncate_turns(1, NOW).unwrap();
    let start = session.begin(TurnId(4), &request(InputKind::Chat), NOW).unwrap();
    assert_eq!((start.text.as_deref(), start.is_whole), (Some("ab"), true));
}

#[test]
fn a_request_overrides_the_history_of_its_session_and_a_fork_inherits_it() {
    let session = session().with_history(History::Append);
    let fork = session.fork(SessionKey { owner: "uid:1".into(), name: "f".into() }, NOW);
    assert_eq!(fork.view().history, History::Append);
    let history = |request: &TurnRequest| fork.start(request).unwrap().history;
    assert_eq!(history(&request(InputKind::Chat)), History::Append);
    let rerender = TurnRequest { history: Some(History::Rerender), ..request(InputKind::Chat) };
    assert_eq!(history(&rerender), History::Rerender);
}

#[test]
fn a_turn_and_a_fork_share_what_the_session_holds() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], chat("ab"));
    let start = session.begin(TurnId(2), &request(InputKind::Chat), NOW).unwrap();
    assert!(Arc::ptr_eq(&start.tokens, session.tokens()));
    assert!(Arc::ptr_eq(&start.messages[0], &session.messages()[0]));
    assert!(Arc::ptr_eq(start.text.as_ref().unwrap(), &session.text));
    let fork = session.fork(SessionKey { owner: "uid:1".into(), name: "f".into() }, NOW);
    assert!(Arc::ptr_eq(fork.tokens(), session.tokens()));
}

#[test]
fn an_answer_is_cut_to_the_text_of_its_remaining_tokens() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], answered("ab", 1));
    turn(&mut session, 2, vec![1, 2, 3, 4, 5, 6], answered("abcdef", 3));
    let cut = session.truncate_tokens(5, NOW).unwrap().unwrap();
    assert_eq!((cut.remaining(), session.tokens().len()), (&[4, 5][..], 6));
    assert_eq!(session.cut_answer(&cut, said("de"), NOW), Ok(true));
    assert_eq!(texts(&session), ["q", "b", "q", "de"]);
    let start = session.begin(TurnId(3), &request(InputKind::Chat), NOW).unwrap();
    assert_eq!((start.text.as_deref(), &*start.tokens), (Some("abcde"), &[1, 2, 3, 4, 5][..]));
    session.roll_back(TurnId(3), NOW);
    // Cut again, to one token, then to none: the messages of the turn stay without the answer.
    let cut = session.truncate_tokens(4, NOW).unwrap().unwrap();
    assert_eq!(session.cut_answer(&cut, said("d"), NOW), Ok(true));
    assert_eq!(session.truncate_tokens(3, NOW), Ok(None));
    assert_eq!((texts(&session), session.tokens().len()), (vec!["q".into(), "b".into(), "q".into()], 3));
    let start = session.begin(TurnId(4), &request(InputKind::Chat), NOW).unwrap();
    assert_eq!(start.text.as_deref(), Some("abc"));
}

#[test]
fn a_cut_before_an_answer_leaves_tokens_without_a_text() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], answered("ab", 1));
    turn(&mut session, 2, vec![1, 2, 3, 4, 5, 6], answered("abcdef", 1));
    assert_eq!(session.truncate_tokens(4, NOW), Ok(None));
    assert_eq!((texts(&session), session.view().turns.len()), (vec!["q".into(), "b".into()], 2));
    let start = session.begin(TurnId(3), &request(InputKind::Chat), NOW).unwrap();
    assert_eq!((start.text, &*start.tokens), (None, &[1, 2, 3, 4][..]));
    session.roll_back(TurnId(3), NOW);
    session.truncate_turns(1, NOW).unwrap();
    let start = session.begin(TurnId(4), &request(InputKind::Chat), NOW).unwrap();
    assert_eq!(start.text.as_deref(), Some("ab"));
}

#[test]
fn a_cut_that_the_session_has_moved_away_from_is_not_done() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2, 3], answered("abc", 2));
    let cut = session.truncate_tokens(2, NOW).unwrap().unwrap();
    turn(&mut session, 2, vec![1, 2, 3, 4], answered("abcd", 1));
    let before = session.clone();
    assert_eq!(session.cut_answer(&cut, said("b"), NOW), Ok(false));
    assert_eq!(session, before);
    session.begin(TurnId(3), &request(InputKind::Chat), NOW).unwrap();
    assert_eq!(session.cut_answer(&cut, said("b"), NOW), Err(Error::SessionBusy("s".into())));
}

#[test]
fn messages_are_cut_at_the_end_of_a_turn_or_before_an_answer() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2], answered("ab", 1));
    turn(&mut session, 2, vec![1, 2, 3, 4], answered("abcd", 1));
    turn(&mut session, 3, vec![1, 2, 3, 4, 5], TurnContent::Raw);
    let mut cut = |messages| {
        session.truncate_messages(messages, NOW).map(|()| (texts(&session).len(), session.tokens().len()))
    };
    assert!(matches!(cut(5), Err(Error::InvalidField { field, .. }) if field == "message_count"));
    // The raw turn is no longer there.
    assert_eq!((cut(4), cut(3), cut(2), cut(0)), (Ok((4, 4)), Ok((3, 3)), Ok((2, 2)), Ok((0, 0))));
}

#[test]
fn messages_are_not_cut_within_a_turns_input() {
    let mut session = session();
    let TurnContent::Chat { mut messages, text, text_is_whole, answer } = answered("abc", 1) else {
        unreachable!()
    };
    messages.insert(0, Message::text(Role::System, "s"));
    turn(&mut session, 1, vec![1, 2, 3], TurnContent::Chat { messages, text, text_is_whole, answer });
    let before = session.clone();
    assert!(session.truncate_messages(1, NOW).is_err());
    assert_eq!(session, before);
    session.truncate_messages(2, NOW).unwrap();
    assert_eq!(texts(&session), ["s", "q"]);
}

#[test]
fn a_raw_turn_may_be_cut_inside() {
    let mut session = session();
    turn(&mut session, 1, vec![1, 2, 3], TurnContent::Raw);
    session.truncate_tokens(2, NOW).unwrap();
    assert_eq!((&**session.tokens(), session.view().turns.len()), (&[1, 2][..], 1));
    session.truncate_tokens(0, NOW).unwrap();
    assert!(session.begin(TurnId(2), &request(InputKind::Chat), NOW).is_ok());
}

#[test]
fn the_lease_counts_from_the_last_use_and_not_while_a_turn_runs() {
    let mut session = session();
    let late = NOW + Duration::from_secs(60);
    assert!(!session.is_expired(NOW + Duration::from_secs(59)));
    assert!(session.is_expired(late));
    session.begin(TurnId(1), &request(InputKind::Raw), NOW).unwrap();
    assert!(!session.is_expired(late));
    session.roll_back(TurnId(1), late);
    assert!(!session.is_expired(late));
}

#[derive(Clone, Debug)]
enum Step {
    Chat { keep: usize, add: Vec<u32>, answer: bool },
    Raw(Vec<u32>),
    RollBack(InputKind),
    TruncateTurns(usize),
    TruncateTokens(usize),
    TruncateMessages(usize),
    Fork,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let tokens = || prop::collection::vec(0_u32..2, 1..4);
    let kind = prop_oneof![Just(InputKind::Chat), Just(InputKind::Raw)];
    let step = prop_oneof![
        (0_usize..12, tokens(), any::<bool>()).prop_map(|(keep, add, answer)| Step::Chat {
            keep,
            add,
            answer
        }),
        tokens().prop_map(Step::Raw),
        kind.prop_map(Step::RollBack),
        (0_usize..6).prop_map(Step::TruncateTurns),
        (0_usize..12).prop_map(Step::TruncateTokens),
        (0_usize..12).prop_map(Step::TruncateMessages),
        Just(Step::Fork),
    ];
    prop::collection::vec(step, 1..24)
}

/// One letter a token, so that text and tokens can be compared.
fn text_of(tokens: &[u32]) -> String {
    tokens.iter().map(|token| if *token == 0 { 'a' } else { 'b' }).collect()
}

fn apply(session: &mut Session, id: u64, step: Step) {
    match step {
        Step::Chat { keep, add, answer } => {
            let Ok(start) = session.begin(TurnId(id), &request(InputKind::Chat), NOW) else { return };
            let mut tokens = start.tokens.to_vec();
            tokens.truncate(tokens.len().min(keep));
            tokens.extend(add);
            let text = text_of(&tokens);
            let content = if answer { answered(&text, 1) } else { chat(&text) };
            assert!(session.commit(TurnId(id), tokens.into(), content, NOW));
        }
        Step::Raw(add) => {
            let start = session.begin(TurnId(id), &request(InputKind::Raw), NOW).unwrap();
            let tokens = joined(&start.tokens, &add);
            assert!(session.commit(TurnId(id), tokens, TurnContent::Raw, NOW));
        }
        Step::RollBack(input) => {
            let before = session.clone();
            if session.begin(TurnId(id), &request(input), NOW).is_ok() {
                session.roll_back(TurnId(id), NOW);
            }
            assert_eq!(*session, before);
        }
        Step::TruncateTurns(count) => drop(session.truncate_turns(count, NOW)),
        Step::TruncateTokens(count) => {
            if let Ok(Some(cut)) = session.truncate_tokens(count, NOW) {
                let text = text_of(cut.remaining());
                assert_eq!(session.cut_answer(&cut, said(&text), NOW), Ok(true));
            }
        }
        Step::TruncateMessages(count) => drop(session.truncate_messages(count, NOW)),
        Step::Fork => {
            let key = SessionKey { owner: "uid:1".into(), name: format!("f{id}").into() };
            *session = session.fork(key, NOW);
        }
    }
}

proptest! {
    #[test]
    fn turns_tokens_and_text_always_agree(steps in steps()) {
        let mut session = session();
        for (id, step) in steps.into_iter().enumerate() {
            apply(&mut session, id as u64, step);
            let turns = &session.turns;
            prop_assert!(turns.is_sorted_by_key(|turn| turn.token_count));
            prop_assert!(turns.is_sorted_by_key(|turn| turn.message_count));
            prop_assert_eq!(turns.last().map_or(0, |turn| turn.token_count), session.tokens.len());
            prop_assert_eq!(turns.last().map_or(0, |turn| turn.message_count), session.messages.len());
            for turn in turns {
                if let Some(bytes) = turn.text_bytes {
                    prop_assert_eq!(text_of(&session.tokens[..turn.token_count]), &session.text[..bytes]);
                }
                if let Some(AnswerStart { tokens, text_bytes, .. }) = turn.answer {
                    prop_assert!(tokens <= turn.token_count);
                    if let Some(bytes) = text_bytes {
                        prop_assert_eq!(text_of(&session.tokens[..tokens]), &session.text[..bytes]);
                    }
                    let answer = session.messages[turn.message_count - 1].joined_text();
                    prop_assert_eq!(text_of(&session.tokens[tokens..turn.token_count]), answer);
                }
            }
        }
    }
}
