//! Grammars that explode elsewhere.

use serde_json::{Value, json};

use super::tests::{END, compile, ids, random, vocabulary};
use super::*;

/// Schemas that explode elsewhere.
fn hostile_schemas() -> Vec<Value> {
    let tool = |number: usize| {
        json!({
            "type": "object", "required": ["name", "arguments"], "additionalProperties": false,
            "properties": {
                "name": { "const": format!("tool_{number}") },
                "arguments": {
                    "type": "object", "required": ["a"],
                    "properties": { "a": { "type": "string" }, "b": { "type": "integer" }, "c": { "enum": [1, 2] } },
                },
            },
        })
    };
    let optional: serde_json::Map<String, Value> =
        (0..40).map(|number| (format!("p{number}"), json!({ "type": "string" }))).collect();
    let mut nested = json!({ "type": "string" });
    for depth in 0..12 {
        nested = json!({ "oneOf": [
            { "type": "object", "properties": { "k": { "const": depth }, "v": nested }, "required": ["k", "v"] },
            { "type": "array", "items": nested.clone() },
        ] });
        if nested.to_string().len() > 40_000 {
            break;
        }
    }
    let long: serde_json::Map<String, Value> = (0..9000)
        .map(|number| (format!("d{number}"), json!({ "$ref": format!("#/$defs/d{}", number + 1) })))
        .chain([("d9000".to_owned(), json!({ "type": "string" }))])
        .collect();
    let mut chain = serde_json::Map::new();
    for number in 0..20 {
        let next = format!("#/$defs/d{}", number + 1);
        chain.insert(format!("d{number}"), json!({ "allOf": [{ "$ref": next }, { "$ref": next }] }));
    }
    chain.insert("d20".into(), json!({ "type": "object", "properties": { "a": { "type": "string" } } }));
    vec![
        json!({ "anyOf": (0..128).map(tool).collect::<Vec<_>>() }),
        json!({ "type": "string", "maxLength": 100_000 }),
        json!({ "type": "string", "minLength": 100_000, "maxLength": 100_000, "pattern": "^(a+)+$" }),
        json!({ "type": "object", "properties": optional, "additionalProperties": false }),
        nested,
        json!({ "$ref": "#" }),
        json!({ "type": "object", "properties": { "a": { "$ref": "#" } }, "required": ["a"] }),
        json!({ "allOf": [{ "$ref": "#/$defs/d0" }], "$defs": chain }),
        json!({ "type": "array", "minItems": 100_000, "items": { "type": "array", "minItems": 100_000 } }),
        json!({ "type": "integer", "multipleOf": 999_983 }),
        json!({ "type": "number", "multipleOf": 0.000_001, "minimum": 1e-300, "maximum": 1e300 }),
        json!({ "enum": (0..5000).map(|n| format!("value {n}")).collect::<Vec<_>>() }),
        json!({ "patternProperties": { "^(a|aa)+$": {}, "^b.*c.*d$": {} } }),
        json!({ "$ref": "#/$defs/d0", "$defs": long }),
        json!({
            "oneOf": vec![json!({ "$ref": "#/$defs/b" }); 4096], "$defs": { "b": { "enum": vec![1; 50_000] } },
        }),
        json!({ "allOf": [
            { "anyOf": vec![json!({ "const": 1 }); 10_000] },
            { "type": "object", "properties": (0..5000).map(|n| (format!("p{n}"), json!({}))).collect::<serde_json::Map<_, _>>() },
        ] }),
    ]
}

/// What explodes elsewhere. Each is answered or refused; that it is, and that an answer begins, is the claim.
#[test]
fn hostile_grammars_are_answered_or_refused() {
    let schemas = hostile_schemas().into_iter().map(|schema| Source::JsonSchema(schema.to_string()));
    let regexes = [
        "(a+)+b",
        "((a*)*)*c",
        "(.*a){40}",
        "a{1000}{1000}",
        "(x+x+)+y",
        "(a|b|ab)*c(a|b){500}",
        ".{0,100000}",
        "[a-z]{1,9999}@[a-z]{1,9999}",
    ];
    let regexes = regexes.map(|regex| Source::Regex(regex.into()));
    let larks = [
        "start: start start | \"a\"",
        "start: start",
        "start: a\na: b\nb: a | \"x\"",
        "start: (\"a\"? \"a\"? \"a\"?)~200",
        "start: x~0..100000\nx: \"a\" | \"b\"",
    ];
    let long: String = (0..30_000).map(|number| format!("r{number}: r{}\n", number + 1)).collect();
    let larks = larks.map(str::to_owned).into_iter().chain([format!("start: r0\n{long}r30000: \"a\"")]);
    let larks = larks.map(Source::Lark);
    for source in schemas.chain(regexes).chain(larks) {
        let mut shown = format!("{source:?}");
        shown.truncate(80);
        let Ok(grammar) = compile(&source) else { continue };
        let mut matcher = grammar.matcher();
        let mut choose = random(1);
        for _ in 0..40 {
            // A grammar may turn out to be too much later.
            let Ok(allowed) = matcher.allowed() else { break };
            let allowed = ids(&allowed);
            assert!(!allowed.is_empty(), "{shown}");
            let token = allowed[choose(allowed.len())];
            if token == END || matcher.advance(token).is_err() {
                break;
            }
        }
    }
}

