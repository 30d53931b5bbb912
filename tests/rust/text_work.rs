//! What a template does with values that share their items is within its budget.

use serde_json::json;

use crate::text_template::{refused, with_x};

#[test]
fn values_that_share_their_items_are_compared_and_printed_within_the_budget() {
    // Two lists of 2^40 items each, made of 40, and mappings likewise.
    let doubled = "{% set ns = namespace(a=[], b=[], c={}, d={}) %}{% for i in range(40) %}\
        {% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}\
        {% set ns.c = {1: ns.c, 2: ns.c} %}{% set ns.d = {1: ns.d, 2: ns.d} %}{% endfor %}\
        {% set a, b, c, d, n = ns.a, ns.b, ns.c, ns.d, 1 %}";
    let compared = [
        "a == b",
        "a != b",
        "c == d",
        "a < b",
        "a <= b",
        "a > b",
        "a >= b",
        "n < a == b",
        "a in [n, b]",
        "a not in (b,)",
        "a in [[b]] | map('first')",
        "a in {n: n, 2: 2}",
        "[n, b].index(a)",
        "[n, b].count(a)",
        "a is eq b",
        "a is ne(b)",
        "a is ge b",
        "a is in [b]",
        "[a] | select('==', b) | list",
        "[{'k': a}] | selectattr('k', 'eq', b) | list",
        "[a, b] | sort",
        "[a, b] | min",
        "[a, b] | unique | list",
        "[{'k': a}, {'k': b}] | sort(attribute='k')",
        "[namespace(k=a), namespace(k=b)] | max(attribute='k')",
        "[{'k': a}, {'k': b}] | groupby('k')",
        "{a: 1} | dictsort",
        "{a: n, b: n}",
        "{1: n, 2: n}[a]",
        "{1: n, 2: n}.get(a)",
        "{1: n, 2: n} | attr(a)",
        "[{1: n, 2: n}] | map(attribute=a) | list",
        "'{}'.format(a)",
        "'{a}'.format(a=a)",
        "'{a}'.format_map({'a': a})",
        "'x'.join([a, n])",
    ];
    let looped = "{% for x in [a, b] %}{{ loop.changed(x) }}{% endfor %}";
    let sources = compared.iter().map(|expression| format!("{{{{ {expression} }}}}"));
    for source in sources.chain([looped.to_owned()]) {
        let refused = refused(&format!("{doubled}{source}"));
        assert!(refused.contains("too much work"), "{source}: {refused}");
    }
    let in_text = refused(&format!("{doubled}{{{{ a in 'abc' }}}}"));
    assert!(in_text.contains("only a text"), "{in_text}");
    // What is small is compared as ever, and a comparison takes nothing from a generator.
    let small = "{% set l = x | map('upper') %}{{ l == l, l | list, x == ['a', 'b'], \
        x[1] not in x, x[0] in 'abc', {x[0]: x} == {'a': x}, x[n | default(1)] }}";
    assert_eq!(with_x(small, json!(["a", "b"])), "(True, ['A', 'B'], True, False, True, True, 'b')");
}
