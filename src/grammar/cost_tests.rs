//! What a short grammar may cost much: it is counted before llguidance gets it, and refused.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::tests::compile;
use super::*;

fn refusal(schema: &Value) -> Option<Refusal> {
    compile(&Source::JsonSchema(schema.to_string())).err()
}

fn too_large() -> Refusal {
    Refusal::TooLarge { limit: "grammar_work_max", value: GrammarLimits::default().work_max }
}

fn properties(number: usize, schema: &Value) -> Value {
    (0..number).map(|number| (format!("p{number}"), schema.clone())).collect::<Map<_, _>>().into()
}

fn texts(number: usize, begin: &str) -> Value {
    (0..number).map(|number| json!(format!("{begin}{number}"))).collect::<Vec<_>>().into()
}

fn several(number: usize, schema: impl Fn(usize) -> Value) -> Value {
    (0..number).map(schema).collect::<Vec<_>>().into()
}

/// A schema with as many numbers that stands for a text of its size where it is merged.
fn large() -> Value {
    json!({ "type": "object", "properties": { "q": { "enum": (0..20_000).collect::<Vec<_>>() } } })
}

#[test]
fn properties_that_may_be_left_out_are_counted_where_their_number_is_bounded() {
    let closed = |number| json!({ "additionalProperties": false, "properties": properties(number, &json!({ "type": "null" })) });
    let bounded = |bound: &str, number| {
        let mut schema = closed(number);
        schema["type"] = json!("object");
        schema[bound] = json!(1);
        schema
    };
    for bound in ["minProperties", "maxProperties"] {
        assert_eq!(refusal(&bounded(bound, 64)), None);
        let (own, object) = (json!({ bound: 1 }), closed(200));
        let hidden = [
            ("", bounded(bound, 2000)),
            ("", bounded(bound, 65)),
            ("/items", json!({ "items": bounded(bound, 2000) })),
            ("/allOf/0", json!({ "allOf": [own, object] })),
            ("/allOf/1", json!({ "allOf": [object, own] })),
            ("/$defs/a", json!({ "allOf": [{ "$ref": "#/$defs/a" }, object], "$defs": { "a": own } })),
            ("", json!({ bound: 1, "anyOf": [{ "type": "null" }, object] })),
            ("", json!({ bound: 1, "$ref": "#/$defs/a", "$defs": { "a": object } })),
            (
                "/properties/a",
                json!({ "properties": { "a": own }, "additionalProperties": object, "allOf": [{ "additionalProperties": object }] }),
            ),
        ];
        for (place, schema) in hidden {
            match refusal(&schema) {
                Some(Refusal::Unsupported { path, keyword, .. }) => {
                    assert_eq!((path.as_str(), keyword.as_str()), (place, bound));
                }
                other => panic!("{bound} at {place:?}: {other:?}"),
            }
        }
    }
    // Each that is there makes one less that may be missing.
    let mut all = bounded("minProperties", 100);
    all["required"] = texts(100, "p");
    assert_eq!(refusal(&all), None);
}

#[test]
fn multiples_are_bounded_where_they_are_merged() {
    let both = |one: f64, other: f64| {
        [
            json!({ "allOf": [{ "type": "number", "multipleOf": one }, { "type": "number", "multipleOf": other }] }),
            json!({ "type": "number", "multipleOf": one, "$ref": "#/$defs/a", "$defs": { "a": { "multipleOf": other } } }),
            json!({ "type": "number", "multipleOf": one, "anyOf": [{ "multipleOf": other }, { "type": "null" }] }),
        ]
    };
    for schema in both(3.0, 0.5).into_iter().chain(both(1.5, 2.5)).chain(both(100.0, 0.01)) {
        assert_eq!(refusal(&schema), None, "{schema}");
    }
    for schema in both(9973.0, 9967.0).into_iter().chain(both(9999.0, 0.001)) {
        let refusal = refusal(&schema);
        assert!(
            matches!(&refusal, Some(Refusal::Unsupported { keyword, .. }) if keyword == "multipleOf"),
            "{schema}: {refusal:?}"
        );
    }
}

fn costs_too_much((name, schema): &(&str, Value)) {
    assert!(schema.to_string().len() < GrammarLimits::default().bytes_max, "{name}");
    assert_eq!(refusal(schema), Some(too_large()), "{name}");
}

