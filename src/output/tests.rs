//! What the parser makes of outputs, format by format. More outputs, compared with other implementations:
//! tests/rust/output_calls.json.

use std::sync::Arc;

use serde_json::json;

use super::*;

fn tools() -> Arc<[Tool]> {
    let parameters = json!({ "type": "object", "properties": {
        "city": { "type": "string" }, "days": { "type": "integer" }, "exact": { "type": "boolean" },
        "places": { "type": "array" }, "options": { "type": "object" } } });
    let tool =
        |name: &str| Tool { name: name.into(), description: String::new(), parameters: parameters.clone() };
    Arc::new([tool("weather"), tool("search")])
}

fn parser(format: Format, reasoning: Option<Reasoning>, start: Start) -> Parser {
    Parser::new(Syntax { format: Some(format), reasoning }, tools(), start)
}

/// Reads an output whole and character by character, which must agree.
fn read_from(mut whole: Parser, output: &str, by_length: bool) -> (Collected, Vec<Piece>) {
    let mut cut = whole.clone();
    let mut pieces = whole.push(output);
    pieces.extend(whole.finish(by_length));
    let mut characters = Vec::new();
    for c in output.chars() {
        characters.extend(cut.push(c.encode_utf8(&mut [0; 4])));
    }
    characters.extend(cut.finish(by_length));
    assert_eq!(Collected::of(&pieces), Collected::of(&characters), "{output}");
    (Collected::of(&pieces), pieces)
}

fn read(format: Format, output: &str) -> Collected {
    read_from(parser(format, None, Start::Text), output, false).0
}

fn thinking(reasoning: Reasoning, start: Start, output: &str) -> Collected {
    read_from(parser(Format::Hermes, Some(reasoning), start), output, false).0
}

/// The calls as `name{arguments}`, in one line.
fn line(collected: &Collected) -> String {
    let calls = collected.calls.iter().map(|call| {
        let arguments: serde_json::Value = serde_json::from_str(&call.arguments).unwrap();
        format!("{}{arguments}", call.name)
    });
    calls.collect::<Vec<_>>().join(" ")
}

#[track_caller]
fn assert_read(format: Format, output: &str, calls: &str, text: &str) {
    let collected = read(format, output);
    assert_eq!((line(&collected).as_str(), collected.text.as_str()), (calls, text), "{output}");
}

const PARIS: &str = r#"weather{"city":"Paris"}"#;

