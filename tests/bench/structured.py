"""What structured output costs: 16 constrained streams against 16 free ones of the same model, in
turns, and the time that the mask of a token takes a worker.

Promises: constrained streams have at least 0.9 times the tokens per second of free ones; half of
the masks take at most 100 µs, 99 of 100 at most 1 ms. Without sampling filters, greedy.
"""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from daemon import Daemon
from mlxd.v1 import inference_pb2 as pb
from stats import Report, markdown, parser, percentile, run
from wire import Wire

STREAMS = 16
TOKENS = 128
# Objects as tools take them, in a list that does not end before the streams do.
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["city", "town", "village"]},
            "population": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}},
            "position": {
                "type": "object",
                "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}},
                "required": ["lat", "lon"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "kind", "population", "tags"],
        "additionalProperties": False,
    },
}
MASK = re.compile(r"mask_us=(\d+)")


def speed(wire: Wire, model: str, answer: pb.ResponseFormat | None) -> float:
    """Returns the tokens per second of all streams together."""

    def stream(number: int) -> int:
        fields: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": answer is None}
        prompt = f"Question {number}: list some places of the world as JSON.\n"
        reply = wire.generate(model, prompt=prompt, response_format=answer, **fields)
        return int(reply.usage.completion_tokens)

    start = time.perf_counter()
    with ThreadPoolExecutor(STREAMS) as pool:
        tokens = sum(pool.map(stream, range(STREAMS)))
    return tokens / (time.perf_counter() - start)


async def main() -> bool:
    """Measures and reports."""
    options = parser(__doc__ or "").parse_args()
    folder = options.model
    answer = pb.ResponseFormat(json_schema=pb.JsonSchemaFormat(schema=json.dumps(SCHEMA)))
    environment = {"MLXD_LOG_FILTER": "info,mlxd::engine::masks=trace"}
    free, constrained = [], []
    with (
        Daemon([folder.parent], models=[folder.name], environment=environment) as daemon,
        daemon.wire() as wire,
    ):
        speed(wire, folder.name, answer)
        for _ in range(options.rounds):
            free.append(speed(wire, folder.name, None))
            constrained.append(speed(wire, folder.name, answer))
        masks = [int(found) for found in MASK.findall(daemon.log)]
    report = Report(f"{STREAMS} streams of {TOKENS} tokens, free and constrained", options)
    ratio = median(a / b for a, b in zip(constrained, free, strict=True))
    report.promise("constrained / free tokens per second", ratio, 0.9, at_least=True)
    report.promise("mask p50", percentile(masks, 50), 100, unit=" µs")
    report.promise("mask p99", percentile(masks, 99), 1000, unit=" µs")
    for name, value in (("free", free), ("constrained", constrained), ("masks", len(masks))):
        report.fact(name, value)
    rows = [("free", median(free)), ("constrained", median(constrained))]
    return report.end(markdown(["streams", "tokens/s"], rows))


if __name__ == "__main__":
    run(main)
