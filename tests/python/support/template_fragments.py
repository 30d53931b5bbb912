"""Fragments of chat templates and what transformers renders of them.

The record, tests/rust/template_fragments.json, is compared with the daemon's renderer by
`cargo test --test rust fragments` and with transformers by tests/python/parity/test_templates.py.
After a change of the list:

    $(tests/python/venv.sh test) tests/python/support/template_fragments.py
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils.chat_template_utils import _compile_jinja_template

RECORD = Path(__file__).resolve().parents[2] / "rust" / "template_fragments.json"

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
# kwargs fail; `attr` reads items, and `~` writes 1e22 and 1e-7 without an exponent.
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
    "{{ n }}\n{{ n }}{# x #}\n{{ n }}",
    "{% if yes %}{{ 'a' }}\n{%- endif %}\n\nb",
]


def render(source: str) -> str | None:
    """Returns what transformers renders; None where it fails."""
    try:
        template = _compile_jinja_template(source)
        return template.render(
            messages=MESSAGES, tools=None, documents=None, add_generation_prompt=False, **VARIABLES
        )
    except Exception:  # whatever Jinja or Python call it
        return None


def record() -> dict:
    """Returns what the record should hold."""
    fragments = [{"source": source, "text": render(source)} for source in FRAGMENTS]
    return {"messages": MESSAGES, "variables": VARIABLES, "fragments": fragments}


def dumps(recorded: dict) -> str:
    """Returns the record's text, a fragment a line."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in recorded["fragments"]]
    head = {name: recorded[name] for name in ("messages", "variables")}
    body = json.dumps(head, ensure_ascii=False)[:-1]
    return body + ', "fragments": [\n' + ",\n".join(lines) + "\n]}\n"


def main() -> None:
    recorded = record()
    RECORD.write_text(dumps(recorded), encoding="utf-8")
    failed = [entry["source"] for entry in recorded["fragments"] if entry["text"] is None]
    print(f"{len(recorded['fragments'])} fragments; transformers refuses {len(failed)}:")
    print("\n".join(failed))


if __name__ == "__main__":
    main()