#[test]
fn what_each_merge_and_each_place_costs_is_counted_every_time() {
    let open = json!({ "type": "object" });
    let costly = [
        (
            "places of multiples",
            json!({ "properties": { "a".repeat(200_000): { "prefixItems": vec![json!({ "type": "number", "multipleOf": 2 }); 8_000] } } }),
        ),
        (
            "places of counts",
            json!({ "properties": { "a".repeat(200_000): { "prefixItems": vec![json!({ "type": "object", "minProperties": 1 }); 6_000] } } }),
        ),
        (
            "merged patterns",
            json!({ "allOf": several(12_000, |n| if n == 0 { json!({ "type": "object", "patternProperties": { r"\pL".repeat(9_900): {} } }) } else { open.clone() }) }),
        ),
        (
            "merged names of which all are required",
            json!({ "allOf": several(14_000, |n| if n == 0 { json!({ "type": "object", "required": texts(2_000, "p") }) } else { open.clone() }) }),
        ),
    ];
    costly.iter().for_each(costs_too_much);
}

#[test]
fn a_schema_that_costs_more_than_its_size_is_refused() {
    let open = json!({ "type": "object" });
    let patterned = |number| (0..number).map(|n| (format!("^a{n}.*b.*c$"), json!({}))).collect::<Map<_, _>>();
    let costly = [
        ("names", json!({ "properties": properties(8000, &json!({})) })),
        ("required names", json!({ "required": texts(30_000, "p") })),
        (
            "merged names",
            json!({ "allOf": several(3000, |n| json!({ "type": "object", "properties": { format!("p{n}"): {} } })) }),
        ),
        (
            "alternatives",
            json!({ "oneOf": [{ "enum": texts(16_000, "a") }, { "enum": texts(16_000, "b") }] }),
        ),
        (
            "nested alternatives",
            json!({ "oneOf": [
            { "oneOf": [{ "enum": texts(16_000, "a") }, { "type": "null" }] }, { "anyOf": [{ "enum": texts(16_000, "b") }] },
        ] }),
        ),
        (
            "copies for references",
            json!({
                "$defs": { "x": large() },
                "allOf": [
                    { "type": "object", "properties": properties(1000, &json!({ "$ref": "#/$defs/x" })) },
                    { "type": "object", "additionalProperties": open },
                ],
            }),
        ),
        (
            "copies for patterns",
            json!({ "properties": properties(1000, &open), "patternProperties": { "^p": large() } }),
        ),
        (
            "copies for items",
            json!({ "allOf": [{ "items": large() }, { "prefixItems": vec![open.clone(); 1000] }] }),
        ),
        (
            "pairs of patterns",
            json!({ "prefixItems": vec![json!({ "type": "object", "patternProperties": patterned(30) }); 200] }),
        ),
        (
            "long names",
            json!({
                "patternProperties": { "(a|b)*a(a|b){1000}$": {} }, "properties": { "ab".repeat(50_000): {} },
            }),
        ),
        (
            "conjunctions",
            json!({ "allOf": several(100, |n| json!({ "type": "string", "pattern": format!(".*{n}.*") })) }),
        ),
        (
            "bounded expressions",
            json!({ "prefixItems": several(5000, |n| json!({ "type": "string", "pattern": format!("{n}.{{400}}"), "maxLength": 500 })) }),
        ),
        (
            "digits",
            json!({ "prefixItems": several(1000, |n| json!({ "type": "number", "minimum": format!("{n}e-300").parse::<f64>().unwrap() })) }),
        ),
        ("constants", json!({ "prefixItems": several(25_000, |n| json!({ "const": format!("n{n}") })) })),
    ];
    costly.iter().for_each(costs_too_much);
    // Each type would be made a schema of, and each of those again.
    let twice =
        json!({ "type": ["object", "object"], "properties": { "a": { "type": ["object", "object"] } } });
    assert!(matches!(refusal(&twice), Some(Refusal::Invalid(_))));
}

#[test]
fn an_expression_that_costs_more_than_its_size_is_refused() {
    let costly = [
        ("classes", r"\w".repeat(250_000)),
        ("folded classes", format!("(?i){}", r"\pL".repeat(10_000))),
        ("parts that may be left out", "(ab)?".repeat(40_000)),
        ("alternatives", (0..20_000).map(|n| format!("[ab]{n}")).collect::<Vec<_>>().join("|")),
        ("brackets", format!("{}{}{}", "(".repeat(60), "[ab]".repeat(2000), "a)".repeat(60))),
    ];
    for (name, regex) in costly {
        assert_eq!(compile(&Source::Regex(regex)).err(), Some(too_large()), "{name}");
    }
}

