//! Walks through grammars by any allowed token, and what is refused.

use std::fmt::Write as _;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::text::{TextFiles, Tokenizer};

/// The token that ends an output; all before it are text.
pub(super) const END: u32 = 107;
const SIZE: u32 = 109;

/// A tokenizer of the printable characters of ASCII, the line break, some longer tokens and two control
/// tokens.
fn tokenizer() -> Tokenizer {
    let single = (b' '..=b'~').map(|byte| char::from(byte).to_string());
    let longer = ["\n", "{\"", "\":", "\",", "\"}", "true", "null", "10", "  ", "ab", "\u{e9}", "é\""];
    let words: Vec<String> = single.chain(longer.map(str::to_owned)).collect();
    assert_eq!(words.len(), END as usize);
    let control = ["<|end|>", "<|other|>"].into_iter().zip(END..).map(|(content, id)| {
        json!({
            "id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false,
        })
    });
    let vocabulary: serde_json::Map<String, Value> =
        words.iter().zip(0..).map(|(word, id)| (word.clone(), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": control.collect::<Vec<_>>(),
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "a" },
        "pre_tokenizer": null, "decoder": { "type": "Fuse" }, "normalizer": null, "post_processor": null,
        "truncation": null, "padding": null,
    });
    let tokenizer = Some(tokenizer.to_string().into_bytes());
    Tokenizer::new(&TextFiles { tokenizer, ..TextFiles::default() }).unwrap()
}

pub(super) fn vocabulary(ends: &[u32]) -> Vocabulary {
    Vocabulary::new(&tokenizer(), SIZE, ends).unwrap()
}

pub(super) fn compile(source: &Source) -> Result<Grammar, Refusal> {
    Grammar::compile(&vocabulary(&[END]), source, &GrammarLimits::default())
}

fn schema(schema: &Value) -> Result<Grammar, Refusal> {
    compile(&Source::JsonSchema(schema.to_string()))
}

pub(super) fn ids(allowed: &Allowed) -> Vec<u32> {
    match allowed {
        Allowed::Tokens(words) => {
            let all = 0..u32::try_from(words.len() * 32).unwrap();
            all.filter(|id| words[*id as usize / 32] >> (id % 32) & 1 == 1).collect()
        }
        Allowed::Nothing => vec![],
    }
}

/// Draws tokens as `choose` says of what is allowed, to the end or up to `longest`; returns the text, and
/// whether it ended.
fn walk(grammar: &Grammar, longest: usize, mut choose: impl FnMut(usize) -> usize) -> (String, bool) {
    let (tokenizer, mut matcher) = (tokenizer(), grammar.matcher());
    let mut text = Vec::new();
    for _ in 0..longest {
        let allowed = ids(&matcher.allowed().unwrap());
        assert!(allowed.iter().all(|id| *id < SIZE), "{allowed:?}");
        assert!(!allowed.contains(&(END + 1)), "control tokens are not text");
        assert_eq!(allowed.contains(&END), matcher.is_whole().unwrap(), "it may end where it is whole");
        let token = allowed[choose(allowed.len())];
        if token == END {
            return (String::from_utf8(text).unwrap(), true);
        }
        text.extend(tokenizer.token_bytes(token));
        matcher.advance(token).unwrap();
    }
    (String::from_utf8_lossy(&text).into_owned(), false)
}

/// Returns numbers that look random.
pub(super) fn random(mut state: u64) -> impl FnMut(usize) -> usize {
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below
    }
}

