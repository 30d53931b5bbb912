//! The stop matcher against a search of the whole text, over random cuts.

use std::sync::Arc;

use mlxd::text::{StopMatcher, StopStep};
use proptest::prelude::*;

/// The reference: of all occurrences the one that ends first, then the longest, then the first listed.
fn first_match(text: &str, stops: &[String]) -> Option<(usize, usize)> {
    let found = stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
    let found = found.filter_map(|(index, stop)| Some((index, text.find(stop.as_str())?, stop.len())));
    let best = found.min_by_key(|&(index, at, length)| (at + length, at, index));
    best.map(|(index, at, _)| (at, index))
}

/// The text cut into parts of these many characters.
fn cut(text: &str, lengths: &[usize]) -> Vec<String> {
    let characters: Vec<char> = text.chars().collect();
    let mut rest = characters.as_slice();
    let mut parts = Vec::new();
    for &length in lengths {
        let (part, later) = rest.split_at(length.min(rest.len()));
        parts.push(part.iter().collect());
        rest = later;
    }
    parts.push(rest.iter().collect());
    parts
}

fn stops(list: &[&str]) -> Arc<[String]> {
    list.iter().map(|stop| (*stop).to_owned()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn matches_what_a_search_of_the_whole_text_finds(
        text in "[abé]{0,30}",
        list in prop::collection::vec("[abé]{0,5}", 0..5),
        lengths in prop::collection::vec(0usize..6, 0..20),
    ) {
        let mut matcher = StopMatcher::new(list.clone().into());
        let expected = first_match(&text, &list);
        let mut out = String::new();
        let mut matched = None;
        for part in cut(&text, &lengths) {
            let step = matcher.push(&part);
            out.push_str(&step.emit);
            matched = matched.or(step.matched);
            let end = expected.map_or(text.len(), |(at, _)| at);
            prop_assert!(text[..end].starts_with(&out), "{:?} leaks into {:?}", out, text);
        }
        out.push_str(&matcher.finish());
        prop_assert_eq!(matched, expected.map(|(_, index)| index));
        prop_assert_eq!(out.as_str(), &text[..expected.map_or(text.len(), |(at, _)| at)]);
    }

    #[test]
    fn holds_back_no_more_than_may_match(text in "[ab]{0,20}", stop in "[ab]{1,6}") {
        let mut matcher = StopMatcher::new(Arc::new([stop.clone()]));
        let step = matcher.push(&text);
        if step.matched.is_none() {
            let held = &text[step.emit.len()..];
            let longest = (0..stop.len()).rev().find(|&length| text.ends_with(&stop[..length]));
            prop_assert_eq!(Some(held.len()), longest);
        }
    }
}

#[test]
fn a_stop_string_matches_across_parts_and_no_part_of_it_leaks() {
    let mut matcher = StopMatcher::new(stops(&["\nUser:", "</s>"]));
    assert_eq!(matcher.push("Hi\nUs"), StopStep { emit: "Hi".to_owned(), matched: None });
    assert_eq!(matcher.push("er"), StopStep::default());
    assert_eq!(matcher.push(": more"), StopStep { emit: String::new(), matched: Some(0) });
    assert_eq!(matcher.push("after"), StopStep::default());
    assert_eq!(matcher.finish(), "");
}

#[test]
fn a_partial_match_that_fails_is_emitted() {
    let mut matcher = StopMatcher::new(stops(&["\nUser:"]));
    assert_eq!(matcher.push("a\nUs").emit, "a");
    assert_eq!(matcher.push("e").emit, "");
    assert_eq!(matcher.push("d\n").emit, "\nUsed");
    assert_eq!(matcher.finish(), "\n");
}

#[test]
fn the_match_that_ends_first_wins_then_the_longest_then_the_first_listed() {
    let matched = |list: &[&str], text: &str| {
        let step = StopMatcher::new(stops(list)).push(text);
        (step.emit, step.matched)
    };
    assert_eq!(matched(&["abcd", "bc"], "xabcd"), ("xa".to_owned(), Some(1)));
    assert_eq!(matched(&["c", "abc"], "xabcd"), ("x".to_owned(), Some(1)));
    assert_eq!(matched(&["abc", "abc"], "xabcd"), ("x".to_owned(), Some(0)));
}

#[test]
fn without_stop_strings_everything_passes() {
    for list in [stops(&[]), stops(&["", ""])] {
        let mut matcher = StopMatcher::new(list);
        assert_eq!(matcher.push("a日"), StopStep { emit: "a日".to_owned(), matched: None });
        assert_eq!(matcher.finish(), "");
    }
}
