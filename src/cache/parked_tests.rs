//! What is found of parked caches, and what is evicted.

use std::time::Duration;

use super::*;
use crate::cache::entry::Salt;
use crate::cache::transcript::tests::COMPARED;
use crate::clock::{Clock as _, SystemClock};
use crate::ids::Principal;
use crate::prompt::{MediaSpan, Prompt};

fn at(seconds: u64) -> Moment {
    Moment::at(Duration::from_secs(seconds))
}

fn key(owner: &str) -> CacheKey {
    CacheKey { owner: Principal::from(owner), salt: Salt::default() }
}

fn of(tokens: &[u32]) -> Transcript {
    Transcript::new(tokens.to_vec().into())
}

fn cache(id: u64, owner: &str, tokens: &[u32], used: u64) -> CacheEntry {
    CacheEntry {
        id: ParkedId(id),
        key: key(owner),
        session: None,
        rank: Rank::Anonymous,
        transcript: of(tokens),
        checkpoints: None,
        used: at(used),
    }
}

fn parked(caches: &[(u64, &str, &[u32], u64)]) -> Parked {
    let mut parked = Parked::new(10, 0);
    for (id, owner, tokens, used) in caches {
        parked.insert(cache(*id, owner, tokens, *used), None);
    }
    parked
}

#[test]
fn the_longest_common_prefix_of_the_owner_wins() {
    let mut parked =
        parked(&[(0, "a", &[1, 2, 3, 9], 0), (1, "a", &[1, 2, 4], 0), (2, "b", &[1, 2, 3, 4], 0)]);
    let hit = parked.find(&key("a"), &of(&[1, 2, 3, 4, 5]), 9, at(1));
    assert_eq!(hit, Some(Hit { id: ParkedId(0), tokens: 3 }));
    assert_eq!(parked.find(&key("c"), &of(&[1, 2, 3]), 9, at(1)), None);
    assert_eq!(parked.find(&key("a"), &of(&[7]), 9, at(1)), None);
}

#[test]
fn a_cache_of_another_salt_is_another_cache() {
    let mut parked = parked(&[(0, "a", &[1, 2, 3], 0)]);
    let salted = CacheKey { salt: Salt([1; 32]), ..key("a") };
    assert_eq!(parked.find(&salted, &of(&[1, 2, 3]), 9, at(1)), None);
    assert_eq!(parked.longest(&salted, &of(&[1, 2, 3]), 9), 0);
    assert!(!parked.covers(&salted, &of(&[1, 2]), 2, None));
    assert_eq!(parked.insert(CacheEntry { key: salted, ..cache(1, "a", &[1, 2, 3, 4], 1) }, None), []);
}

/// Tokens 9 in places 2..5 stand for an image.
fn with_image(hash: u8, end: &[u32]) -> Transcript {
    let tokens: Vec<u32> = [&[1, 2, 9, 9, 9], end].concat();
    let media = [MediaSpan { at: 2, len: 3, hash: [hash; 32] }];
    Transcript::new(Prompt { tokens: tokens.into(), media: media.into() })
}

#[test]
fn equal_placeholders_of_another_image_do_not_match() {
    let mut parked = Parked::new(10, 0);
    parked.insert(CacheEntry { transcript: with_image(7, &[3, 4]), ..cache(0, "a", &[], 0) }, None);
    let mut found =
        |wanted: &Transcript, most| parked.find(&key("a"), wanted, most, at(1)).map_or(0, |hit| hit.tokens);
    assert_eq!(found(&with_image(7, &[3, 5]), 9), 6);
    assert_eq!(found(&with_image(8, &[3, 4]), 9), 2, "up to the image");
    assert_eq!(found(&of(&[1, 2, 9, 9, 9, 3, 4]), 9), 2, "text that looks like an image is none");
    assert_eq!(found(&with_image(7, &[]), 4), 2, "an image runs whole or not at all");
    assert_eq!(found(&with_image(7, &[]), 5), 5);
    assert!(parked.covers(&key("a"), &with_image(7, &[3]), 6, None));
    assert!(!parked.covers(&key("a"), &with_image(8, &[3]), 6, None));
}

