//! What holds for every output: it does not matter how it is split, nothing is lost, nothing leaks, and what
//! is held is bounded.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

fn tools() -> Arc<[Tool]> {
    let parameters = json!({ "type": "object", "properties": { "n": { "type": "integer" } } });
    Arc::new([Tool { name: "f".into(), description: String::new(), parameters }])
}

fn read(parser: &Parser, parts: &[&str], by_length: bool) -> Vec<Piece> {
    let mut parser = parser.clone();
    let mut pieces: Vec<Piece> = parts.iter().flat_map(|part| parser.push(part)).collect();
    pieces.extend(parser.finish(by_length));
    pieces
}

/// What pieces say with all that may be split put together.
fn joined(pieces: &[Piece]) -> Vec<Piece> {
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        match (joined.last_mut(), piece) {
            (Some(Piece::Text(last)), Piece::Text(text)) => last.push_str(text),
            (Some(Piece::Reasoning(last)), Piece::Reasoning(text)) => last.push_str(text),
            (Some(Piece::CallArguments { fragment, .. }), Piece::CallArguments { fragment: next, .. }) => {
                fragment.push_str(next);
            }
            _ => joined.push(piece.clone()),
        }
    }
    joined
}

/// Whether each call begins, goes on and ends in order.
fn in_order(pieces: &[Piece]) -> bool {
    let (mut open, mut ended) = (None, 0);
    pieces.iter().all(|piece| match piece {
        Piece::Text(text) | Piece::Reasoning(text) => open.is_none() && !text.is_empty(),
        Piece::CallBegin { index, .. } => open.replace(*index).is_none() && *index == ended,
        Piece::CallArguments { index, .. } => open == Some(*index),
        Piece::CallDropped { index, .. } => open.take() == Some(*index),
        Piece::CallEnd { index } => {
            ended += 1;
            open.take() == Some(*index)
        }
    }) && open.is_none()
}

fn a_syntax() -> impl Strategy<Value = Syntax> {
    let format = prop::option::of(prop::sample::select(Format::ALL));
    let reasoning = prop::option::of(prop::sample::select(Reasoning::ALL));
    (format, reasoning).prop_map(|(format, reasoning)| Syntax { format, reasoning })
}

/// Outputs of markers, halves of markers, JSON and other text.
fn an_output() -> impl Strategy<Value = String> {
    let formats = Format::ALL.iter().flat_map(|format| format.markers().iter().chain(format.openers()));
    let ways = Reasoning::ALL.iter().flat_map(|way| way.markers());
    let mut words: Vec<String> = formats.chain(ways).map(|word| (*word).to_owned()).collect();
    let json = r#"{"name": "f", "arguments": {"n": 1}} { } [ ] , ; " ' \ "name" "arguments" : f functions.f:0 call:f{
        n:1} f(n=1) to=functions.f analysis final <function=f> </function> <parameter=n> </parameter> <invoke
        name="f"> </invoke> <parameter name="n"> ```json ``` function thought é 😀 \u0041 \ud800"#;
    words.extend(json.split_whitespace().map(str::to_owned));
    words.extend(["\n", " ", "\n\n", "{\"name\": \"f\", \"arguments\": {\"n\": 1}}"].map(str::to_owned));
    let word = (prop::sample::select(words), 0..4_usize).prop_map(|(word, cut)| {
        let half = word.chars().count() / 2;
        if cut == 0 { word.chars().take(half).collect() } else { word }
    });
    prop::collection::vec(word, 0..24).prop_map(|words| words.concat())
}