#[test]
fn what_is_drawn_obeys_the_schema() {
    let city = json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 8 },
            "kind": { "enum": ["city", "town"] },
            "size": { "type": "integer", "minimum": 3, "maximum": 120 },
            "tags": { "type": "array", "items": { "type": "boolean" }, "maxItems": 2 },
            "next": { "anyOf": [{ "type": "null" }, { "$ref": "#/$defs/place" }] },
        },
        "required": ["name", "kind", "size", "next"],
        "additionalProperties": false,
        "$defs": { "place": {
            "type": "object", "properties": { "x": { "type": "number", "minimum": 0, "maximum": 1 } },
            "required": ["x"], "additionalProperties": false,
        } },
    });
    let grammar = schema(&city).unwrap();
    let mut ended = 0;
    for seed in 0..40 {
        let (text, is_whole) = walk(&grammar, 2000, random(seed));
        if !is_whole {
            continue;
        }
        ended += 1;
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let object = value.as_object().unwrap();
        assert!(object.keys().all(|key| ["name", "kind", "size", "tags", "next"].contains(&key.as_str())));
        assert!(object["name"].as_str().unwrap().chars().count() <= 8, "{text}");
        assert!(["city", "town"].contains(&object["kind"].as_str().unwrap()), "{text}");
        assert!((3..=120).contains(&object["size"].as_i64().unwrap()), "{text}");
        assert!(object["next"].is_null() || object["next"]["x"].as_f64().unwrap() <= 1.0, "{text}");
    }
    assert!(ended > 30, "{ended} outputs ended");
}

#[test]
fn a_whole_output_ends_by_itself() {
    let source = Source::Choice(vec!["yes".into(), "no".into(), "no, never".into()]);
    let grammar = compile(&source).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..60 {
        let (text, is_whole) = walk(&grammar, 50, random(seed));
        assert!(is_whole);
        seen.insert(text);
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["no", "no, never", "yes"]);
}

#[test]
fn without_a_token_for_the_end_a_whole_output_allows_nothing() {
    let vocabulary = vocabulary(&[]);
    let source = Source::Choice(vec!["ab".into()]);
    let grammar = Grammar::compile(&vocabulary, &source, &GrammarLimits::default()).unwrap();
    let mut matcher = grammar.matcher();
    let (mut tokens, mut drawn) = (matcher.allowed().unwrap(), Vec::new());
    while let Some(&token) = ids(&tokens).first() {
        drawn.extend(tokenizer().token_bytes(token));
        matcher.advance(token).unwrap();
        tokens = matcher.allowed().unwrap();
    }
    assert_eq!((tokens, drawn.as_slice()), (Allowed::Nothing, &b"ab"[..]));
}

#[test]
fn outputs_of_one_grammar_do_not_know_of_each_other() {
    let grammar = compile(&Source::Regex("(a|b)[0-9]{2}".into())).unwrap();
    let (mut one, mut other) = (grammar.matcher(), grammar.matcher());
    let first = one.allowed().unwrap();
    one.advance(ids(&first)[0]).unwrap();
    assert_ne!(one.allowed().unwrap(), first);
    assert_eq!(other.allowed().unwrap(), first);
    one.canceller().cancel();
    assert!(one.allowed().is_err() && other.allowed().is_ok());
}

#[test]
fn a_lark_grammar_may_name_control_tokens_and_embed_schemas() {
    let text = r#"start: "ab" <|other|> %json { "type": "boolean" }"#;
    let grammar = compile(&Source::Lark(text.into())).unwrap();
    let mut matcher = grammar.matcher();
    let mut drawn = Vec::new();
    loop {
        let allowed = ids(&matcher.allowed().unwrap());
        if allowed == [END] {
            break;
        }
        drawn.push(allowed[0]);
        matcher.advance(allowed[0]).unwrap();
    }
    assert!(drawn.contains(&(END + 1)), "{drawn:?}");
}

