"""JSON schemas of tools and APIs, as real ones are, from the short notation of `data/apis.txt`.

One schema a line, `name: fields`. A field is `name type` or `name? type`, fields are separated by
commas. Types: `s` text and `s3-20` text of such a length, `i` and `i1-10` integers, `n0-1`
numbers, `b`, `null`, `d` JSON of any kind but short; `a|b|c` one of these texts; `=v` a constant;
`@date` a format; `/regex/` a pattern; `[type]` and `[type]2-4` lists; `{fields}` objects; `~type`
that or null; `(type;type)` one of several; `<type>` and `<type>1-3` objects with any names and
such values; `&name` a reference to the schema's definitions, which follow as `&name: {fields}`
after a semicolon.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1] / "data" / "apis.txt"
TEXT = 12
ITEMS = 3


class Reader:
    """Reads one line of the notation."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def peek(self) -> str:
        """Returns the next character that is not a space; empty at the end."""
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, mark: str) -> bool:
        """Takes a mark if it comes next."""
        if self.peek() != mark:
            return False
        self.at += 1
        return True

    def match(self, pattern: str) -> re.Match[str] | None:
        """Takes what a pattern matches here."""
        found = re.compile(pattern).match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def fields(self, end: str) -> dict[str, Any]:
        """Reads the fields of an object, up to its end."""
        properties: dict[str, Any] = {}
        required = []
        while not self.take(end):
            self.peek()
            found = self.match(r"([\w$.-]+)(\??) ")
            assert found, f"a field at {self.text[self.at :]!r}"
            properties[found[1]] = self.type()
            if not found[2]:
                required.append(found[1])
            self.take(",")
        schema = {"type": "object", "properties": properties, "additionalProperties": False}
        return {**schema, "required": required} if required else schema

    def bounds(self, low: str, high: str) -> dict[str, Any]:
        """Reads `1-10`, whose numbers may be negative or fractions."""
        found = self.match(r"(-?[\d.]+)-(-?[\d.]+)")
        if not found:
            return {}
        numbers = [float(text) if "." in text else int(text) for text in found.groups()]
        return {low: numbers[0], high: numbers[1]}

    def type(self) -> dict[str, Any]:
        """Reads a type."""
        if self.take("{"):
            return self.fields("}")
        if self.take("["):
            items = self.type()
            assert self.take("]")
            bounds = self.bounds("minItems", "maxItems") or {"maxItems": ITEMS}
            return {"type": "array", "items": items, **bounds}
        if self.take("<"):
            values = self.type()
            assert self.take(">")
            names = {"^[a-z]{1,6}$": values}
            bounds = self.bounds("minProperties", "maxProperties") or {"maxProperties": ITEMS}
            bounds.pop("minProperties", None)
            rest = {"patternProperties": names, "additionalProperties": False}
            return {"type": "object", **rest, **bounds}
        if self.take("("):
            options = [self.type()]
            while self.take(";"):
                options.append(self.type())
            assert self.take(")")
            return {"anyOf": options}
        if self.take("~"):
            return {"anyOf": [self.type(), {"type": "null"}]}
        return self.word()

    def word(self) -> dict[str, Any]:
        """Reads a type that is a word."""
        if found := self.match(r"/((?:[^/\\]|\\.)+)/"):
            return {"type": "string", "pattern": f"^(?:{found[1]})$"}
        if found := self.match(r"@([a-z0-9-]+)"):
            return {"type": "string", "format": found[1], "maxLength": 80}
        if found := self.match(r"&(\w+)"):
            return {"$ref": f"#/$defs/{found[1]}"}
        if found := self.match(r"=([\w.:/-]+)"):
            return {"const": int(found[1]) if found[1].isdigit() else found[1]}
        if found := self.match(r"[\w.+:/-]+(?:\|[\w.+:/-]+)+"):
            return {"type": "string", "enum": found[0].split("|")}
        if self.match(r"null\b"):
            return {"type": "null"}
        found = self.match(r"[sinb]")
        assert found, f"a type at {self.text[self.at :]!r}"
        if found[0] == "s":
            return {
                "type": "string",
                **(self.bounds("minLength", "maxLength") or {"maxLength": TEXT}),
            }
        if found[0] == "b":
            return {"type": "boolean"}
        kind = "integer" if found[0] == "i" else "number"
        limits = self.bounds("minimum", "maximum") or {"minimum": -1000, "maximum": 1000}
        return {"type": kind, **limits}


def _schema(line: str) -> tuple[str, dict[str, Any]]:
    head, *definitions = line.split(" ;; ")
    name, fields = head.split(": ", 1)
    schema = Reader(fields + "}").fields("}")
    if definitions:
        named = (definition.split(": ", 1) for definition in definitions)
        schema["$defs"] = {key.lstrip("&"): Reader(text).type() for key, text in named}
    return name, schema


@cache
def api_schemas() -> dict[str, dict[str, Any]]:
    """Returns the schemas by name."""
    lines = [line for line in DATA.read_text().splitlines() if line and not line.startswith("#")]
    schemas = dict(map(_schema, lines))
    assert len(schemas) == len(lines), "names are unique"
    return schemas
