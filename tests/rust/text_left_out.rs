//! Messages, tools and arguments that a chat template would leave out are refused.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use serde_json::{Map, Value, json};

use crate::text_template::{Input, jinja, render, render_with, said, template, writing};

#[test]
fn arguments_without_effect_are_refused() {
    let refusal = |source: &str, name: &str| {
        let arguments = Map::from_iter([(name.to_owned(), json!("x"))]);
        render(source, &Input { arguments, ..Input::default() }).unwrap_err()
    };
    let source = "{{ messages }}{{ tools }}{{ a.unread }}{{ add_generation_prompt }}{{ 'unread' }}{{ bos_token }}\
        {% set c = b | default(range(1)) %}{% for d in c if d is defined %}{{ d ~ loop.index }}{% endfor %}";
    for name in ["unread", "continue_final_message", "tokenize"] {
        let error = refusal(source, name);
        assert!(error.ends_with(&format!("has no variable {name}; it reads a, b, bos_token")), "{error}");
    }
    assert!(refusal("a", "x").ends_with("has no variable x; it reads none"));
    let many: String = (10..35).map(|index| format!("{{{{ a{index} }}}}")).collect();
    assert!(refusal(&many, "x").ends_with(
        "it reads a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, \
        a21, a22, a23, a24, a25, a26, a27, a28, a29 and 5 more"
    ));
    for name in ["messages", "tools", "add_generation_prompt", "strftime_now"] {
        assert_eq!(refusal(source, name), format!("{name} is set by the daemon"));
    }
}

#[test]
fn a_developer_message_is_a_system_message_where_only_those_are_known() {
    let messages = vec![said("developer", "d"), said("user", "u")];
    let input = Input { messages, ..Input::default() };
    assert_eq!(render(&writing(&["system", "user"]), &input).unwrap(), "<system>d<user>u");
    assert_eq!(render(&writing(&["system", "developer", "user"]), &input).unwrap(), "<developer>d<user>u");
    let strict = "{% for m in messages %}{{ raise_exception('no') if m.role == 'developer' }}{{ m.role }}{{ m.content }}{% endfor %}";
    assert_eq!(render(strict, &input).unwrap(), "systemduseru");
}

#[test]
fn a_message_that_the_template_leaves_out_is_refused() {
    let conversation =
        |role| vec![said("user", "u"), said("assistant", "a"), said(role, "x"), said("user", "u")];
    for role in ["system", "developer", "tool"] {
        let input = Input { messages: conversation(role), ..Input::default() };
        let error = render(&writing(&["user", "assistant"]), &input).unwrap_err();
        assert_eq!(error, format!("the model's chat template leaves out messages of role {role}"));
    }
    let first = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}\
        {% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}";
    let late = render(first, &Input { messages: conversation("system"), ..Input::default() }).unwrap_err();
    assert!(late.ends_with("of role system after the first"), "{late}");
    let early = vec![said("system", "s"), said("user", "u")];
    assert_eq!(render(first, &Input { messages: early, ..Input::default() }).unwrap(), "su");
    assert!(jinja(first).writes_system() && !jinja(&writing(&["user"])).writes_system());
}

#[test]
fn a_later_developer_message_has_the_fate_of_its_place() {
    let later = vec![said("developer", "d"), said("user", "u"), said("developer", "e"), said("user", "v")];
    let later = Input { messages: later, ..Input::default() };
    let first = Input { messages: vec![said("developer", "d"), said("user", "u")], ..Input::default() };
    let of = |opening: &str, rest: &str| {
        format!(
            "{{% if messages[0].role in {opening} %}}<{{{{ messages[0].role }}}}>{{{{ messages[0].content }}}}\
             {{% endif %}}{{% for m in messages %}}{{% if m.role in {rest} and not (loop.first and m.role in {opening}) %}}\
             <{{{{ m.role }}}}>{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
        )
    };
    let only_first = of("['system', 'developer']", "['user', 'assistant']");
    assert_eq!(render(&only_first, &first).unwrap(), "<developer>d<user>u");
    assert!(render(&only_first, &later).unwrap_err().ends_with("of role developer after the first"));
    let system_first = of("['system']", "['user', 'assistant']");
    assert_eq!(render(&system_first, &first).unwrap(), "<system>d<user>u");
    assert!(render(&system_first, &later).unwrap_err().ends_with("of role developer after the first"));
    let system_later = of("['system', 'developer']", "['user', 'assistant', 'system']");
    assert_eq!(render(&system_later, &later).unwrap(), "<developer>d<user>u<system>e<user>v");
}

#[test]
fn tools_that_are_written_only_with_a_system_message_or_only_without_are_refused_elsewhere() {
    let tools = vec![json!({"type": "function", "function": {"name": "f"}})];
    let input = |first: &str| {
        let messages = vec![said(first, "s"), said("user", "u")];
        Input { messages, tools: tools.clone(), ..Input::default() }
    };
    let of = |with: &str, without: &str| {
        format!(
            "{{% if messages[0].role == 'system' %}}{with}{{% else %}}{without}{{% endif %}}\
             {{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
        )
    };
    let written = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}";
    let (with, without) = (of(written, ""), of("", written));
    assert_eq!(render(&with, &input("system")).unwrap(), "fsu");
    assert!(render(&with, &input("user")).unwrap_err().ends_with("where the first message is of role user"));
    assert_eq!(render(&without, &input("user")).unwrap(), "fsu");
    assert!(render(&without, &input("system")).unwrap_err().ends_with("first message is of role system"));
    assert!(jinja(&with).writes_tools() && jinja(&without).writes_tools());
}

#[test]
fn messages_that_only_one_of_two_templates_writes_are_refused_with_the_other() {
    let tool_use = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}{{ tools }}";
    let files = |default: &str, tool_use: &str| {
        [
            ("chat_template.jinja", json!(default)),
            ("additional_chat_templates/tool_use.jinja", json!(tool_use)),
        ]
    };
    let template = template(&files(&writing(&["system", "user"]), tool_use)).unwrap();
    let refused = |role: &str, tools: Vec<Value>| {
        let messages = vec![said(role, "x"), said("user", "u")];
        let rendered = render_with(&template, &Input { messages, tools, ..Input::default() });
        rendered.is_err_and(|error| error.ends_with(&format!("leaves out messages of role {role}")))
    };
    let tools = || vec![json!({"type": "function", "function": {"name": "f"}})];
    assert!(!refused("system", vec![]) && refused("system", tools()));
    assert!(refused("tool", vec![]) && !refused("tool", tools()));
}

#[test]
fn tools_that_the_template_leaves_out_are_refused() {
    let tools = vec![json!({"type": "function", "function": {"name": "f"}})];
    let input = Input { messages: vec![said("user", "u")], tools, ..Input::default() };
    let ignores = "{# tools #}{% for m in messages %}{{ m.content }}{% endfor %}{{ 'tools' if tools }}";
    assert!(render(ignores, &input).unwrap_err().ends_with("writes no tools"));
    assert!(!jinja(ignores).writes_tools());
    let in_system =
        "{% for m in messages %}{{ m.content }}{% if m.role == 'system' %}{{ tools }}{% endif %}{% endfor %}";
    assert!(jinja(in_system).writes_tools());
}
