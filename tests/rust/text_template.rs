//! Chat templates: their variables as in transformers, values printed as in Python, refusals; and the special
//! tokens that a model folder names. Real models' templates: tests/rust/text_parity.rs.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::path::Path;
use std::time::{Duration, SystemTime};

use mlxd::hub::read_text_files;
use mlxd::text::{ChatTemplate, Conversation, TextError, Tokenizer, eos_token_ids};
use serde_json::{Map, Value, json};

/// A model folder with a tokenizer of a few words and these further files.
fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let added = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": null, "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
        "added_tokens": [added(3, "<s>"), added(4, "</s>"), added(5, "<|end|>")],
        "post_processor": {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}},
        "model": {"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0, "hello": 1, "world": 2}},
    });
    write(folder.path(), "tokenizer.json", &tokenizer);
    for (name, content) in files {
        write(folder.path(), name, content);
    }
    folder
}

fn write(folder: &Path, name: &str, content: &Value) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
    std::fs::write(path, text).unwrap();
}

fn template(files: &[(&str, Value)]) -> Result<Option<ChatTemplate>, Box<dyn std::error::Error>> {
    let folder = folder(files);
    let files = read_text_files(folder.path())?;
    let tokenizer = Tokenizer::new(&files)?;
    Ok(ChatTemplate::new(&files, &tokenizer)?)
}

fn tokenizer(folder: &Path) -> Tokenizer {
    Tokenizer::new(&read_text_files(folder).unwrap()).unwrap()
}

#[derive(Default)]
struct Input {
    messages: Vec<Value>,
    tools: Vec<Value>,
    arguments: Map<String, Value>,
    add_generation_prompt: bool,
}

fn conversation(input: &Input) -> Conversation<'_> {
    let Input { messages, tools, arguments, add_generation_prompt } = input;
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_049_600);
    Conversation { messages, tools, arguments, add_generation_prompt: *add_generation_prompt, now }
}

fn render_with(template: &ChatTemplate, input: &Input) -> Result<String, String> {
    template.render(&conversation(input), usize::MAX).map_err(|error| error.to_string())
}

fn render(source: &str, input: &Input) -> Result<String, String> {
    render_with(&template(&[("chat_template.jinja", json!(source))]).unwrap().unwrap(), input)
}

/// Renders with `x` as an argument.
fn with_x(source: &str, x: Value) -> String {
    let arguments = Map::from_iter([("x".to_owned(), x)]);
    render(source, &Input { arguments, ..Input::default() }).unwrap()
}

