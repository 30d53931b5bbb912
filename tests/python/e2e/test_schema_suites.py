"""The JSON Schema Test Suite: each schema is obeyed, or refused by the keyword that is not."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import jsonschema
import pytest

from wire import Failure, Wire, failure

pytest.importorskip("mlx_lm", reason="the tiny checkpoints are written by mlx-lm")

from hostile import schema_format
from schema_answers import INVALID, ask, is_whole
from schema_suites import SUITES
from tiny_tokenizer import tokenizer

SEEDS = 4
TOKENS = 300
# Most schemas say little: without it, few texts, lists and objects of theirs come to an end.
ENDING = 8.0
DECIMAL = re.compile(r"[/ ](min|max)(Items|Length|Properties): must be a whole number")


def at(schema: Any, path: str) -> Any:
    """Returns what stands at a JSON pointer."""
    for step in path.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        schema = schema[int(name)] if isinstance(schema, list) else schema[name]
    return schema


def is_malformed(schema: Any) -> bool:
    """Tells whether draft 2020-12 does not know such a schema."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError:
        return True
    return False


def refusal(case: dict[str, Any], found: Failure) -> str:
    """Returns why a schema is refused, after checking that it may be."""
    schema = case["schema"]
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT, found
    if found.reason == "SCHEMA_UNSUPPORTED":
        keyword, path = found.metadata["keyword"], found.metadata["path"]
        if (keyword, path) == ("schema", ""):
            # Parts that are implemented, and not together: the message says which.
            return "refused as a whole"
        assert keyword in at(schema, path), found
        return "refused by a keyword"
    assert found.reason == "INVALID_FIELD", found
    if is_malformed(schema) or DECIMAL.search(found.message):
        return "refused as malformed"
    assert not any(test["valid"] for test in case["tests"]), found
    return "refused because nothing obeys it"


def outcome(wire: Wire, case: dict[str, Any], seed: int) -> str:
    """Returns what became of a request."""
    ends = {tokenizer().token_to_id(mark): ENDING for mark in ('"', "]", "}")}
    answer, bias = schema_format(case["schema"]), {"logit_bias": ends}
    try:
        reply = ask(wire, answer, seed, max_tokens=TOKENS, sampling=bias)
    except grpc.RpcError as error:
        return refusal(case, failure(error))
    try:
        return "valid" if is_whole(case["schema"], reply, TOKENS) else "cut"
    except re.error:
        return "valid for the crate: Python's re does not know its pattern"


@pytest.mark.parametrize("draft", SUITES)
def test_a_schema_is_obeyed_or_refused_by_its_keyword(wire: Wire, draft: str) -> None:
    suite = SUITES[draft]
    if not suite.is_available:
        pytest.skip(f"{suite.download[0]} is not installed, which downloads {suite.package}")
    cases = suite.cases()
    tasks = [(name, seed) for name in cases for seed in range(SEEDS)]

    def run(task: tuple[str, int]) -> tuple[str, str]:
        name, seed = task
        try:
            return outcome(wire, cases[name], seed), ""
        except (AssertionError, KeyError, ValueError, grpc.RpcError, *INVALID) as error:
            return "wrong", f"{name}, seed {seed}: {error}"

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(run, tasks))
    failures = [why for _, why in outcomes if why]
    assert not failures, "\n\n".join(failures[:20])
    counts = Counter(kind for kind, _ in outcomes)
    print(counts)
    assert counts["valid"] > 4 * counts["cut"], counts