#[test]
fn a_cache_that_ends_within_an_image_is_used_up_to_it() {
    let mut parked = Parked::new(10, 100);
    let entry = CacheEntry { transcript: with_image(7, &[3, 4]).first(4), ..cache(0, "a", &[], 0) };
    parked.insert(entry.clone(), None);
    assert_eq!(parked.longest(&key("a"), &with_image(7, &[3, 4]), 9), 2);
    let mut recurrent = Parked::new(10, 100);
    recurrent.insert(CacheEntry { checkpoints: Some(vec![1, 4]), ..entry }, None);
    assert_eq!(recurrent.longest(&key("a"), &with_image(7, &[3, 4]), 9), 1);
}

#[test]
fn a_longer_cache_replaces_its_prefixes() {
    let mut parked = parked(&[(0, "a", &[1, 2], 0), (1, "b", &[1, 2], 0)]);
    let gone = parked.insert(cache(2, "a", &[1, 2, 3], 1), None);
    assert_eq!(gone, vec![ParkedId(0)]);
    assert_eq!(parked.bytes(), 50);
    assert!(parked.covers(&key("a"), &of(&[1, 2]), 2, None));
}

#[test]
fn recurrent_states_are_restored_at_their_checkpoints_only() {
    let saved = |id, tokens: &[u32], checkpoints: &[u32]| CacheEntry {
        checkpoints: Some(checkpoints.to_vec()),
        ..cache(id, "a", tokens, 0)
    };
    let mut parked = Parked::new(10, 100);
    parked.insert(saved(0, &[1, 2, 3, 4, 5], &[2, 5]), None);
    assert_eq!(parked.bytes(), 250);
    let a = key("a");
    let mut tokens = |tokens: &[u32], most| parked.find(&a, &of(tokens), most, at(1)).map(|hit| hit.tokens);
    assert_eq!(tokens(&[1, 2, 3, 4, 5, 6], 9), Some(5));
    assert_eq!(tokens(&[1, 2, 3, 4, 5], 4), Some(2), "one token has to run");
    assert_eq!(tokens(&[1, 2, 3, 9], 9), Some(2));
    assert_eq!(tokens(&[1, 9], 9), None);
    assert_eq!(parked.checkpoints_up_to(ParkedId(0), 4), [2]);
    assert!(!parked.covers(&a, &of(&[1, 2, 3]), 3, Some(&[2, 3])));
    assert_eq!(
        parked.insert(saved(1, &[1, 2, 3, 4, 5, 6], &[2, 6]), None),
        [],
        "its last checkpoint is not there"
    );
    assert_eq!(parked.insert(saved(2, &[1, 2, 3, 4, 5, 6, 7], &[5, 6, 7]), None), [ParkedId(1), ParkedId(0)]);
}

#[test]
fn the_least_recently_used_is_evicted_first() {
    let mut parked = parked(&[(0, "a", &[1], 3), (1, "a", &[2], 1), (2, "a", &[3], 2)]);
    assert_eq!(parked.evict(11, Some(ParkedId(1))), vec![ParkedId(0), ParkedId(2)]);
    assert_eq!(parked.evict(1, None), vec![ParkedId(1)]);
    assert_eq!(parked.evict(1, None), vec![]);
}

#[test]
fn no_more_than_the_limit_are_kept() {
    let mut parked = parked(&[(0, "a", &[1], 3), (1, "a", &[2], 1), (2, "b", &[3], 2)]);
    assert_eq!(ids(&parked.keep(3)), vec![]);
    assert_eq!(ids(&parked.keep(1)), vec![ParkedId(1), ParkedId(2)]);
    assert_eq!((parked.bytes(), parked.first_to_go()), (10, Some((Rank::Anonymous, at(3)))));
}

/// A thousand conversations that begin with the same 40 tokens.
fn a_thousand() -> (Parked, impl Fn(u32) -> Vec<u32>) {
    let conversation = |number: u32| {
        let own = (0..20).map(move |place| number * (place + 7) % 1009);
        (0..40).chain(own).collect::<Vec<u32>>()
    };
    let mut parked = Parked::new(10, 0);
    for number in 0..1000 {
        parked.insert(cache(u64::from(number), "a", &conversation(number), u64::from(number)), None);
    }
    (parked, conversation)
}

