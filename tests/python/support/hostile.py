"""Forms of answers that would take a long time or much memory where nothing bounds them."""

from __future__ import annotations

import json
from typing import Any

from mlxd.v1 import inference_pb2 as pb


def schema_format(schema: Any) -> pb.ResponseFormat:
    """Returns the format of a JSON schema."""
    return pb.ResponseFormat(json_schema=pb.JsonSchemaFormat(schema=json.dumps(schema)))


def tool(number: int) -> Any:
    """Returns the schema of one of many tools."""
    arguments = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}}
    return {
        "type": "object",
        "properties": {"name": {"const": f"tool_{number}"}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def nested(depth: int) -> Any:
    """Returns a oneOf within a oneOf, and so on."""
    schema: Any = {"type": "string"}
    for level in range(depth):
        schema = {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"k": {"const": level}, "v": schema},
                    "required": ["k", "v"],
                },
                {"type": "integer"},
            ]
        }
    return schema


HOSTILE = {
    "128 tools": schema_format({"anyOf": [tool(number) for number in range(128)]}),
    "maxLength": schema_format({"type": "string", "maxLength": 100_000}),
    "nested oneOf": schema_format(nested(12)),
    "40 optional": schema_format(
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(40)}}
    ),
    "recursive": schema_format(
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}
    ),
    "endless": schema_format(
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    ),
    "regex": pb.ResponseFormat(regex="((a+)+)+b"),
    "large regex": pb.ResponseFormat(regex="(a{1000}){1000}"),
    "ambiguous": pb.ResponseFormat(grammar='start: start start | "a"'),
    "nothing": pb.ResponseFormat(grammar="start: start"),
    "5 MB": schema_format({"enum": ["x" * 50 + str(n) for n in range(80_000)]}),
}