#[test]
fn what_is_not_supported_is_refused_by_name_and_place() {
    let refused = [
        (json!({ "not": {} }), "", "not"),
        (json!({ "properties": { "a/b": { "if": {} } } }), "/properties/a~1b", "if"),
        (json!({ "items": { "uniqueItems": true } }), "/items", "uniqueItems"),
        (json!({ "anyOf": [{}, { "contains": {} }] }), "/anyOf/1", "contains"),
        (json!({ "$defs": { "x": { "propertyNames": {} } } }), "/$defs/x", "propertyNames"),
        (json!({ "dependentRequired": {} }), "", "dependentRequired"),
        (json!({ "unevaluatedProperties": false }), "", "unevaluatedProperties"),
        (json!({ "type": "string", "nullable": true }), "", "nullable"),
        (json!({ "format": "no-such-format" }), "", "format"),
        (json!({ "$ref": "https://example.com/schema" }), "", "$ref"),
        (json!({ "$ref": "other.json#/a" }), "", "$ref"),
        (json!({ "x-guidance": { "lenient": true } }), "", "x-guidance"),
        (json!({ "const": 9_007_199_254_740_993_u64 }), "", "const"),
        (json!({ "items": [{}] }), "", "items"),
        (json!({ "oneOf": [{ "minLength": 1 }, { "maxLength": 3 }] }), "", "oneOf"),
        (json!({ "surprise": 1 }), "", "surprise"),
        (json!({ "multipleOf": 999_983 }), "", "multipleOf"),
        (json!({ "multipleOf": 1e-9 }), "", "multipleOf"),
    ];
    for (asked, place, name) in refused {
        match schema(&asked) {
            Err(Refusal::Unsupported { path, keyword, .. }) => {
                assert_eq!((path.as_str(), keyword.as_str()), (place, name), "{asked}");
            }
            other => panic!("{asked}: {other:?}"),
        }
    }
}

#[test]
fn a_schema_within_a_lark_grammar_is_checked_too() {
    let text = "start: \"%json\" /%json/ // %json {\n  %json { \"items\": { \"multipleOf\": 999983 } }";
    let refusal = compile(&Source::Lark(text.into())).unwrap_err();
    let place = ("%json/items".to_owned(), "multipleOf".to_owned());
    assert!(
        matches!(refusal, Refusal::Unsupported { path, keyword, .. } if (path.clone(), keyword.clone()) == place)
    );
}

#[test]
fn a_schema_cannot_hide_within_a_lark_grammar() {
    let schema = r#"%json { "multipleOf": 999983 }"#;
    let places = [
        format!("# don't use \"\nstart: {schema}"),
        format!("# either/or\nstart: {schema}"),
        format!("// \"\nstart: {schema}"),
        format!("start: </a> | {schema}"),
        format!("start: <\"> | {schema}"),
        format!("start: /\"/ {schema}"),
        format!("start: \"/\" {schema}"),
        format!("start: x{schema}"),
        format!("start: %lark {{ start: {schema} }}"),
    ];
    for lark in places {
        let refusal = compile(&Source::Lark(lark.clone()));
        let is_seen =
            matches!(&refusal, Err(Refusal::Unsupported { keyword, .. }) if keyword == "multipleOf");
        assert!(is_seen, "{lark}: {refusal:?}");
    }
    let dates = r#"start: %json { "type": "string", "format": "date", "const": "2023-02-29" }"#;
    assert!(matches!(
        compile(&Source::Lark(dates.into())),
        Err(Refusal::Invalid(_) | Refusal::Unsupported { .. })
    ));
}

#[test]
fn a_reference_leads_to_a_schema() {
    for target in ["x-defs/a", "default", "examples/0", "const", "properties", "enum/0"] {
        let mut asked = json!({
            "properties": { "b": { "$ref": format!("#/{target}") } }, "x-defs": { "a": { "multipleOf": 999_983 } },
            "default": {}, "examples": [{}],
        });
        asked["const"] = json!({ "type": "null" });
        asked["enum"] = json!([{}]);
        match schema(&asked) {
            Err(Refusal::Unsupported { path, keyword, .. }) => {
                assert_eq!((path.as_str(), keyword.as_str()), ("/properties/b", "$ref"), "{target}");
            }
            other => panic!("{target}: {other:?}"),
        }
    }
}