#[test]
fn a_lark_grammar_that_costs_more_than_its_size_is_refused() {
    let joined = |sign: &str, not: &str| {
        let parts = (0..1000).map(|n| format!("{not}/.*{n}.*/")).collect::<Vec<_>>();
        format!("start: T\nT: {}", parts.join(sign))
    };
    let mut doubled = String::from("start: T30\nT0: /[ab]/\n");
    for number in 1..=30 {
        writeln!(doubled, "T{number}: T{0} T{0}", number - 1).unwrap();
    }
    let ignored = format!("%ignore {}\nT1: {}", "T1 ".repeat(50_000), "/[ab]/ ".repeat(1000));
    let rules: String = (1..2000).map(|n| format!("r{n}: r{}\n", n + 1)).collect();
    let costly = [
        ("terminals in terminals", doubled.clone()),
        (
            "terminals in a terminal",
            format!("start: T2\nT1: {}\nT2: {}", "/[ab]/ ".repeat(1000), "T1 ".repeat(50_000)),
        ),
        ("pieces", format!("start: \"a\"{}", "|\"a\"".repeat(120_000))),
        ("literals", format!("start: {}", (0..60_000).map(|n| format!("\"{n}\" ")).collect::<String>())),
        ("expressions", format!("start: {}", (0..20_000).map(|n| format!("/[ab]{n}/|")).collect::<String>())),
        (
            "parts of a text",
            format!("start: %regex {{ \"substring_chars\": \"{}\" }}", "abcab".repeat(20_000)),
        ),
        ("ranges of tokens", format!("start: <[{}0]>", "0-99999,".repeat(50_000))),
        (
            "grammars",
            format!(
                "start: {}",
                (0..300).map(|n| format!("%lark {{ start: \"a\"\n%ignore /{n}/\n }} ")).collect::<String>()
            ),
        ),
        (
            "schemas",
            format!("start: {}", format!("%json {} ", json!({ "enum": vec![1; 10_000] })).repeat(25)),
        ),
        ("terminals whose names have a hyphen", doubled.replace('T', "T-")),
        ("terminals that nothing parts", doubled.replace(" T", "\"a\"iT")),
        ("terminals in a rule that is one", doubled.replacen("start: T30", "start: ~(T30 T30)", 1)),
        ("statements", format!("start: \"a\"\n{ignored}")),
        ("conjunctions", joined(" & ", "")),
        ("complements", joined(" & ", "~")),
        (
            "some complements",
            format!("start: T\nT: /.*/{}", (0..30).map(|n| format!(" & ~/.*{n}.*/")).collect::<String>()),
        ),
        (
            "complements with names",
            format!("start: T\nA: /.*a.*/\nB: /.*b.*/\nT: /.*/{}", " & ~A & ~B".repeat(15)),
        ),
        ("parts that may be left out", format!("start: T\nT: {}", "\"a\"? ".repeat(20_000))),
        ("lines of errors", format!("start: r1\n{rules}r2000: {}missing", "\"a\" ".repeat(50_000))),
    ];
    for (name, lark) in costly {
        assert!(lark.len() < GrammarLimits::default().bytes_max, "{name}");
        assert_eq!(compile(&Source::Lark(lark)).err(), Some(too_large()), "{name}");
    }
}

#[test]
fn what_a_lark_grammar_may_not_have_is_refused_by_name() {
    let hidden = r"\w".repeat(100_000);
    let spaced = [
        Source::Lark(format!("start: /#{{\n{hidden}/x")),
        Source::Lark("start: /(?x)[#]\n]/".into()),
        Source::Regex(format!("(?x)#{{\n{hidden}")),
        Source::JsonSchema(json!({ "type": "string", "pattern": "(?sx:a #{\n)" }).to_string()),
    ];
    for source in spaced {
        let refusal = compile(&source).err();
        assert!(
            matches!(&refusal, Some(Refusal::Unsupported { keyword, .. }) if keyword == "the flag x"),
            "{refusal:?}"
        );
    }
    let refused = [
        ("%llguidance { \"allow_invalid_utf8\": true }\nstart: \"a\"", "allow_invalid_utf8"),
        ("start: @other", "@"),
    ];
    for (lark, name) in refused {
        let refusal = compile(&Source::Lark(lark.into())).err();
        assert!(
            matches!(&refusal, Some(Refusal::Unsupported { keyword, .. }) if keyword == name),
            "{refusal:?}"
        );
    }
    let known = "%llguidance { \"no_forcing\": true }\nstart: \"a\"";
    assert!(compile(&Source::Lark(known.into())).is_ok());
}