#[test]
fn tojson_writes_what_python_does() {
    let x =
        json!({"b": "é<&>'\"\n\u{7}", "a": [1, 2.0, 1e16, 1e-5, 0.5, -0.0, true, null], "e": [], "o": {}});
    assert_eq!(
        with_x("{{ x | tojson }}", x.clone()),
        r#"{"b": "é<&>'\"\n\u0007", "a": [1, 2.0, 1e+16, 1e-05, 0.5, -0.0, true, null], "e": [], "o": {}}"#
    );
    assert_eq!(
        with_x("{{ {'k': x.a[:2], 'e': x.e} | tojson(indent=2) }}", x.clone()),
        "{\n  \"k\": [\n    1,\n    2.0\n  ],\n  \"e\": []\n}"
    );
    assert_eq!(with_x("{{ x.b | tojson(ensure_ascii=true) }}", x.clone()), r#""\u00e9<&>'\"\n\u0007""#);
    assert_eq!(with_x("{{ '😀' | tojson(ensure_ascii=True) }}", x), r#""\ud83d\ude00""#);
    assert_eq!(
        with_x("{{ x | tojson(separators=(',', ':'), sort_keys=true) }}", json!({"b": [1, 2], "a": 1})),
        r#"{"a":1,"b":[1,2]}"#
    );
}

#[test]
fn what_a_template_writes_is_bounded() {
    let mut deep = json!((0..200_000).collect::<Vec<u32>>());
    for _ in 0..100 {
        deep = json!([deep]);
    }
    let arguments = Map::from_iter([("x".to_owned(), deep)]);
    let refused = render("{{ x | tojson(indent=4) }}", &Input { arguments, ..Input::default() });
    assert!(refused.clone().is_err_and(|why| why.contains("tojson: more than")), "{refused:?}");

    let template =
        template(&[("chat_template.jinja", json!("{% for m in messages %}{{ m.content }}{% endfor %}"))]);
    let messages = vec![json!({ "role": "user", "content": "12345" }); 3];
    let input = Input { messages, ..Input::default() };
    let template = template.unwrap().unwrap();
    let text = |bytes_max| template.render(&conversation(&input), bytes_max);
    assert_eq!(text(15).unwrap(), "123451234512345");
    assert!(matches!(text(14), Err(TextError::TooLong { bytes_max: 14 })));
}

#[test]
fn values_print_as_in_python() {
    let x = json!({"a": [1, 2.0, true, null, "it's", "q\"", "\n é"], "f": 1e22});
    assert_eq!(
        with_x("{{ x }}|{{ x.f }}|{{ x.a[2] }}|{{ none }}|{{ missing }}", x),
        "{'a': [1, 2.0, True, None, \"it's\", 'q\"', '\\n é'], 'f': 1e+22}|1e+22|True|None|"
    );
    assert_eq!(with_x("{{ ('a',) }} {{ x.items() | list }}", json!({"k": 1})), "('a',) [('k', 1)]");
    assert_eq!(with_x("{{ x | string ~ '!' }}", json!([true])), "[True]!");
}

#[test]
fn blocks_are_trimmed_as_transformers_does() {
    assert_eq!(with_x("a\n  {% if true %}\n  b\n  {% endif %}\nc\n", Value::Null), "a\n  b\nc");
}

#[test]
fn python_methods_and_loop_controls_work() {
    let source = "{% for m in x %}{% if m == 'skip' %}{% continue %}{% elif m == 'end' %}{% break %}{% endif %}\
        {{ m.strip().upper() }},{% endfor %}{{ 'a-b'.split('-')[-1] }}{{ 'abc'.startswith('ab') }}{{ 'x'.lstrip('x') }}";
    assert_eq!(with_x(source, json!([" a ", "skip", "b", "end", "c"])), "A,B,bTrue");
    assert_eq!(
        with_x(
            "{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
            Value::Null
        ),
        "6"
    );
    assert_eq!(
        with_x(
            "{% for k, v in x.items() %}{{ k }}={{ v }};{% endfor %}{{ x.get('no', 'd') }}",
            json!({"items": 1, "keys": 2})
        ),
        "items=1;keys=2;d"
    );
    assert_eq!(
        with_x("{% for m in x[::-1] %}{{ loop.index0 }}{{ m }}{% endfor %}", json!(["a", "b"])),
        "0b1a"
    );
    assert_eq!(
        with_x("{{ x is mapping }}{{ x is sequence }}{{ none is iterable }}{{ 'a' is sequence }}", json!({})),
        "TrueTrueFalseTrue"
    );
    assert_eq!(with_x("a{%- generation -%} b {% endgeneration %}\nc", Value::Null), "ab c");
}

#[test]
fn the_time_is_formatted() {
    assert_eq!(with_x("{{ strftime_now('%Y %b') }}", Value::Null), "2023 Nov");
}

#[test]
fn a_refusal_carries_the_templates_message() {
    let error = render("{{ raise_exception('roles must alternate') }}", &Input::default()).unwrap_err();
    assert!(error.starts_with("roles must alternate"), "{error}");
}

#[test]
fn arguments_are_variables_but_do_not_replace_the_conversation() {
    let fixed = ["messages", "tools", "add_generation_prompt"].map(|name| (name.to_owned(), json!("forged")));
    let mut arguments = Map::from_iter(fixed);
    arguments.insert("enable_thinking".to_owned(), json!(false));
    let messages = vec![json!({"role": "user", "content": "hi"})];
    let input = Input { messages, arguments, ..Input::default() };
    let source = "{{ messages[0].content }} {{ tools }} {{ add_generation_prompt }} {{ enable_thinking }} {{ documents }}";
    assert_eq!(render(source, &input).unwrap(), "hi None False False None");
}

#[test]
fn messages_lose_nulls_and_reasoning_has_every_common_name() {
    let messages = vec![json!({"role": "assistant", "content": null, "reasoning": "hm"})];
    let source =
        "{{ messages[0].content is defined }} {{ messages[0].thinking }} {{ messages[0].reasoning_content }}";
    assert_eq!(render(source, &Input { messages, ..Input::default() }).unwrap(), "False hm hm");
}

#[test]
fn a_render_has_a_budget() {
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}";
    let growing = "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    for source in
        [endless, growing, "{{ 'a' * 99999999999 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"]
    {
        let error = render(source, &Input::default()).unwrap_err();
        assert!(!error.is_empty());
    }
    let nested =
        "{% set ns = namespace(s=[]) %}{% for i in range(9999) %}{% set ns.s = [ns.s] %}{% endfor %}";
    for print in ["{{ ns.s | tojson }}", "{{ ns.s }}", "{{ ns.s | string }}"] {
        assert!(render(&format!("{nested}{print}"), &Input::default()).unwrap_err().contains("nested"));
    }
}

#[test]
fn a_long_conversation_is_within_the_budget() {
    let source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}";
    let messages = vec![json!({"role": "user", "content": "word ".repeat(1000)}); 4000];
    let text = render(source, &Input { messages, ..Input::default() }).unwrap();
    assert_eq!(text.len(), 4000 * ("<|user|>".len() + 4999));
}

