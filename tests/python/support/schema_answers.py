"""Requests for structured output of the tiny model, and what their answers have to be."""

from __future__ import annotations

import json
import sys
from typing import Any

import jsonschema
import jsonschema_rs

from mlxd.v1 import inference_pb2 as pb
from wire import Wire

PROMPT = list(range(60, 70))
TOKENS = 600
HOT = {"temperature": 1.5}
INVALID = (jsonschema.ValidationError, jsonschema_rs.ValidationError)


def ask(wire: Wire, answer: pb.ResponseFormat | None, seed: int = 1, **fields: Any) -> Any:
    """Generates one answer of the form."""
    sampling = {**HOT, "seed": seed, **fields.pop("sampling", {})}
    ids = None if "chat" in fields else PROMPT
    fields = {"max_tokens": TOKENS, "ignore_eos": answer is None, **fields}
    return wire.generate("tiny", ids, sampling=sampling, response_format=answer, **fields)


def bounded(digits: str) -> float:
    """Returns a number as a float, the largest for those beyond: the crate has no infinity."""
    return max(-sys.float_info.max, min(float(digits), sys.float_info.max))


def is_whole(schema: Any, reply: Any, tokens: int = TOKENS) -> bool:
    """Checks an answer against its schema, unless it was cut; returns whether it is whole.

    Two validators judge: Python's, formats included, and as `jsonschema_rs` the Rust crate.
    """
    assert reply.finish_reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
    if reply.finish_reason == pb.FINISH_REASON_LENGTH:
        assert reply.usage.completion_tokens == tokens
        return False
    value = json.loads(reply.text, parse_float=bounded)
    jsonschema_rs.Draft202012Validator(schema).validate(value)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)
    return True