/// Large schemas and grammars as programs have them.
#[test]
fn what_is_large_and_honest_is_compiled() {
    let tool = |number: usize| {
        json!({
            "type": "object", "required": ["name", "arguments"], "additionalProperties": false,
            "properties": {
                "name": { "const": format!("tool_{number}") },
                "arguments": { "type": "object", "required": ["a", "b"], "properties": {
                    "a": { "type": "string", "maxLength": 100 }, "b": { "type": "integer", "minimum": 0 },
                    "c": { "type": "string", "pattern": "^[a-z]+(-[a-z0-9]+)*$" }, "d": { "enum": ["x", "y"] },
                } },
            },
        })
    };
    let base = json!({ "type": "object", "properties": properties(20, &json!({ "type": "string" })), "required": ["p0"] });
    let derived = several(60, |n| {
        json!({
            "allOf": [{ "$ref": "#/$defs/base" }, { "type": "object", "properties": { format!("q{n}"): { "type": "number" } } }],
        })
    });
    let schemas = [
        json!({ "oneOf": several(128, tool) }),
        json!({ "type": "object", "anyOf": several(128, tool) }),
        json!({ "anyOf": derived, "$defs": { "base": base } }),
        json!({ "type": "object", "properties": properties(500, &json!({ "type": ["string", "null"] })) }),
        json!({ "type": "object", "properties": properties(300, &json!({ "type": "string", "format": "date-time" })) }),
        json!({ "enum": texts(10_000, "value ") }),
        json!({ "allOf": several(100, |n| json!({ "type": "object", "properties": { format!("p{n}"): { "type": "string" } } })) }),
    ];
    for schema in schemas.into_iter().chain(as_programs_write()) {
        let shown: String = schema.to_string().chars().take(80).collect();
        assert_eq!(refusal(&schema), None, "{shown}");
    }
    let calls: String =
        (0..128).map(|n| format!("call{n}: \"<call {n}>\" %json {} \"</call>\"\n", tool(n))).collect();
    let any = (0..128).map(|n| format!("call{n}")).collect::<Vec<_>>().join(" | ");
    let lark = format!("start: ({any}){{1,4}} NAME\nNAME: /[a-z]+/ & ~(\"if\" | \"else\")\n{calls}");
    assert_eq!(compile(&Source::Lark(lark)).err(), None);
    let words: String = (0..200).map(|n| format!(" | word{n}")).collect();
    let rules: String =
        (0..200).map(|n| format!("word{n}: \"w{n}\" NAME | NAME* /[0-9]+/ (\",\" NAME)?\n")).collect();
    let names =
        "NAME: /[a-z]+/ & ~/if/ & ~/else/ & ~/while/ & ~\"for\" & ~IN & ~\"do\" & ~\"od\"\nIN: \"in\"\n";
    let own: String = (0..200).map(|n| format!("N{n}: /[a-z]+/ & ~\"w{n}\" & ~/if/ & ~/else/\n")).collect();
    let each: String = (0..200).map(|n| format!(" | \"<{n}>\" N{n}")).collect();
    let schema = json!({ "enum": texts(10_000, "value ") });
    let larks = [
        format!("start: \"a\"{words}\n{rules}{names}"),
        format!("start: \"a\"{each}\n{own}"),
        format!(
            "start: \"a\"{}\n{}w: %json {schema}",
            " | r0".repeat(500),
            (0..500).map(|n| format!("r{n}: \"{n}\"\n")).collect::<String>()
        ),
    ];
    for lark in larks {
        assert_eq!(compile(&Source::Lark(lark.clone())).err(), None, "{}", &lark[..80]);
    }
    let marked = (0..5000).map(|n| format!("{}{n}", ["-", "#", "("][n % 3])).collect();
    assert_eq!(compile(&Source::Choice(marked)).err(), None);
}

/// Schemas as libraries derive them from classes.
fn as_programs_write() -> Vec<Value> {
    let formats =
        ["uuid", "email", "date-time", "uri", "ipv4", "date", "time", "hostname", "duration", "ipv6"];
    let formatted = |n: usize| json!({ "type": "string", "format": formats[n % formats.len()] });
    let model = |number: usize, fields: &Value| {
        let required = (0..5).map(|n| format!("p{n}")).collect::<Vec<_>>();
        json!({ "title": format!("Model{number}"), "type": "object", "properties": fields, "required": required })
    };
    let fields: Value = (0..20).map(|n| (format!("p{n}"), formatted(n))).collect::<Map<_, _>>().into();
    let defs: Value = (0..50).map(|n| (format!("Model{n}"), model(n, &fields))).collect::<Map<_, _>>().into();
    let all: Value = (0..50)
        .map(|n| (format!("m{n}"), json!({ "anyOf": [{ "$ref": format!("#/$defs/Model{n}") }, { "type": "null" }], "default": null })))
        .collect::<Map<_, _>>()
        .into();
    let several_of = |format: &str| json!({ "properties": properties(1000, &json!({ "type": "string", "format": format })), "type": "object" });
    let constants = json!({ "type": "string", "pattern": "^[a-z]+ [0-9]+$", "enum": texts(1000, "value ") });
    vec![
        json!({ "$defs": defs, "type": "object", "properties": all }),
        several_of("uuid"),
        several_of("email"),
        constants,
    ]
}
