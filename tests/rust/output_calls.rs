//! Outputs with calls in each format, whole and cut at every character. The record, which says what other
//! implementations read, is written by tests/python/support/tool_calls.py.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::sync::Arc;

use mlxd::output::{Collected, Format, Parser, Reasoning, Start, Syntax, Tool};
use serde_json::{Value, json};

fn record() -> Value {
    serde_json::from_str(include_str!("output_calls.json")).unwrap()
}

fn tools(record: &Value) -> Arc<[Tool]> {
    let tools = record["tools"].as_array().unwrap().iter().map(|tool| Tool {
        name: tool["function"]["name"].as_str().unwrap().into(),
        description: tool["function"]["description"].as_str().unwrap().into(),
        parameters: tool["function"]["parameters"].clone(),
    });
    tools.collect()
}

fn parser(case: &Value, tools: &Arc<[Tool]>) -> Parser {
    let format = Format::from_name(case["format"].as_str().unwrap());
    let reasoning = if format == Some(Format::Harmony) { Reasoning::Harmony } else { Reasoning::Think };
    Parser::new(Syntax { format, reasoning: Some(reasoning) }, tools.clone(), Start::Text)
}

/// Reads an output in two parts.
fn read(mut parser: Parser, output: &str, at: usize) -> Collected {
    let mut pieces = parser.push(&output[..at]);
    pieces.extend(parser.push(&output[at..]));
    pieces.extend(parser.finish(false));
    Collected::of(&pieces)
}

fn calls(collected: &Collected) -> Value {
    let calls = collected.calls.iter().map(|call| {
        let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
        json!({ "name": call.name, "arguments": arguments })
    });
    calls.collect()
}

#[test]
fn recorded_outputs_are_read_as_they_were_written() {
    let record = record();
    let tools = tools(&record);
    let mut wrong = Vec::new();
    for case in record["cases"].as_array().unwrap() {
        let output = case["output"].as_str().unwrap();
        let collected = read(parser(case, &tools), output, 0);
        if calls(&collected) != case["written"] {
            wrong.push(format!("{} {}\n  {output}\n  {collected:?}", case["format"], case["case"]));
        }
        if !case["case"].as_str().unwrap().starts_with("odd") && !collected.text.is_empty() {
            wrong.push(format!("{} leaks: {:?}", case["case"], collected.text));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn recorded_outputs_are_the_same_wherever_they_are_cut() {
    let record = record();
    let tools = tools(&record);
    for case in record["cases"].as_array().unwrap() {
        let output = case["output"].as_str().unwrap();
        let whole = read(parser(case, &tools), output, 0);
        for at in (0..output.len()).filter(|at| output.is_char_boundary(*at)) {
            assert_eq!(read(parser(case, &tools), output, at), whole, "{} cut at {at}", case["case"]);
        }
        let mut characters = parser(case, &tools);
        let parts = output.chars().flat_map(|c| characters.push(c.encode_utf8(&mut [0; 4])));
        let mut pieces: Vec<_> = parts.collect();
        pieces.extend(characters.finish(false));
        assert_eq!(Collected::of(&pieces), whole, "{}", case["case"]);
    }
}

#[test]
fn prose_around_calls_stays_text() {
    let record = record();
    let tools = tools(&record);
    for case in record["cases"].as_array().unwrap() {
        let bare = case["format"] == "harmony" || case["case"].as_str().unwrap().starts_with("odd");
        if bare {
            continue;
        }
        let output = format!("<think>\nHm.\n</think>\n\nLet me look.\n{}", case["output"].as_str().unwrap());
        let collected = read(parser(case, &tools), &output, 0);
        assert_eq!(calls(&collected), case["written"], "{}", case["case"]);
        let texts = (collected.reasoning.as_str(), collected.text.as_str());
        assert_eq!(texts, ("Hm.", "Let me look.\n"), "{}", case["case"]);
    }
}

#[test]
fn a_recorded_output_cut_short_by_a_limit_leaks_nothing() {
    let record = record();
    let tools = tools(&record);
    for case in record["cases"].as_array().unwrap() {
        let output = case["output"].as_str().unwrap();
        let written = case["written"].as_array().unwrap();
        if case["case"].as_str().unwrap().starts_with("odd") {
            continue;
        }
        let format = Format::from_name(case["format"].as_str().unwrap()).unwrap();
        for at in (1..output.len()).filter(|at| output.is_char_boundary(*at)) {
            let mut parser = parser(case, &tools);
            let mut pieces = parser.push(&output[..at]);
            pieces.extend(parser.finish(true));
            let collected = Collected::of(&pieces);
            let whole = calls(&collected);
            let whole = whole.as_array().unwrap();
            assert!(written.starts_with(whole), "{} cut at {at}: {whole:?}", case["case"]);
            // What may still have been text is text.
            let mut markers = format.markers().iter().chain(&["functools["]);
            let begun = markers.any(|marker| marker.starts_with(collected.text.trim()));
            assert!(begun, "{} cut at {at}: {:?}", case["case"], collected.text);
        }
    }
}