#[test]
fn a_template_is_found_where_models_keep_it() {
    let chat = |template: Value| json!({ "chat_template": template });
    let named =
        json!([{"name": "default", "template": "named"}, {"name": "tool_use", "template": "with tools"}]);
    let cases = [
        (vec![("tokenizer_config.json", chat(json!("config")))], "config", false),
        (vec![("tokenizer_config.json", chat(named))], "named", true),
        (vec![("chat_template.json", chat(json!("json")))], "json", false),
        (
            vec![
                ("chat_template.jinja", json!("jinja tools")),
                ("tokenizer_config.json", chat(json!("config"))),
            ],
            "jinja tools",
            true,
        ),
        (
            vec![
                ("chat_template.jinja", json!("j")),
                ("additional_chat_templates/tool_use.jinja", json!("with tools")),
            ],
            "j",
            true,
        ),
    ];
    for (files, text, uses_tools) in cases {
        let template = template(&files).unwrap().unwrap();
        assert_eq!(render_with(&template, &Input::default()).unwrap(), text);
        assert_eq!(template.uses_tools(), uses_tools, "{text}");
        let tools = vec![json!({})];
        let with_tools = render_with(&template, &Input { tools, ..Input::default() }).unwrap();
        assert_eq!(with_tools, if uses_tools && text != "jinja tools" { "with tools" } else { text });
    }
    assert!(template(&[]).unwrap().is_none());
    assert!(template(&[("tokenizer_config.json", chat(Value::Null))]).unwrap().is_none());
}

#[test]
fn damaged_templates_are_errors_that_name_the_file() {
    for (file, content) in [
        ("chat_template.jinja", json!("{% if %}")),
        ("chat_template.jinja", json!("{{ x ")),
        ("tokenizer_config.json", json!({"chat_template": 5})),
        ("tokenizer_config.json", json!({"chat_template": []})),
        ("tokenizer_config.json", json!("{\"chat_template\": ")),
    ] {
        let error = template(&[(file, content)]).unwrap_err().to_string();
        assert!(error.contains(file), "{error}");
    }
}

#[test]
fn special_tokens_are_variables() {
    let files = [
        (
            "chat_template.jinja",
            json!("{{ bos_token }}{{ eos_token }}{{ image_token }}{{ pad_token is defined }}"),
        ),
        ("special_tokens_map.json", json!({"bos_token": "no", "eos_token": {"content": "</s>"}})),
        (
            "tokenizer_config.json",
            json!({"bos_token": {"content": "<s>"}, "image_token": "<i>", "pad_token": null}),
        ),
    ];
    assert_eq!(
        render_with(&template(&files).unwrap().unwrap(), &Input::default()).unwrap(),
        "<s></s><i>False"
    );
}

#[test]
fn a_raw_prompt_gets_special_tokens_once() {
    let config = |extra: Value| {
        let mut config = json!({"bos_token": "<s>", "eos_token": "</s>"});
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let folder = folder(&[("tokenizer_config.json", config)]);
        tokenizer(folder.path())
    };
    let plain = config(json!({}));
    assert_eq!(
        plain.encode("hello world hello", false).unwrap(),
        [1, 2, 1],
        "the file's truncation is not ours"
    );
    assert_eq!(plain.encode_prompt("hello").unwrap(), [3, 1]);
    assert_eq!(plain.encode_prompt("<s>hello").unwrap(), [3, 1]);
    assert_eq!(plain.encode_prompt("nothing").unwrap(), [3, 0]);
    assert_eq!(plain.encode_prompt("").unwrap(), [3]);
    assert_eq!((plain.bos_token(), plain.eos_token_id(), plain.vocabulary_size()), (Some("<s>"), Some(4), 6));
    let without = config(json!({"add_bos_token": false}));
    assert_eq!(without.encode_prompt("hello").unwrap(), [1]);
    let both = config(json!({"add_bos_token": true, "add_eos_token": true}));
    assert_eq!(both.encode_prompt("hello").unwrap(), [3, 1, 4]);
}

#[test]
fn eos_ids_are_those_of_the_configs_and_of_the_tokenizer() {
    let folder = folder(&[("tokenizer_config.json", json!({"eos_token": "</s>"}))]);
    let tokenizer_with_eos = tokenizer(folder.path());
    let ids =
        |generation: Value, config: Value| eos_token_ids(&config, Some(&generation), &tokenizer_with_eos);
    assert_eq!(ids(json!({"eos_token_id": [9, 7]}), json!({"eos_token_id": 8})), [4, 7, 9]);
    assert_eq!(ids(json!({}), json!({"eos_token_id": 8})), [4, 8]);
    assert_eq!(ids(json!({}), json!({"eos_token_id": [4, -1, null]})), [4]);
    assert_eq!(ids(json!({}), json!({"text_config": {"eos_token_id": 5}})), [4, 5]);
    let bare = self::folder(&[]);
    assert!(eos_token_ids(&json!({}), None, &tokenizer(bare.path())).is_empty());
}
