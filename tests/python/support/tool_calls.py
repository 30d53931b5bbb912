r"""Outputs of models with calls of tools, and what two other implementations read in them.

The record, tests/rust/output_calls.json, is compared with the daemon's parser by `cargo test --test
rust output_calls` and with mlx-lm and SGLang by tests/python/parity/test_tool_calls.py. The outputs
are written here by the forms that the models' chat templates show. After a change of a case:

    $(tests/python/venv.sh test) tests/python/support/tool_calls.py

mlx-lm is in the tests' environment. SGLang's parsers come without SGLang in a package that the
environment has no room for, since it wants another transformers; without it its calls in the record
stay as they are:

    pip install --no-deps --target DIR llm-router-utils==0.8.1 orjson partial-json-parser \
        openai==2.6.1 jiter distro sniffio msgspec
    PYTHONPATH=DIR $(tests/python/venv.sh test) tests/python/support/tool_calls.py
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().parents[2] / "rust" / "output_calls.json"

Call = dict[str, Any]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name}.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "ratio": {"type": "number"},
                    "exact": {"type": "boolean"},
                    "places": {"type": "array"},
                    "options": {"type": "object"},
                    "place": {"$ref": "#/$defs/Place"},
                    "unit": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}]},
                },
                "$defs": {
                    "Place": {"type": "object", "properties": {"city": {"type": "string"}}},
                    "Unit": {"enum": ["C", "F"]},
                },
            },
        },
    }
    for name in ("weather", "search-all", "maps_find")
]


def call(name: str, **arguments: Any) -> Call:
    return {"name": name, "arguments": arguments}


PARIS = call("weather", city="Paris", days=3)
NESTED = call(
    "maps_find",
    places=["a", {"b": [1, 2.5, None, True]}, []],
    options={"deep": {"er": {"est": [[{}]]}}, "n": -7},
)
SCENARIOS: dict[str, list[Call]] = {
    "one": [PARIS],
    "several": [PARIS, call("search-all", city="Rome"), call("weather", city="Oslo", days=1)],
    "nested": [NESTED],
    "unicode": [call("weather", city="Zürich 東京 😀 naïve")],
    "escapes": [call("weather", city='He said "hi"\\n\\ \t\nnext')],
    "no arguments": [call("weather")],
    "types": [call("weather", city="7", days=7, ratio=0.25, exact=False)],
    "braces": [call("weather", city="}{ ][ , : = ( ) ' `")],
    "tags": [call("weather", city="<b>5 < 6</b> [TOOL_CALLS] <x>")],
    "references": [call("weather", place={"city": "Rome"}, unit="C")],
    "falsy": [call("weather", city="", days=0, places=[], options={})],
}


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def hermes(calls: list[Call]) -> str:
    return "\n".join(f"<tool_call>\n{dumps(each)}\n</tool_call>" for each in calls)


def llama(calls: list[Call]) -> str:
    written = [{"name": each["name"], "parameters": each["arguments"]} for each in calls]
    return "<|python_tag|>" + ";".join(map(dumps, written))


def mistral_list(calls: list[Call]) -> str:
    return f"[TOOL_CALLS] {dumps(calls)}"


def mistral_heads(calls: list[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{each['name']}[ARGS]{dumps(each['arguments'])}" for each in calls)


def python_literal(value: Any) -> str:
    return dumps(value) if isinstance(value, (dict, list)) else repr(value)


def pythonic(calls: list[Call]) -> str:
    written = []
    for each in calls:
        pairs = (f"{key}={python_literal(value)}" for key, value in each["arguments"].items())
        written.append(f"{each['name']}({', '.join(pairs)})")
    return f"<|tool_call_start|>[{', '.join(written)}]<|tool_call_end|>"


def bare(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)


def tagged(call: Call, form: str) -> str:
    """The arguments of a call, each in a form with the fields `key` and `value`."""
    arguments = call["arguments"].items()
    return "".join(form.format(key=key, value=bare(value)) for key, value in arguments)


def glm4(calls: list[Call]) -> str:
    def one(each: Call) -> str:
        written = tagged(each, "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n")
        return f"<tool_call>{each['name']}\n{written}</tool_call>"

    return "\n".join(map(one, calls))


def qwen3_coder(calls: list[Call]) -> str:
    def one(each: Call) -> str:
        written = tagged(each, "<parameter={key}>\n{value}\n</parameter>\n")
        return f"<tool_call>\n<function={each['name']}>\n{written}</function>\n</tool_call>"

    return "\n".join(map(one, calls))


def minimax(calls: list[Call]) -> str:
    def one(each: Call) -> str:
        written = tagged(each, '<parameter name="{key}">{value}</parameter>\n')
        return f'<invoke name="{each["name"]}">\n{written}</invoke>\n'

    return f"<minimax:tool_call>\n{''.join(map(one, calls))}</minimax:tool_call>"


def deepseek_token(name: str) -> str:
    return f"<\uff5ctool\u2581{name}\uff5c>"


SECTION, SECTION_END, CALL, SEP, CALL_END = map(
    deepseek_token,
    ("calls\u2581begin", "calls\u2581end", "call\u2581begin", "sep", "call\u2581end"),
)


def deepseek_v3(calls: list[Call]) -> str:
    written = "\n".join(
        f"{CALL}function{SEP}{each['name']}\n```json\n{dumps(each['arguments'])}\n```{CALL_END}"
        for each in calls
    )
    return f"{SECTION}{written}{SECTION_END}"


def deepseek_v3_1(calls: list[Call]) -> str:
    written = (f"{CALL}{each['name']}{SEP}{dumps(each['arguments'])}{CALL_END}" for each in calls)
    return f"{SECTION}{''.join(written)}{SECTION_END}"


def kimi_k2(calls: list[Call]) -> str:
    written = "".join(
        f"<|tool_call_begin|>functions.{each['name']}:{number}<|tool_call_argument_begin|>"
        f"{dumps(each['arguments'])}<|tool_call_end|>"
        for number, each in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{written}<|tool_calls_section_end|>"


def gemma_value(value: Any, quote: str) -> str:
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, list):
        return f"[{','.join(gemma_value(each, quote) for each in value)}]"
    if isinstance(value, dict):
        members = (f"{key}:{gemma_value(each, quote)}" for key, each in value.items())
        return f"{{{','.join(members)}}}"
    return dumps(value)


def gemma4(calls: list[Call]) -> str:
    written = ((each["name"], gemma_value(each["arguments"], '<|"|>')) for each in calls)
    return "".join(f"<|tool_call>call:{name}{value}<tool_call|>" for name, value in written)


def function_gemma(calls: list[Call]) -> str:
    written = ((each["name"], gemma_value(each["arguments"], "<escape>")) for each in calls)
    return "".join(
        f"<start_function_call>call:{name}{value}<end_function_call>" for name, value in written
    )


def phi4(calls: list[Call]) -> str:
    return f"functools{dumps(calls)}"


def nemotron(calls: list[Call]) -> str:
    return f"<TOOLCALL>{dumps(calls)}</TOOLCALL>"


def harmony(calls: list[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{each['name']} <|constrain|>json<|message|>"
        f"{dumps(each['arguments'])}<|call|>"
        for each in calls
    )


THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"

# By format: how it is written, and how the two call it; `None` where it has no parser for it.
FORMS: list[tuple[str, Callable[[list[Call]], str], str | None, str | None]] = [
    ("hermes", hermes, "json_tools", "qwen25"),
    ("prompted", hermes, "json_tools", "hermes"),
    ("qwen3_coder", qwen3_coder, "qwen3_coder", "qwen3_coder"),
    ("llama3_json", llama, None, "llama3"),
    ("mistral", mistral_list, "mistral", "mistral"),
    ("mistral", mistral_heads, "mistral", "mistral"),
    ("pythonic", pythonic, "pythonic", "lfm2"),
    ("glm4", glm4, "glm47", "glm45"),
    ("deepseek_v3", deepseek_v3, None, "deepseekv3"),
    ("deepseek_v3_1", deepseek_v3_1, None, "deepseekv31"),
    ("kimi_k2", kimi_k2, "kimi_k2", "kimi_k2"),
    ("minimax_m2", minimax, "minimax_m2", "minimax-m2"),
    ("gemma4", gemma4, "gemma4", "gemma4"),
    ("function_gemma", function_gemma, "function_gemma", None),
    ("phi4", phi4, None, None),
    ("harmony", harmony, None, "gpt-oss"),
    ("nemotron", nemotron, None, None),
]


PARIS_JSON = dumps(PARIS)
DOUBLED = dumps({"name": "weather", "arguments": dumps(PARIS["arguments"])})
QUOTED = call("weather", city="</tool_call><tool_call>")
# Outputs that no template writes but models do, with what they should be.
ODD: list[tuple[str, str, str, list[Call], str | None, str | None]] = [
    ("hermes", "unclosed", f"<tool_call>\n{PARIS_JSON}\n", [PARIS], "json_tools", "hermes"),
    ("hermes", "one line", f"<tool_call>{PARIS_JSON}</tool_call>", [PARIS], "json_tools", "hermes"),
    ("hermes", "prose around", f"Look.\n{hermes([PARIS])}\nSo.", [PARIS], "json_tools", "qwen25"),
    ("hermes", "its own tag in a string", hermes([QUOTED]), [QUOTED], "json_tools", "qwen25"),
    ("hermes", "arguments as a string", f"<tool_call>{DOUBLED}</tool_call>", [PARIS], None, None),
    (
        "hermes",
        "broken",
        '<tool_call>\n{"name": weather}\n</tool_call>',
        [],
        "json_tools",
        "qwen25",
    ),
    ("llama3_json", "bare", llama([PARIS, PARIS])[14:], [PARIS, PARIS], None, "llama3"),
    ("llama3_json", "arguments", PARIS_JSON, [PARIS], None, "llama3"),
    ("mistral", "no space", f"[TOOL_CALLS][{PARIS_JSON}]", [PARIS], "mistral", "mistral"),
    ("mistral", "arguments as a string", f"[TOOL_CALLS][{DOUBLED}]", [PARIS], "mistral", None),
    ("mistral", "prose before", f"Look. {mistral_heads([PARIS])}", [PARIS], "mistral", "mistral"),
    ("pythonic", "double quotes", pythonic([PARIS]).replace("'", '"'), [PARIS], "pythonic", "lfm2"),
    (
        "pythonic",
        "JSON",
        f"<|tool_call_start|>[{PARIS_JSON}]<|tool_call_end|>",
        [PARIS],
        None,
        "lfm2",
    ),
    ("glm4", "4.7, one line", glm4([PARIS]).replace("\n", ""), [PARIS], "glm47", "glm47"),
    ("qwen3_coder", "no outer tag", qwen3_coder([PARIS])[12:-13], [PARIS], None, "qwen3_coder"),
    (
        "qwen3_coder",
        "a float that is an integer, a word of Python",
        qwen3_coder([call("weather", days="7.0", exact="True", options="{'a': None}")]),
        [call("weather", days=7, exact=True, options={"a": None})],
        "qwen3_coder",
        None,
    ),
    (
        "minimax_m2",
        "not of the type",
        minimax([call("weather", days="many", exact="perhaps")]),
        [call("weather", days="many", exact="perhaps")],
        "minimax_m2",
        "minimax-m2",
    ),
    (
        "kimi_k2",
        "no namespace",
        kimi_k2([PARIS]).replace("functions.", ""),
        [PARIS],
        "kimi_k2",
        "kimi_k2",
    ),
    (
        "deepseek_v3_1",
        "no outer end",
        deepseek_v3_1([PARIS]).removesuffix(SECTION_END),
        [PARIS],
        None,
        "deepseekv31",
    ),
    ("harmony", "thought before", THOUGHT + harmony([PARIS]), [PARIS], None, "gpt-oss"),
]


def mlx_calls(parser: str | None, output: str) -> list[Call] | None:
    """Returns what mlx-lm reads; None where it has no parser or fails."""
    if parser is None:
        return None
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    start, end = re.escape(module.tool_call_start), re.escape(module.tool_call_end)
    until = f"{end}|$" if end else f"(?={start})|$"
    calls: list[Call] = []
    for block in re.findall(f"{start}(.*?)(?:{until})", output, re.DOTALL):
        try:
            read = module.parse_tool_call(block, TOOLS)
        except Exception:  # whatever its parsers raise
            return None
        calls.extend(read if isinstance(read, list) else [read])
    return [{"name": each["name"], "arguments": each["arguments"]} for each in calls]


def sglang_calls(parser: str | None, output: str) -> list[Call] | None:
    """Returns what SGLang reads; None where it has no parser. ImportError if it is not here."""
    base = "llm_router_utils.sglang.srt"
    function_call = importlib.import_module(f"{base}.function_call.function_call_parser")
    protocol = importlib.import_module(f"{base}.entrypoints.openai.protocol")
    if parser is None:
        return None
    tools = [protocol.Tool.model_validate(tool) for tool in TOOLS]
    if parser == "gpt-oss":
        output = f"<|start|>assistant{output}"
    _, calls = function_call.FunctionCallParser(tools, parser).parse_non_stream(output)
    return [{"name": each.name, "arguments": json.loads(each.parameters)} for each in calls]


def cases() -> list[dict]:
    """Returns each scenario in each form, and the odd ones."""
    written = []
    for name, write, mlx, sglang in FORMS:
        for scenario, calls in SCENARIOS.items():
            output = write(calls)
            case = {"format": name, "case": f"{write.__name__}: {scenario}", "output": output}
            written.append({**case, "written": calls, "mlx": mlx, "sglang": sglang})
    for name, odd, output, calls, mlx, sglang in ODD:
        case = {"format": name, "case": f"odd: {odd}", "output": output}
        written.append({**case, "written": calls, "mlx": mlx, "sglang": sglang})
    return written


def record(old: dict[tuple[str, str], dict]) -> list[dict]:
    """Returns the record; SGLang's calls are those of the old one if it is not here."""
    entries = []
    for case in cases():
        case["mlx_lm"] = mlx_calls(case.pop("mlx"), case["output"])
        try:
            case["sglang"] = sglang_calls(case["sglang"], case["output"])
        except ImportError:
            case["sglang"] = old.get((case["format"], case["case"]), {}).get("sglang")
        entries.append(case)
    return entries


def recorded() -> dict[tuple[str, str], dict]:
    """Returns the record by format and case."""
    if not RECORD.exists():
        return {}
    entries = json.loads(RECORD.read_text(encoding="utf-8"))["cases"]
    return {(entry["format"], entry["case"]): entry for entry in entries}


def text(entries: list[dict]) -> str:
    """Returns a record's text, a case a line."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    return f'{{"tools": {json.dumps(TOOLS)}, "cases": [\n{lines}\n]}}\n'


def main() -> None:
    entries = record(recorded())
    RECORD.write_text(text(entries), encoding="utf-8")
    print(f"{len(entries)} cases")
    for entry in entries:
        for judge in ("mlx_lm", "sglang"):
            if entry[judge] is not None and entry[judge] != entry["written"]:
                print(f"{judge} differs: {entry['case']}: {dumps(entry[judge])}")


if __name__ == "__main__":
    main()