#[test]
fn dates_and_times_are_those_of_calendar_and_clock() {
    let accepts = |format: &str, text: &str| {
        let grammar = schema(&json!({ "type": "string", "format": format })).unwrap();
        let mut matcher = grammar.matcher();
        let quoted = format!("\"{text}\"");
        let fits = quoted.bytes().map(|byte| u32::from(byte - b' ')).all(|id| {
            let is_allowed = ids_of(&mut matcher).contains(&id);
            is_allowed && matcher.advance(id).is_ok()
        });
        fits && matcher.is_whole().unwrap()
    };
    for date in ["2024-02-29", "2000-02-29", "2023-12-31", "1999-04-30"] {
        assert!(accepts("date", date), "{date}");
    }
    for date in ["2023-02-29", "1900-02-29", "2024-02-30", "2024-04-31", "2024-13-01", "0000-01-01"] {
        assert!(!accepts("date", date), "{date}");
    }
    assert!(accepts("time", "23:59:59.5Z") && accepts("date-time", "2024-02-29T00:00:00+01:30"));
    assert!(!accepts("time", "23:59:60Z") && !accepts("date-time", "2023-02-29T00:00:00Z"));
}

fn ids_of(matcher: &mut Matcher) -> Vec<u32> {
    ids(&matcher.allowed().unwrap())
}

#[test]
fn what_is_malformed_is_refused() {
    let schemas = [
        json!({ "type": "text" }),
        json!({ "minLength": -1 }),
        json!({ "enum": [] }),
        json!({ "required": [1] }),
        json!({ "properties": [] }),
        json!({ "$ref": "#/$defs/none" }),
        json!(7),
        json!({ "anyOf": {} }),
        json!({ "maximum": "3" }),
        json!({ "pattern": 1 }),
    ];
    for asked in schemas {
        assert!(matches!(schema(&asked), Err(Refusal::Invalid(_))), "{asked}");
    }
    let others = [
        Source::JsonSchema("{".into()),
        Source::Regex("(".into()),
        Source::Regex("(?=a)b".into()),
        Source::Regex(String::new()),
        Source::Lark("start: missing".into()),
        Source::Lark("  ".into()),
        Source::Choice(vec![]),
        Source::Choice(vec!["a".into(), String::new()]),
    ];
    for source in others {
        let refusal = compile(&source);
        assert!(matches!(refusal, Err(Refusal::Invalid(_))), "{source:?}: {refusal:?}");
    }
}

#[test]
fn a_grammar_that_nothing_obeys_is_refused() {
    let nothing = [
        Source::JsonSchema(json!(false).to_string()),
        Source::JsonSchema(json!({ "type": "integer", "minimum": 3, "maximum": 2 }).to_string()),
        Source::JsonSchema(json!({ "allOf": [{ "type": "null" }, { "type": "string" }] }).to_string()),
        Source::Regex("[^\\s\\S]".into()),
        // The vocabulary has no token for it.
        Source::Choice(vec!["\u{1F600}".into()]),
    ];
    for source in nothing {
        let refusal = compile(&source);
        assert!(matches!(refusal, Err(Refusal::Invalid(_))), "{source:?}: {refusal:?}");
    }
}

