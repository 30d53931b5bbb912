r"""Fragments of chat templates and what transformers renders of them.

The records, tests/rust/template_fragments.json (written by hand) and template_grammar.json (drawn
by template_grammar), are compared with the daemon's renderer by `cargo test --test rust fragments`
and with transformers by tests/python/parity/test_templates.py. After a change of a list:

    $(tests/python/venv.sh test) tests/python/support/template_fragments.py

More of the grammar, compared with the daemon's renderer only:

    $(tests/python/venv.sh test) tests/python/support/template_fragments.py --seed 7 --count 20000 \
        --out FILE
    MLXD_TEMPLATE_RECORD=FILE cargo test --test rust drawn
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

from transformers.utils.chat_template_utils import _compile_jinja_template

import template_grammar

RUST = Path(__file__).resolve().parents[2] / "rust"
RECORD = RUST / "template_fragments.json"
GRAMMAR_RECORD = RUST / "template_grammar.json"
SEED = 1
COUNT = 1500
ENVIRONMENT = _compile_jinja_template("").environment

CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2, "raw": None}},
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What's the weather?\n"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"t": 21.5}', "name": "weather", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt's 21.5 °C."},
    {"role": "user", "content": "Thanks"},
]
# Known and left: `callable`, `xmlattr`, `random`, `pprint`, `{!r}`, `\\N{…}`, a macro's varargs and
# kwargs fail; `attr` reads items.
VARIABLES = {
    "s": "Hello, World",
    "t": "  padded \n",
    "u": "naïve Straße ÉCOLE",
    "empty": "",
    "digits": "1234",
    "csv": "a,b,,c",
    "lines": "one\ntwo\r\nthree\n\nfour\n",
    "html": "<a href='x'>&\"</a>",
    "n": 7,
    "neg": -7,
    "f": 2.5,
    "whole": 3.0,
    "tiny": 1e-7,
    "huge": 1e22,
    "zero": 0,
    "yes": True,
    "no": False,
    "nil": None,
    "l": [3, 1, 2],
    "ls": ["b", "a", "C"],
    "nested": [[1, [2]], ["x", None]],
    "d": {"b": 1, "a": [True, None], "c": {"k": "v"}},
    "objs": [
        {"name": "x", "n": 2, "tags": ["p", "q"]},
        {"name": "Y", "n": 1, "tags": []},
        {"name": "x", "n": 3, "tags": ["p"]},
    ],
    "schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": 'A "city"\nor town'}},
        "required": ["city"],
    },
}

# Those of one line are in the file, a line each; here are those about the ends of lines.
FRAGMENTS = [
    *(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").strip("\n").split("\n")),
    "a\n{% if yes %}\nb\n{% endif %}\nc\n",
    "a\n  {% if yes %}\n  b\n  {% endif %}  \nc\n\n",
    "  {{ n }}  \n  {# c #}\n  x\n",
    "{% for x in l %}\n{{ x }}\n{% endfor %}\n",
    "{% for x in l -%}\n  {{ x }}\n{%- endfor %}\n",
    "{%- set x = 1 -%}\n\n  {{ x }}\n  {%- set y = 2 %}\n{{ y }}",
    "a {%- if yes -%} b {%- endif -%} c",
    "a\r\n{% if yes %}\r\nb\r\n{% endif %}\r\nc",
    "\n\n{{ n }}\n\n\n",
    "{%+ if yes %}\n  a\n  {%+ endif %}\nb",
    "{% set x %}\n  a\n{% endset %}\n[{{ x }}]",
    "{{ [\n  1,\n  2\n] }}{{ {\n 'a': 1\n}['a'] }}",
    "{% macro m(x) %}\n  {{ x }}\n{% endmacro %}\n{{ m(1) }}|",
    "{% generation %}a{% endgeneration %}b",
    "{%- generation -%}\n a \n{%- endgeneration -%}\nb",
    "{{ 'multi\nline' }}",
    "{% raw %}\n{{ a }}\n{% endraw %}\nb",
    "{%raw%}\nx{%endraw%}\ny",
    "{% raw -%}\n a {%- endraw %}b",
    "  {%- raw %}\n  {{ x }}\n  {% endraw %}\n z",
    "{% set ns = namespace() %}\n{% set ns.a | upper %}\n a\n{% endset -%}\n{{ ns.a }}",
    "{% macro m(a, b=a[0]) -%}\n {{ b }}\n{% endmacro %}\n{{ m('xy') }}{{ m('xy', none) }}",
    "{{ n }}\n{{ n }}{# x #}\n{{ n }}",
    "{% if yes %}{{ 'a' }}\n{%- endif %}\n\nb",
]


def render(source: str) -> str | None:
    """Returns what transformers renders; None where it fails."""
    variables = copy.deepcopy({"messages": MESSAGES, **VARIABLES})
    try:
        template = ENVIRONMENT.from_string(source)
        return template.render(tools=None, documents=None, add_generation_prompt=False, **variables)
    except Exception:  # whatever Jinja or Python call it
        return None


def record() -> dict:
    """Returns what the record of fragments should hold."""
    return recorded({source: render(source) for source in FRAGMENTS})


def grammar_record(seed: int = SEED, count: int = COUNT) -> dict:
    """Returns what the record of the grammar should hold: what transformers renders."""
    rendered = ((source, render(source)) for source in template_grammar.templates(seed, count))
    # Some objects are printed with their addresses.
    stable = {
        source: text
        for source, text in rendered
        if text is not None and " at 0x" not in text.lower()
    }
    return recorded(stable)


def recorded(rendered: dict[str, str | None]) -> dict:
    fragments = [{"source": source, "text": text} for source, text in rendered.items()]
    return {"messages": MESSAGES, "variables": VARIABLES, "fragments": fragments}


def dumps(recorded: dict) -> str:
    """Returns a record's text, a fragment a line."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in recorded["fragments"]]
    head = {name: recorded[name] for name in ("messages", "variables")}
    body = json.dumps(head, ensure_ascii=False)[:-1]
    return body + ', "fragments": [\n' + ",\n".join(lines) + "\n]}\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    drawn = grammar_record(arguments.seed, arguments.count)
    (arguments.out or GRAMMAR_RECORD).write_text(dumps(drawn), encoding="utf-8")
    print(f"{len(drawn['fragments'])} drawn templates")
    if arguments.out:
        return
    by_hand = record()
    RECORD.write_text(dumps(by_hand), encoding="utf-8")
    failed = [entry["source"] for entry in by_hand["fragments"] if entry["text"] is None]
    print(f"{len(by_hand['fragments'])} fragments; transformers refuses {len(failed)}:")
    print("\n".join(failed))


if __name__ == "__main__":
    main()
