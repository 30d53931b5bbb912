"""The form of an answer, from a schema, a pydantic class, or dicts as OpenAI's API has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlxd.errors import invalid
from mlxd.v1 import inference_pb2 as pb

_FIELD = "response_format"
_TAGS = ("json_object", "json_schema", "regex", "grammar", "choice")


def response_format(given: Any) -> pb.ResponseFormat:
    """Builds the form of an answer.

    Raises:
        InvalidRequestError: the value is none of those that are taken.
    """
    if isinstance(given, pb.ResponseFormat):
        return given
    if given == "json_object":
        return _tagged(given, {})
    schema_of = getattr(given, "model_json_schema", None)
    if callable(schema_of):
        return _of_schema(schema_of())
    if not isinstance(given, Mapping):
        raise invalid(
            _FIELD, f"expected a schema, a class that has one, or a format; got {given!r}"
        )
    kind = given.get("type")
    if kind not in _TAGS:
        return _of_schema(given)
    return _tagged(str(kind), given)


def set_format(request: pb.GenerateRequest, given: Any) -> None:
    """Sets the form of a request's answer; None leaves it unset."""
    if given is not None:
        request.response_format.CopyFrom(response_format(given))


def _tagged(kind: str, given: Mapping[str, Any]) -> pb.ResponseFormat:
    """Builds `{"type": kind, kind: value}`, as OpenAI's API and its relatives write it."""
    if kind == "json_object":
        return pb.ResponseFormat(json_object=pb.JsonObjectFormat())
    unknown = given.keys() - {"type", kind}
    if unknown or kind not in given:
        raise invalid(_FIELD, f"{kind} needs the key {kind!r}, and no other")
    value = given[kind]
    if kind == "json_schema":
        # OpenAI puts the schema beside a name.
        is_named = isinstance(value, Mapping) and isinstance(value.get("schema"), Mapping)
        return _of_schema(value["schema"] if is_named else value)
    try:
        if kind == "choice":
            return pb.ResponseFormat(choice=pb.ChoiceFormat(texts=list(value)))
        return pb.ResponseFormat(**{kind: value})
    except (TypeError, ValueError) as error:
        raise invalid(f"{_FIELD}.{kind}", str(error)) from error


def _of_schema(schema: Any) -> pb.ResponseFormat:
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise invalid(f"{_FIELD}.json_schema.schema", str(error)) from error
    return pb.ResponseFormat(json_schema=pb.JsonSchemaFormat(schema=text))