#[test]
fn limits_are_named() {
    let limits = GrammarLimits { bytes_max: 100, depth_max: 5, ..GrammarLimits::default() };
    let refusal = |source| Grammar::compile(&vocabulary(&[END]), &source, &limits).unwrap_err();
    let too_large = |limit, value| Refusal::TooLarge { limit, value };
    assert_eq!(refusal(Source::Regex("a".repeat(101))), too_large("grammar_bytes_max", 100));
    let deep = format!("{}{}", "[".repeat(6), "]".repeat(6));
    assert_eq!(refusal(Source::JsonSchema(deep)), too_large("grammar_depth_max", 5));
    assert_eq!(refusal(Source::Regex("((((((a))))))".into())), too_large("grammar_depth_max", 5));
    let lark = "start: ((((((\"a\"))))))";
    assert_eq!(refusal(Source::Lark(lark.into())), too_large("grammar_depth_max", 5));
    // Brackets in texts are text.
    let quoted = Source::Lark("start: \"((((((((\" /[(]/ // ((((((((".into());
    assert!(Grammar::compile(&vocabulary(&[END]), &quoted, &limits).is_ok());
    let limits = GrammarLimits { work_max: 1, ..GrammarLimits::default() };
    let large = Source::Regex("[a-z]{1,50}[0-9]{1,80}(ab|cd){3,90}".into());
    let refusal = Grammar::compile(&vocabulary(&[END]), &large, &limits).unwrap_err();
    assert_eq!(refusal, too_large("grammar_work_max", 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_choice_gives_one_of_its_texts(
        texts in prop::collection::vec("[ -~\n]{1,12}", 1..6),
        seed in any::<u64>(),
    ) {
        let grammar = compile(&Source::Choice(texts.clone())).unwrap();
        let (text, is_whole) = walk(&grammar, 100, random(seed));
        prop_assert!(is_whole && texts.contains(&text), "{text:?} of {texts:?}");
    }

    #[test]
    fn constants_are_written_as_they_are(value in constant(), seed in any::<u64>()) {
        let grammar = schema(&json!({ "const": value })).unwrap();
        let (text, is_whole) = walk(&grammar, 4000, random(seed));
        if is_whole {
            prop_assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value, "{}", text);
        }
    }

    #[test]
    fn any_text_as_a_schema_is_answered_or_refused(text in "[\\[\\]{}:,\"a-z$ 0-9]{0,60}") {
        let _ = compile(&Source::JsonSchema(text));
    }

    #[test]
    fn any_text_as_a_regex_or_a_lark_grammar_is_answered_or_refused(text in "[ -~\n]{0,40}") {
        let _ = compile(&Source::Regex(text.clone()));
        let mut lark = String::new();
        write!(lark, "start: {text}").unwrap();
        let _ = compile(&Source::Lark(lark));
    }
}

/// Any JSON of a few parts.
fn constant() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-100_000..100_000i64).prop_map(Value::from),
        "[ -~]{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 6, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{1,3}", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

#[test]
fn tokens_that_end_a_marker_and_go_on_are_found() {
    let grammar = compile(&Source::Regex("a".into())).unwrap();
    let tokenizer = tokenizer();
    let found = |marker: &str| -> Vec<Vec<String>> {
        let text = |ids: Vec<u32>| ids.into_iter().map(|id| tokenizer.decode(&[id]).unwrap()).collect();
        grammar.ending_within(marker).into_iter().map(text).collect()
    };
    let none: Vec<String> = vec![];
    assert_eq!(found("z\""), [none.clone(), vec!["\":".into(), "\",".into(), "\"}".into()]]);
    assert_eq!(found("a"), [vec!["ab".to_owned()]]);
    assert_eq!(found("r"), [vec!["true".to_owned()]], "one that holds it");
    assert_eq!(found("<|end|>"), vec![none; 7], "a control token is none of its text");
}

#[test]
fn a_grammar_that_was_slow_is_fast_again_after_as_many_answers_as_that_took_long() {
    let (pace, fast) = (Pace::default(), Duration::from_micros(4999));
    pace.note(fast);
    assert!(!pace.is_slow());
    for (took, answers) in [(5, 16), (200, 666), (1000, 1000)] {
        pace.note(Duration::from_millis(took));
        assert_eq!(pace.last(), Duration::from_millis(took));
        // Several outputs are slow at once.
        pace.note(Duration::from_millis(5));
        for answer in 0..answers {
            assert!(pace.is_slow(), "{answer} of {answers}");
            pace.note(fast);
        }
        assert!(!pace.is_slow());
    }
}