#[test]
fn a_turn_looks_at_few_of_many_caches() {
    let (mut parked, conversation) = a_thousand();
    let next = [conversation(700), vec![1, 2, 3]].concat();
    let found = compared(|| {
        let hit = parked.find(&key("a"), &of(&next), 99, at(2000));
        assert_eq!(hit, Some(Hit { id: ParkedId(700), tokens: 60 }));
    });
    let covered = compared(|| assert!(!parked.covers(&key("a"), &of(&next), 63, None)));
    let replaced = compared(|| {
        assert_eq!(parked.insert(cache(1000, "a", &next, 2000), None), [ParkedId(700)]);
    });
    assert!(found + covered + replaced < 100, "{found} + {covered} + {replaced} comparisons");
    assert_eq!(parked.bytes(), 10 * (999 * 60 + 63));
}

const COMMON: u32 = 7_900;
const LONG: u32 = 8_000;

/// Conversations of 8,000 tokens whose first 7,900 are the same; of `states` that are saved there, if any.
fn many(count: u64, states: Option<&[u32]>) -> (Parked, impl Fn(u64) -> CacheEntry) {
    let prompt: Prompt = (0..COMMON).collect::<Vec<u32>>().into();
    let states = states.map(<[u32]>::to_vec);
    let conversation = move |number: u64| {
        let mut transcript = Transcript::new(prompt.clone());
        let own = u32::try_from(number).unwrap();
        (COMMON..LONG).for_each(|place| transcript.push(own * 31 % 10_007 + place % 7));
        CacheEntry { transcript, checkpoints: states.clone(), ..cache(number, "a", &[], number) }
    };
    let mut parked = Parked::new(10, 1);
    for number in 0..count {
        assert_eq!(parked.insert(conversation(number), None), []);
    }
    (parked, conversation)
}

fn compared(act: impl FnOnce()) -> usize {
    COMPARED.set(0);
    act();
    COMPARED.get()
}

#[test]
fn a_search_among_many_that_begin_alike_compares_few() {
    // Of recurrent caches none can be cut back to where a request parts from it: each may be the best.
    for states in [None, Some(&[100, LONG][..])] {
        let (mut parked, conversation) = many(1000, states);
        let wanted = conversation(5000);
        let usable = states.map_or(COMMON, |states| states[0]);
        let found = compared(|| {
            let hit = parked.find(&key("a"), &wanted.transcript, LONG, at(9999)).unwrap();
            assert!(hit.tokens >= usable, "{hit:?}");
        });
        let covered = compared(|| assert!(!parked.covers(&key("a"), &wanted.transcript, LONG, states)));
        let inserted = compared(|| assert_eq!(parked.insert(wanted.clone(), None), []));
        assert!(found <= 14 && covered <= 14 && inserted <= 16, "{found}, {covered}, {inserted} comparisons");
    }
}

/// What is promised of a release build.
#[test]
#[ignore = "measures: `cargo test --release --lib ten_thousand -- --ignored --nocapture`"]
#[allow(clippy::print_stderr, reason = "a measurement")]
fn ten_thousand_caches_of_8000_tokens_are_searched_in_a_millisecond() {
    let clock = SystemClock::new();
    for states in [None, Some(&[100, LONG][..])] {
        let (mut parked, conversation) = many(10_000, states);
        let mut took = [Vec::new(), Vec::new(), Vec::new()];
        for number in 10_000..10_200 {
            let wanted = conversation(number);
            let before = clock.now();
            assert!(parked.find(&key("a"), &wanted.transcript, LONG, at(99_999)).is_some());
            took[0].push(clock.now() - before);
            let before = clock.now();
            parked.insert(wanted, None);
            took[1].push(clock.now() - before);
            let before = clock.now();
            assert_eq!(parked.keep(10_000).len(), 1);
            took[2].push(clock.now() - before);
        }
        let [find, insert, evict] = took.map(|mut times| {
            times.sort_unstable();
            times[times.len() / 2]
        });
        eprintln!("median: search {find:?}, insertion {insert:?}, eviction of one {evict:?}");
        assert!(find < Duration::from_millis(1), "{find:?}");
    }
}

