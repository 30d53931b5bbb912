"""mlx-lm's BatchGenerator without any server: a program that answers one line of JSON with another.

A separate process, so that LD_PRELOAD can put a BLAS under it and so that it is stopped while the
others are measured. The model folder is a dense one (dense.py).

    {"prompts": [[1, 2, 3]], "tokens": 64}  ->
    {"seconds": 5.0, "times": [[0.4, 0.5]], "outputs": [[4, 7]]}
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import load_model


def main() -> None:
    """Loads the model folder argv[1] and answers until the input ends."""
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, _ = load_model(Path(sys.argv[1]))
    mx.eval(model.parameters())
    for line in sys.stdin:
        command = json.loads(line)
        print(
            json.dumps(run(model, command["prompts"], command["tokens"])), file=answers, flush=True
        )


def run(model: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Runs all prompts at once; returns the time of every token since the start, in seconds."""
    start = time.perf_counter()
    generator = BatchGenerator(model, max_tokens=tokens)
    uids = generator.insert(prompts)
    outputs: dict[int, list[int]] = {uid: [] for uid in uids}
    times: dict[int, list[float]] = {uid: [] for uid in uids}
    unfinished = len(uids)
    while unfinished:
        _, responses = generator.next()
        for response in responses:
            times[response.uid].append(time.perf_counter() - start)
            outputs[response.uid].append(int(response.token))
            unfinished -= response.finish_reason is not None
    seconds = time.perf_counter() - start
    generator.close()
    assert all(len(output) == tokens for output in outputs.values())
    return {
        "seconds": seconds,
        "times": [times[uid] for uid in uids],
        "outputs": [outputs[uid] for uid in uids],
    }


if __name__ == "__main__":
    main()
