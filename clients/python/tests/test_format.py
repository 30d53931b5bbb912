"""The forms of an answer: what Python programs give becomes the request's message."""

from __future__ import annotations

import json
from typing import Any

import pytest

import mlxd
from mlxd import _convert as convert
from mlxd.v1 import inference_pb2 as pb

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


class Model:
    """Looks like a class of pydantic."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        """Returns the schema."""
        return SCHEMA


def sent(given: Any) -> pb.ResponseFormat:
    """Returns what a generation sends."""
    request = convert.generate_request(
        model="m",
        session="",
        prompt="p",
        messages=None,
        token_ids=None,
        options={"response_format": given},
    )
    return request.response_format


@pytest.mark.parametrize(
    "given",
    [
        SCHEMA,
        Model,
        {"type": "json_schema", "json_schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}},
    ],
)
def test_a_schema_is_sent_as_json(given: Any) -> None:
    assert json.loads(sent(given).json_schema.schema) == SCHEMA


def test_the_other_forms_are_sent_as_they_are() -> None:
    assert sent("json_object").WhichOneof("format") == "json_object"
    assert sent({"type": "json_object"}).WhichOneof("format") == "json_object"
    assert sent({"type": "regex", "regex": "a+"}).regex == "a+"
    assert sent({"type": "grammar", "grammar": "start: A"}).grammar == "start: A"
    assert list(sent({"type": "choice", "choice": ["a", "b"]}).choice.texts) == ["a", "b"]
    own = pb.ResponseFormat(regex="b")
    assert sent(own) == own
    assert not convert.generate_request(
        model="m", session="", prompt="p", messages=None, token_ids=None, options={}
    ).HasField("response_format")


@pytest.mark.parametrize(
    "given",
    [
        "json",
        7,
        {"type": "regex"},
        {"type": "regex", "regex": "a", "more": 1},
        {"type": "regex", "regex": 7},
        {"type": "choice", "choice": 7},
        {"type": "object", "const": float("nan")},
        {"type": "object", "default": object()},
    ],
)
def test_what_is_no_form_is_refused(given: Any) -> None:
    with pytest.raises(mlxd.InvalidRequestError) as refusal:
        sent(given)
    assert refusal.value.field_violations[0].field.startswith("response_format")