#[test]
fn a_pinned_sessions_cache_goes_last_and_an_anonymous_one_first() {
    let session = |name: &str| SessionKey { owner: "a".into(), name: name.into() };
    let mut parked = parked(&[(0, "a", &[1, 1], 9)]);
    let of_session = |id, token, name: &str, rank, used| CacheEntry {
        session: Some(session(name)),
        rank,
        ..cache(id, "a", &[token, token], used)
    };
    parked.insert(of_session(1, 2, "pinned", Rank::Pinned, 0), None);
    parked.insert(of_session(2, 3, "s", Rank::Session, 5), None);
    parked.insert(of_session(3, 4, "t", Rank::Session, 4), None);
    assert_eq!(parked.first_to_go(), Some((Rank::Anonymous, at(9))));
    let mut all = parked.clone();
    assert_eq!([all.evict(1, None), all.evict(1, None)], [[ParkedId(0)], [ParkedId(3)]]);
    assert_eq!([all.evict(1, None), all.evict(1, None)], [[ParkedId(2)], [ParkedId(1)]]);
    // What makes a pinned session's cache redundant takes its place.
    parked.insert(cache(4, "a", &[2, 2, 2], 20), None);
    assert_eq!(parked.clone().evict(1, None), [ParkedId(0)]);
    parked.insert(of_session(1, 2, "pinned", Rank::Pinned, 0), None);
    // A session that is pinned now takes its cache with it, and one that is not any more.
    parked.set_rank(&session("t"), Rank::Pinned);
    parked.set_rank(&session("pinned"), Rank::Session);
    assert_eq!(ids(&parked.keep(2)), [ParkedId(0), ParkedId(1), ParkedId(2)]);
}

#[test]
fn what_is_kept_by_bytes_goes_in_the_order_of_eviction() {
    let mut parked = parked(&[(0, "a", &[1], 3), (1, "a", &[2, 3], 1), (2, "b", &[4, 5, 6], 2)]);
    assert_eq!(ids(&parked.keep_bytes(60)), []);
    assert_eq!(ids(&parked.keep_bytes(35)), [ParkedId(1), ParkedId(2)], "the keys' order");
    assert_eq!(parked.bytes(), 10);
}

#[test]
fn the_caches_of_sessions_are_known_those_worth_most_first() {
    let mut parked = parked(&[(0, "a", &[1], 9)]);
    for (id, first, rank, used) in
        [(1, 11, Rank::Session, 1), (2, 12, Rank::Pinned, 0), (3, 13, Rank::Session, 5)]
    {
        let session = Some(SessionKey { owner: "a".into(), name: "s".into() });
        let own = CacheEntry { session, rank, ..cache(id, "a", &[first, 1], used) };
        parked.insert(own, None);
    }
    let of_sessions = parked.of_sessions();
    assert_eq!(of_sessions.iter().map(|entry| entry.id.0).collect::<Vec<_>>(), [2, 3, 1]);
    assert_eq!(parked.bytes_of(of_sessions[0]), 20);
}

#[test]
fn a_cache_in_parts_shares_the_parts_that_another_begins_with() {
    let tokens: Vec<u32> = (0..100).collect();
    let mut parked = Parked::new(10, 0);
    parked.insert(cache(0, "a", &tokens[..80], 0), None);
    let new = cache(1, "a", &tokens, 1);
    let cut = |starts: &[u32]| parked.cut_at(&new, starts);
    assert_eq!(cut(&[0]), None, "one part is all of it");
    let base = |tokens| Base { id: ParkedId(0), tokens };
    assert_eq!(
        cut(&[0, 40, 90]),
        Some(Cut { base: base(40), copied_tokens: 80 }),
        "of 80 tokens it shares 40"
    );
    assert_eq!(cut(&[0, 80]), Some(Cut { base: base(80), copied_tokens: 0 }));
    assert_eq!(cut(&[80]), Some(Cut { base: base(80), copied_tokens: 0 }), "the part before was not read");
    assert_eq!(cut(&[90]), None, "what it continues is not there");
    assert_eq!(parked.cut_at(&cache(1, "b", &tokens, 1), &[0, 40]), None, "it is another owner's");
}