#[test]
fn hermes() {
    let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>";
    assert_read(Format::Hermes, call, PARIS, "");
    assert_read(Format::Prompted, call, PARIS, "");
    let text = format!("\n\n{call}\n{call}\n");
    assert_read(Format::Hermes, &text, &format!("{PARIS} {PARIS}"), "");
    let text = format!("Let me look.\n{call}\nDone.");
    assert_read(Format::Hermes, &text, PARIS, "Let me look.\n\nDone.");
    let odd =
        r#"<tool_call>{"arguments":{"city":"</tool_call> {\"a\"}"},"x":[1],"name":"weather"}</tool_call>"#;
    assert_read(Format::Hermes, odd, r#"weather{"city":"</tool_call> {\"a\"}"}"#, "");
    let text = r#"<tool_call>{"name": "weather", "arguments": "{\"city\": \"Paris\"}"}</tool_call>"#;
    assert_read(Format::Hermes, text, PARIS, "");
    assert_read(Format::Hermes, "<tool_call>{\"name\": \"weather\"}</tool_call>", "weather{}", "");
    let raw = "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"a\nb\"}}</tool_call>";
    assert_read(Format::Hermes, raw, r#"weather{"city":"a\nb"}"#, "");
}

#[test]
fn what_is_not_a_call_is_text() {
    for text in [
        "<tool_call>\nno\n</tool_call>",
        "a <tool_call",
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": NaN}}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}}</tool_call>",
        "<tool_call>{\"name\": 1}</tool_call>",
        "<tool_call>{\"name\": \"\"}</tool_call>",
        "<tool_call>{\"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"\\ud800\"}}</tool_call>",
        "<tool_call></tool_call> <tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1",
        "  \n",
    ] {
        assert_read(Format::Hermes, text, "", text);
    }
    let good = r#"<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>"#;
    assert_read(
        Format::Hermes,
        &format!("<tool_call>\n<tool_call>{good}"),
        PARIS,
        "<tool_call>\n<tool_call>",
    );
}

#[test]
fn a_call_begins_with_its_name_and_goes_out_as_it_comes() {
    let mut parser = parser(Format::Hermes, None, Start::Text);
    assert!(parser.push("<tool_call>{\"name\": \"weather\"").is_empty());
    assert!(parser.in_call());
    let begin = Piece::CallBegin { index: 0, id: None, name: "weather".into() };
    assert_eq!(parser.push(", \"arguments\": "), [begin]);
    let fragment = |text: &str| Piece::CallArguments { index: 0, fragment: text.into() };
    assert_eq!(parser.push("{\"city\": \"Pa"), [fragment("{\"city\": \"Pa")]);
    assert_eq!(parser.push("ris\"}}"), [fragment("ris\"}")]);
    assert_eq!(parser.push("</tool_call>"), [Piece::CallEnd { index: 0 }]);
    assert!(!parser.in_call());
    let _ = parser.push("<tool_call>{\"name\": \"weather\", \"arguments\": {");
    let dropped = Piece::CallDropped { index: 1, why: Dropped::Broken };
    let text = "<tool_call>{\"name\": \"weather\", \"arguments\": {]";
    assert_eq!(parser.push("]"), [dropped, Piece::Text(text.into())]);
    let _ = parser.push("<tool_call>{\"name\": \"weather\", \"arguments\": {");
    assert_eq!(parser.finish(true), [Piece::CallDropped { index: 1, why: Dropped::Cut }]);
}

#[test]
fn a_call_cut_by_a_limit_is_neither_text_nor_call() {
    let output = "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}</tool_call>";
    for length in 11..output.len() - 13 {
        let parser = parser(Format::Hermes, None, Start::Text);
        let (collected, _) = read_from(parser, &output[..length], true);
        assert_eq!((collected.text.as_str(), collected.calls.len()), ("", 0), "{length}");
    }
    let parser = parser(Format::Hermes, None, Start::Text);
    let (collected, _) = read_from(parser, &output[..output.len() - 5], true);
    assert_eq!(line(&collected), PARIS);
}

#[test]
fn a_call_that_is_too_long_is_text() {
    let parser = parser(Format::Hermes, None, Start::Text).with_call_bytes_max(60);
    let output =
        r#"<tool_call>{"name": "weather", "arguments": {"city": "Paris and many others"}}</tool_call>"#;
    let (collected, pieces) = read_from(parser, output, false);
    assert_eq!((collected.text.as_str(), collected.calls.len()), (output, 0));
    assert!(pieces.contains(&Piece::CallDropped { index: 0, why: Dropped::TooLong }));
}

#[test]
fn llama() {
    let call = r#"{"name": "weather", "parameters": {"city": "Paris"}}"#;
    assert_read(Format::Llama3Json, call, PARIS, "");
    assert_read(
        Format::Llama3Json,
        &format!("<|python_tag|>{call}; {call}"),
        &format!("{PARIS} {PARIS}"),
        "",
    );
    assert_read(Format::Llama3Json, &format!("{call} as you see"), PARIS, " as you see");
    assert_read(Format::Llama3Json, r#"{"name": "unknown"}"#, "", r#"{"name": "unknown"}"#);
    assert_read(Format::Llama3Json, &format!("It is {call}"), "", &format!("It is {call}"));
    assert_read(Format::Llama3Json, "{{\"a\"}", "", "{{\"a\"}");
}

#[test]
fn mistral() {
    let list =
        r#"[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "search"}] Done"#;
    assert_read(Format::Mistral, list, &format!("{PARIS} search{{}}"), " Done");
    let heads =
        r#"Look: [TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]search[CALL_ID]abc123XYZ[ARGS]{}"#;
    let collected = read(Format::Mistral, heads);
    assert_eq!(line(&collected), format!("{PARIS} search{{}}"));
    assert_eq!((collected.text.as_str(), collected.calls[1].id.as_deref()), ("Look: ", Some("abc123XYZ")));
    assert_read(Format::Mistral, "[TOOL_CALLS]we say {", "", "[TOOL_CALLS]we say {");
}

#[test]
fn deepseek_and_kimi() {
    let v3 = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Paris\"}\n\
              ```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n```json\n{}\n\
              ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    assert_read(Format::DeepseekV3, v3, &format!("{PARIS} search{{}}"), "");
    let v31 = "Yes.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Paris\"}\
               <｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    assert_read(Format::DeepseekV31, v31, PARIS, "Yes.");
    let kimi = "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>\
                {\"city\": \"Paris\"}<|tool_call_end|><|tool_calls_section_end|>";
    assert_read(Format::KimiK2, kimi, PARIS, "");
    assert_eq!(read(Format::KimiK2, kimi).calls[0].id.as_deref(), Some("functions.weather:0"));
}

#[test]
fn arguments_between_tags_have_the_type_of_the_schema() {
    let all = r#"weather{"city":"<b>\n5</b>","days":5,"exact":true,"places":["a"],"options":{"b":null}}"#;
    let pairs = [
        ("city", "<b>\n5</b>"),
        ("days", "5.0"),
        ("exact", "True"),
        ("places", "[\"a\"]"),
        ("options", "{'b': None}"),
    ];
    let written = |form: fn(&str, &str) -> String| pairs.map(|(key, value)| form(key, value)).concat();
    let qwen = written(|key, value| format!("<parameter={key}>\n{value}\n</parameter>\n"));
    let qwen = format!("<tool_call>\n<function=weather>\n{qwen}</function>\n</tool_call>");
    assert_read(Format::Qwen3Coder, &qwen, all, "");
    assert_read(Format::Qwen3Coder, &qwen.replace("<tool_call>\n", ""), all, "");
    let minimax = written(|key, value| format!("<parameter name=\"{key}\">{value}</parameter>\n"));
    let minimax = format!(
        "Now:<minimax:tool_call>\n<invoke name=\"weather\">\n{minimax}</invoke>\n</minimax:tool_call>"
    );
    assert_read(Format::MinimaxM2, &minimax, all, "Now:");
    let glm = written(|key, value| format!("<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"));
    assert_read(Format::Glm4, &format!("<tool_call>weather\n{glm}</tool_call>"), all, "");
    assert_read(Format::Glm4, "<tool_call>weather</tool_call>", "weather{}", "");
    let other = "<tool_call>f<arg_key>n</arg_key><arg_value>2</arg_value></tool_call>";
    assert_read(Format::Glm4, other, r#"f{"n":2}"#, "");
}

#[test]
fn python_and_gemma() {
    let python = "<|tool_call_start|>[weather(city='Paris'), search(places=[1, {\"a\": true}], city=\"<|tool_call_end|>\")]\
                  <|tool_call_end|>Done";
    let calls = format!("{PARIS} search{{\"places\":[1,{{\"a\":true}}],\"city\":\"<|tool_call_end|>\"}}");
    assert_read(Format::Pythonic, python, &calls, "Done");
    let json =
        "<|tool_call_start|>[{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}]<|tool_call_end|>";
    assert_read(Format::Pythonic, json, PARIS, "");
    let gemma = "<|tool_call>call:weather{city:<|\"|>Paris<|\"|>}<tool_call|><|tool_call>call:search{\
                 options:{a:[1,<|\"|>}<tool_call|><|\"|>]}}<tool_call|>";
    let calls = format!("{PARIS} search{{\"options\":{{\"a\":[1,\"}}<tool_call|>\"]}}}}");
    assert_read(Format::Gemma4, gemma, &calls, "");
    let function = "<start_function_call>call:weather{city:<escape>Paris<escape>}<end_function_call>";
    assert_read(Format::FunctionGemma, function, PARIS, "");
    assert_read(Format::FunctionGemma, "<start_function_call>call", "", "<start_function_call>call");
}

#[test]
fn phi_and_nemotron() {
    let call = r#"{"name": "weather", "arguments": {"city": "Paris"}}"#;
    assert_read(Format::Phi4, &format!("functools[{call}, {call}]"), &format!("{PARIS} {PARIS}"), "");
    assert_read(Format::Phi4, &format!("<|tool_call|>[{call}]<|/tool_call|>"), PARIS, "");
    assert_read(Format::Phi4, "functools[0]", "", "functools[0]");
    assert_read(Format::Nemotron, &format!("<TOOLCALL>[{call}]</TOOLCALL>"), PARIS, "");
}

#[test]
fn harmony() {
    let syntax = Syntax { format: Some(Format::Harmony), reasoning: Some(Reasoning::Harmony) };
    let output = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me \
                  see.<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json\
                  <|message|>{\"city\": \"Paris\"}";
    for end in ["<|call|>", ""] {
        let parser = Parser::new(syntax, tools(), Start::Text);
        let (collected, _) = read_from(parser, &format!("{output}{end}"), false);
        let texts = (collected.reasoning.as_str(), collected.text.as_str());
        assert_eq!((line(&collected).as_str(), texts), (PARIS, ("Hm.", "Let me see.")));
    }
    let cases = [
        ("Plain text", Start::Text, "", "Plain text", ""),
        ("<b>Plain</b>", Start::Text, "", "<b>Plain</b>", ""),
        (
            "so<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
            Start::Reasoning,
            "so",
            "Hi",
            "",
        ),
        (
            " to=functions.weather<|channel|>commentary json<|message|>{}<|call|>",
            Start::Text,
            "",
            "",
            "weather{}",
        ),
        ("<|channel|>analysis to=python code<|message|>1+1<|call|>", Start::Text, "1+1", "", ""),
        ("<|channel|>fin", Start::Text, "", "", ""),
    ];
    for (output, start, reasoning, text, calls) in cases {
        let (collected, _) = read_from(Parser::new(syntax, tools(), start), output, false);
        let texts = (collected.reasoning.as_str(), collected.text.as_str());
        assert_eq!((line(&collected).as_str(), texts), (calls, (reasoning, text)), "{output}");
    }
    let broken = "<|channel|>commentary to=functions.weather<|message|>{\"city\": no}";
    let (collected, _) = read_from(Parser::new(syntax, tools(), Start::Text), broken, false);
    assert_eq!((collected.text.as_str(), collected.calls.len()), (broken, 0));
    let (collected, _) = read_from(Parser::new(syntax, tools(), Start::Text), &broken[..60], true);
    assert_eq!((collected.text.as_str(), collected.calls.len()), ("", 0));
}

#[test]
fn reasoning_is_apart() {
    let cases = [
        (Reasoning::Think, Start::Text, "<think>\nHm\n\nso\n</think>\n\nHi\n", "Hm\n\nso", "Hi\n"),
        (Reasoning::Think, Start::Reasoning, "\nHm\n</think>\n\n  Hi", "Hm", "  Hi"),
        (Reasoning::Think, Start::Text, "\n<think>\n\n</think>\n\nHi", "", "Hi"),
        (Reasoning::Think, Start::Reasoning, "never closed\n", "never closed\n", ""),
        (
            Reasoning::Think,
            Start::Text,
            "The tag <think> opens it.</think>",
            "",
            "The tag <think> opens it.</think>",
        ),
        (Reasoning::Think, Start::Text, "</think>\n\nHi", "", "Hi"),
        (Reasoning::Think, Start::Text, "<thin", "", "<thin"),
        (Reasoning::Longcat, Start::Text, "<longcat_think>a</longcat_think>b", "a", "b"),
        (Reasoning::Mistral, Start::Text, "[THINK]a[/THINK]b", "a", "b"),
        (Reasoning::Seed, Start::Text, "<seed:think>a</seed:think>b", "a", "b"),
        (Reasoning::Channel, Start::Text, "Hi<|channel>thought\nHm<channel|>ho", "Hm", "Hiho"),
    ];
    for (way, start, output, reasoning, text) in cases {
        let collected = thinking(way, start, output);
        assert_eq!((collected.reasoning.as_str(), collected.text.as_str()), (reasoning, text), "{output}");
    }
}

#[test]
fn a_call_in_reasoning_counts_where_it_begins_a_line() {
    let call = "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}</tool_call>";
    let collected = thinking(Reasoning::Think, Start::Reasoning, &format!("I could {call} now</think>Hi"));
    assert_eq!((collected.calls.len(), collected.text.as_str()), (0, "Hi"));
    let collected = thinking(Reasoning::Think, Start::Reasoning, &format!("Hm\n{call}\n</think>\nHi"));
    assert_eq!(
        (line(&collected).as_str(), collected.reasoning.as_str(), collected.text.as_str()),
        (PARIS, "Hm", "Hi")
    );
    let collected = thinking(Reasoning::Think, Start::Reasoning, "Hm\n<tool_call> is a tag.</think>Hi");
    assert_eq!((collected.reasoning.as_str(), collected.text.as_str()), ("Hm\n<tool_call> is a tag.", "Hi"));
    let collected =
        thinking(Reasoning::Think, Start::Text, &format!("<think>a</think>{call}<think>b</think>c"));
    assert_eq!(
        (line(&collected).as_str(), collected.reasoning.as_str(), collected.text.as_str()),
        (PARIS, "ab", "c")
    );
}

#[test]
fn the_prompt_says_where_the_output_begins() {
    assert_eq!(Reasoning::Think.start_after("…<|im_start|>assistant\n<think>\n"), Start::Reasoning);
    assert_eq!(Reasoning::Think.start_after("<think> is a tag<|im_start|>assistant\n"), Start::Text);
    assert_eq!(Reasoning::Think.start_after("<think>\n\n</think>\n\n"), Start::Text);
    assert_eq!(
        Reasoning::Harmony.start_after("<|start|>assistant<|channel|>analysis<|message|>"),
        Start::Reasoning
    );
}

#[test]
fn names_are_unique_and_found() {
    for format in Format::ALL {
        assert_eq!(Format::from_name(format.name()), Some(*format));
        let openers = format.openers();
        let marks = |opener: &str| {
            format.markers().contains(&opener) || ["functools[", "<function="].contains(&opener)
        };
        assert!(openers.iter().all(|opener| marks(opener)), "{format:?}");
    }
    for way in Reasoning::ALL {
        assert_eq!(Reasoning::from_name(way.name()), Some(*way));
    }
    assert_eq!(Format::from_name("Hermes"), None);
    assert_eq!(Format::Mistral.call_id("f", 0, u128::MAX).len(), 9);
    assert_eq!(Format::KimiK2.call_id("f", 3, 0), "functions.f:3");
    assert_eq!(Format::Hermes.call_id("f", 0, 255), format!("call_{:0>24}", "ff"));
}

#[test]
fn templates_name_their_format() {
    let cases = [
        ("{{ '<tool_call>\\n{\"name\": \"' + tool_call.name }}", Some(Format::Hermes)),
        ("'<tool_call>\\n<function=' + tool_call.name", Some(Format::Qwen3Coder)),
        ("<tool_call>{{ f }}<arg_key>", Some(Format::Glm4)),
        ("[TOOL_CALLS]", Some(Format::Mistral)),
        ("<｜tool▁sep｜>' + name + '\\n```json\\n'", Some(Format::DeepseekV3)),
        ("<｜tool▁sep｜>", Some(Format::DeepseekV31)),
        ("<|start|>assistant<|channel|>commentary to=functions.", Some(Format::Harmony)),
        ("<|python_tag|>", Some(Format::Llama3Json)),
        ("<|im_start|>{{ content }}", None),
    ];
    for (source, format) in cases {
        assert_eq!(Format::of_template(source), format, "{source}");
    }
    assert_eq!(Reasoning::of_template("{{ '<think>' }}"), Some(Reasoning::Think));
    assert_eq!(Reasoning::of_template("<|channel>thought <think>"), Some(Reasoning::Channel));
    assert_eq!(Reasoning::of_template("{{ content }}"), None);
}

#[test]
fn grammars_name_special_tokens_and_quote_the_rest() {
    let special = |marker: &str| (marker == "<tool_call>").then_some(7);
    let grammar = Format::Hermes.call_grammar(&tools()[..1], false, &special).unwrap();
    assert!(grammar.starts_with("start: <[7]> \"\\n\" call "), "{grammar}");
    assert!(grammar.contains("%json {"), "{grammar}");
    assert!(grammar.contains(r#"r1: "{\"name\": \"" "weather" "\", \"arguments\": " r0 "}""#), "{grammar}");
    for format in Format::ALL {
        let grammar = format.call_grammar(&tools(), true, &|_| None);
        let bounded = matches!(format, Format::Gemma4 | Format::FunctionGemma);
        assert_eq!(grammar.is_err(), bounded, "{format:?} {grammar:?}");
        assert_eq!(format.call_grammar(&[], true, &|_| None), Err(NoGrammar::Empty));
    }
}

#[test]
fn an_answer_in_json_is_text_also_where_a_limit_cuts_it() {
    let answer = "{\"temperature\": 21, \"days\": [";
    let parser_of = |format| parser(format, None, Start::Text);
    let (collected, _) = read_from(parser_of(Format::Llama3Json), answer, true);
    assert_eq!(collected.text, answer);
    let mut streams = parser_of(Format::Llama3Json);
    assert_eq!(streams.push("{\"temperature\""), [Piece::Text("{\"temperature\"".into())]);
    let (collected, _) = read_from(parser_of(Format::Phi4), "functools[0", true);
    assert_eq!(collected.text, "functools[0");
    let (collected, _) = read_from(parser_of(Format::Llama3Json), "{\"name\": \"weather\", \"par", true);
    assert_eq!(collected.text, "");
}

#[test]
fn a_string_that_is_not_closed_does_not_lose_the_rest() {
    let output = "<|tool_call_start|>[weather(city='it's')]<|tool_call_end|>Noted";
    for by_length in [false, true] {
        let (collected, _) = read_from(parser(Format::Pythonic, None, Start::Text), output, by_length);
        assert_eq!(collected.text, output);
    }
}

#[test]
fn harmony_without_a_format_has_no_calls_and_its_limit_loses_nothing() {
    let output = "<|channel|>commentary to=functions.weather<|message|>{\"city\": \"Paris and many others\"}";
    let harmony = Some(Reasoning::Harmony);
    let without = Parser::new(Syntax { format: None, reasoning: harmony }, tools(), Start::Text);
    let (collected, _) = read_from(without, output, false);
    assert_eq!((collected.text.as_str(), collected.calls.len()), (output, 0));
    let long = parser(Format::Harmony, harmony, Start::Text).with_call_bytes_max(60);
    let (collected, _) = read_from(long, &format!("{output}<|call|>"), false);
    assert_eq!((collected.text.as_str(), collected.calls.len()), (output, 0));
    let header = " to=functions.weather<|channel|>comm";
    let (collected, _) = read_from(parser(Format::Harmony, harmony, Start::Text), header, true);
    assert_eq!(collected.text, "");
}

#[test]
fn gemma_may_quote_as_json_does_and_ends_in_linear_time() {
    let output = "<|tool_call>call:weather{city:\"x, }y\",days:1}<tool_call|>";
    assert_read(Format::Gemma4, output, r#"weather{"city":"x, }y","days":1}"#, "");
    let many = format!("<|tool_call>{}{}<tool_call|>", "call:f{}".repeat(5_000), " ".repeat(50_000));
    assert_eq!(read(Format::Gemma4, &many).calls.len(), 5_000);
}

#[test]
fn all_calls_of_a_list_are_as_deep_as_arguments_may_be() {
    let deep = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    let output = |levels| format!("<|tool_call_start|>[f(a=1), g(a={})]<|tool_call_end|>", deep(levels));
    assert_eq!(read(Format::Pythonic, &output(126)).calls.len(), 2);
    assert_read(Format::Pythonic, &output(127), "", &output(127));
    let output = |levels| format!("<|tool_call>call:f{{a:{}}}<tool_call|>", deep(levels));
    assert_eq!(read(Format::Gemma4, &output(126)).calls.len(), 1);
    assert_read(Format::Gemma4, &output(127), "", &output(127));
}

#[test]
fn reasoning_that_is_opened_twice_shows_no_tag() {
    let collected = thinking(Reasoning::Think, Start::Reasoning, "<think>\nHm</think>Hi");
    assert_eq!((collected.reasoning.as_str(), collected.text.as_str()), ("Hm", "Hi"));
}

#[test]
fn grammars_are_linear_and_refuse_what_they_cannot_hold_to() {
    let of = |format: Format, properties: serde_json::Value| {
        let parameters = json!({ "type": "object", "properties": properties,
            "$defs": { "color": { "enum": ["red", "blue"] } } });
        let tool = Tool { name: "GET_ARGUMENTS".into(), description: String::new(), parameters };
        format.call_grammar(&[tool], false, &|_| None)
    };
    let many: serde_json::Map<String, serde_json::Value> =
        (0..5000).map(|at| (format!("p{at}"), json!({ "type": "integer" }))).collect();
    let grammar = of(Format::Pythonic, many.into()).unwrap();
    assert!(grammar.len() < 1 << 20, "{}", grammar.len());
    assert!(grammar.contains("\"GET_ARGUMENTS\""));
    let grammar = of(Format::Qwen3Coder, json!({ "c": { "$ref": "#/$defs/color" } })).unwrap();
    assert!(grammar.contains(r#"("red" | "blue")"#), "{grammar}");
    for property in [
        json!({ "type": "string", "pattern": "a" }),
        json!({ "anyOf": [{ "type": "string", "maxLength": 3 }, { "type": "null" }] }),
        json!({ "enum": ["a</parameter>"] }),
        json!({ "type": "string", "enum": ["null"] }),
        json!({ "anyOf": [{ "enum": ["a"] }, { "type": "string" }] }),
    ] {
        let refused = of(Format::Qwen3Coder, json!({ "c": property }));
        assert!(matches!(refused, Err(NoGrammar::Argument { .. })), "{property} {refused:?}");
    }
    let tool = Tool { name: "a b".into(), description: String::new(), parameters: json!(null) };
    assert!(matches!(Format::Hermes.call_grammar(&[tool], false, &|_| None), Err(NoGrammar::Name { .. })));
}