/// Schemas and rules that lead to each other in a line of this length.
fn chains(length: usize) -> Vec<Source> {
    let defs = |link: &dyn Fn(Value) -> Value| {
        let mut defs: serde_json::Map<String, Value> = (0..length)
            .map(|number| (format!("d{number}"), link(json!({ "$ref": format!("#/$defs/d{}", number + 1) }))))
            .collect();
        defs.insert(format!("d{length}"), json!({ "type": "string" }));
        json!({ "$ref": "#/$defs/d0", "$defs": defs })
    };
    let plain = defs(&|next| next);
    let both = defs(&|next| json!({ "allOf": [next, { "type": "string" }] }));
    let items = defs(&|next| json!({ "type": "array", "items": next, "minItems": 1 }));
    let named = defs(&|next| json!({ "type": "object", "properties": { "a": next }, "required": ["a"] }));
    let any = defs(&|next| json!({ "anyOf": [next, { "type": "object", "properties": { "b": {} } }] }));
    let schemas = [plain, both, items, named, any];
    let rules = |link: &dyn Fn(usize) -> String, last: &str| {
        let rules: String = (0..length).map(link).collect();
        Source::Lark(format!("{rules}{last}"))
    };
    let lark = [
        rules(
            &|n| format!("{}: r{}\n", if n == 0 { "start".into() } else { format!("r{n}") }, n + 1),
            &format!("r{length}: \"a\""),
        ),
        rules(
            &|n| {
                format!(
                    "{}: (\"b\" r{} | \"c\")+\n",
                    if n == 0 { "start".into() } else { format!("r{n}") },
                    n + 1
                )
            },
            &format!("r{length}: \"a\""),
        ),
        rules(
            &|n| if n == 0 { "start: T1\n".into() } else { format!("T{n}: T{}\n", n + 1) },
            &format!("T{length}: \"a\""),
        ),
        rules(
            &|n| format!("{}: r{}\n", if n == 0 { "start".into() } else { format!("r{n}") }, n + 1),
            &format!("r{length}: %json {}", schemas[2]),
        ),
    ];
    let schemas = schemas.into_iter().map(|schema| Source::JsonSchema(schema.to_string()));
    schemas.chain(lark).collect()
}

/// Compiles on a stack of half the bytes that compiling has.
fn on_a_stack(sources: Vec<Source>, limits: GrammarLimits) -> Vec<Result<(), Refusal>> {
    let compile_all = move || {
        let vocabulary = vocabulary(&[END]);
        let compile = |source: &Source| Grammar::compile(&vocabulary, source, &limits).map(drop);
        sources.iter().map(compile).collect()
    };
    let thread = std::thread::Builder::new().stack_size(COMPILING_STACK_BYTES / 2);
    thread.spawn(compile_all).unwrap().join().unwrap()
}

/// What is compiled by recursion is refused where it would go too deep, and has a stack where it would not.
#[test]
fn long_chains_are_refused_and_shorter_ones_fit_the_stack() {
    // The most that a configuration allows.
    let limits = GrammarLimits { bytes_max: 64 << 20, depth_max: 120, ..GrammarLimits::default() };
    for refusal in on_a_stack(chains(100_000), limits) {
        let too_deep = Refusal::TooLarge { limit: "grammar_depth_max", value: 120 };
        assert_eq!(refusal, Err(too_deep));
    }
    for length in [1500, 2300, 4700] {
        // None may end the process, whatever else becomes of it.
        on_a_stack(chains(length), limits);
    }
}

/// Copies that a schema asks for are counted before they are made.
#[test]
fn what_would_be_copied_often_is_refused() {
    let limits = GrammarLimits { bytes_max: 64 << 20, ..GrammarLimits::default() };
    let large = json!({ "enum": vec![1; 190_000] });
    let copied = [
        json!({ "oneOf": vec![json!({ "$ref": "#/$defs/b" }); 4096], "$defs": { "b": large } }),
        json!({ "allOf": [
            { "anyOf": vec![json!({ "const": 1 }); 20_000] },
            { "type": "object", "properties": (0..10_000).map(|n| (format!("p{n}"), json!({}))).collect::<serde_json::Map<_, _>>() },
        ] }),
        (0..40).fold(json!({ "type": "string" }), |inner, n| {
            json!({ "oneOf": [{ "$ref": "#/$defs/b" }, { "type": "array", "items": inner }], "$comment": n })
        }),
    ];
    for (number, mut schema) in (0..).zip(copied) {
        if number == 2 {
            schema["$defs"] = json!({ "b": { "enum": vec![1; 500_000] } });
        }
        let refusal = on_a_stack(vec![Source::JsonSchema(schema.to_string())], limits).remove(0);
        assert!(matches!(refusal, Err(Refusal::TooLarge { .. })), "{number}: {refusal:?}");
    }
    // A long name is not copied for each place below it.
    let below = (0..20_000).map(|n| (format!("{n}"), json!({}))).collect::<serde_json::Map<_, _>>();
    let named = json!({ "type": "object", "properties": { "a".repeat(250_000): { "properties": below } } });
    // Each property is compared with each other one.
    let refusal = on_a_stack(vec![Source::JsonSchema(named.to_string())], limits).remove(0);
    assert_eq!(refusal, Err(Refusal::TooLarge { limit: "grammar_work_max", value: limits.work_max }));
}