/// A JSON object that may be arguments.
fn arguments() -> impl Strategy<Value = Map<String, Value>> {
    let text = "(<tool_call>|</tool_call>|\\PC|[\\n\\t\"\\\\{}]){0,8}";
    let leaf = prop_oneof![
        text.prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        Just(Value::Null),
    ];
    let value = leaf.prop_recursive(3, 16, 4, |inner| {
        let list = prop::collection::vec(inner.clone(), 0..4).prop_map(Value::Array);
        let object = prop::collection::btree_map("[a-z]{1,3}", inner, 0..4);
        prop_oneof![list, object.prop_map(|members| members.into_iter().collect::<Value>())]
    });
    prop::collection::btree_map("[a-z]{1,4}", value, 0..4).prop_map(|members| members.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn how_an_output_is_split_does_not_matter(
        (syntax, output) in (a_syntax(), an_output()),
        reasons in any::<bool>(),
        by_length in any::<bool>(),
        at in any::<prop::sample::Index>(),
    ) {
        let start = if reasons { Start::Reasoning } else { Start::Text };
        let parser = Parser::new(syntax, tools(), start).with_call_bytes_max(200);
        let whole = joined(&read(&parser, &[&output], by_length));
        prop_assert!(in_order(&whole), "{whole:?}");
        let characters: Vec<String> = output.chars().map(String::from).collect();
        let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
        prop_assert_eq!(&joined(&read(&parser, &characters, by_length)), &whole);
        let middle = (0..=output.len()).filter(|at| output.is_char_boundary(*at)).collect::<Vec<_>>();
        let (left, right) = output.split_at(middle[at.index(middle.len())]);
        prop_assert_eq!(&joined(&read(&parser, &[left, right], by_length)), &whole);
        let collected = Collected::of(&whole);
        prop_assert!(collected.text.len() <= output.len());
        // Without reasoning and calls, all is text; harmony's markup is dropped without a call.
        let plain = syntax.reasoning.is_none() && syntax.format != Some(Format::Harmony) && !by_length;
        if plain && collected.calls.is_empty() {
            prop_assert_eq!(&collected.text, &output);
        }
    }

    #[test]
    fn without_a_syntax_an_output_is_its_text(output in an_output(), by_length in any::<bool>()) {
        let parser = Parser::new(Syntax::default(), tools(), Start::Text);
        let wanted: Vec<Piece> = if output.is_empty() { Vec::new() } else { vec![Piece::Text(output.clone())] };
        prop_assert_eq!(joined(&read(&parser, &[&output], by_length)), wanted);
    }

    #[test]
    fn text_without_markers_is_verbatim(syntax in a_syntax(), output in "[a-zA-Z .,é😀\n]{0,60}") {
        let said = Collected::of(&read(&Parser::new(syntax, tools(), Start::Text), &[&output], false));
        prop_assert_eq!((said.text, said.reasoning, said.calls.len()), (output, String::new(), 0));
    }

    #[test]
    fn any_text_is_read(syntax in a_syntax(), output in "\\PC{0,80}") {
        prop_assert!(in_order(&read(&Parser::new(syntax, tools(), Start::Text), &[&output], false)));
    }

    #[test]
    fn calls_in_json_come_out_as_they_went_in(arguments in arguments(), spaced in any::<bool>()) {
        let object = if spaced {
            serde_json::to_string_pretty(&arguments).unwrap()
        } else {
            serde_json::to_string(&arguments).unwrap()
        };
        let call = format!("{{\"name\": \"f\", \"arguments\": {object}}}");
        let outputs = [
            (Format::Hermes, format!("a<tool_call>\n{call}\n</tool_call>\n<tool_call>{call}</tool_call>b")),
            (Format::Nemotron, format!("a<TOOLCALL>[{call}, {call}]</TOOLCALL>b")),
            (Format::Phi4, format!("afunctools[{call},{call}]b")),
            (Format::Mistral, format!("a[TOOL_CALLS][{call}, {call}]b")),
            (Format::Mistral, format!("a[TOOL_CALLS]f[ARGS]{object}[TOOL_CALLS]f{object}b")),
            (Format::KimiK2, format!("a<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0\
                <|tool_call_argument_begin|>{object}<|tool_call_end|><|tool_call_begin|>functions.f:1\
                <|tool_call_argument_begin|>{object}<|tool_call_end|><|tool_calls_section_end|>b")),
        ];
        for (format, output) in outputs {
            let parser = Parser::new(Syntax { format: Some(format), reasoning: None }, tools(), Start::Text);
            let collected = Collected::of(&read(&parser, &[&output], false));
            prop_assert_eq!((collected.text.as_str(), collected.calls.len()), ("ab", 2), "{}", output);
            for call in collected.calls {
                let read: Map<String, Value> = serde_json::from_str(&call.arguments).unwrap();
                prop_assert_eq!((call.name.as_str(), &read), ("f", &arguments));
            }
        }
    }
}

#[test]
fn long_outputs_take_linear_time() {
    // Each marker opens a block that breaks at its end: whatever is read again must be bounded.
    for (format, unit) in [
        (Format::Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"<tool_call>"),
        (Format::DeepseekV31, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f"),
        (Format::Qwen3Coder, "<tool_call><function=f><parameter="),
    ] {
        let output = unit.repeat(20_000);
        let parser = Parser::new(Syntax { format: Some(format), reasoning: None }, tools(), Start::Text);
        let collected = Collected::of(&read(&parser, &[&output], false));
        assert_eq!(collected.text, output);
    }
}
