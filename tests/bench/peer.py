"""mlx-lm as the peer: a process that answers one line of JSON with another.

Its own process, so that a BLAS can be put under it with LD_PRELOAD and so that it sleeps while the
daemon is measured. All weights are dequantized to float32 first, as the daemon does.

    {"prompts": [[1, 2, 3]], "tokens": 64}  ->  {"seconds": 5.0, "first": [0.4], "outputs": [[4]]}
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_model, load_tokenizer


def main() -> None:
    """Loads the model folder argv[1] and answers until the input ends."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, tokenizer = load(Path(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        prompts, tokens = command["prompts"], command["tokens"]
        run = alone(model, tokenizer, prompts[0], tokens) if len(prompts) == 1 else None
        print(json.dumps(run or together(model, prompts, tokens)), file=answers, flush=True)


def load(folder: Path) -> tuple[Any, TokenizerWrapper]:
    """The model in dense float32, and a tokenizer that knows no end of text."""
    model, _ = load_model(folder)
    model.update(tree_map(_float32, model.parameters()))
    model = dequantize_model(model)
    mx.eval(model.parameters())
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token_ids = None
    return model, tokenizer


def _float32(parameter: mx.array) -> mx.array:
    if mx.issubdtype(parameter.dtype, mx.floating):
        return parameter.astype(mx.float32)
    return parameter


def alone(model: Any, tokenizer: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    """One stream through stream_generate."""
    output, first, start = [], 0.0, time.perf_counter()
    for response in stream_generate(model, tokenizer, prompt, max_tokens=tokens):
        first = first or time.perf_counter() - start
        output.append(int(response.token))
    seconds = time.perf_counter() - start
    assert len(output) == tokens
    return {"seconds": seconds, "first": [first], "outputs": [output]}


def together(model: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """All prompts at once through BatchGenerator."""
    start = time.perf_counter()
    generator = BatchGenerator(model, max_tokens=tokens)
    uids = generator.insert(prompts)
    outputs: dict[int, list[int]] = {uid: [] for uid in uids}
    first: dict[int, float] = {}
    unfinished = len(uids)
    while unfinished:
        _, responses = generator.next()
        for response in responses:
            first.setdefault(response.uid, time.perf_counter() - start)
            outputs[response.uid].append(int(response.token))
            unfinished -= response.finish_reason is not None
    seconds = time.perf_counter() - start
    generator.close()
    assert all(len(output) == tokens for output in outputs.values())
    return {
        "seconds": seconds,
        "first": [first[uid] for uid in uids],
        "outputs": [outputs[uid] for uid in uids],
    }


if __name__ == "__main__":
    main()
