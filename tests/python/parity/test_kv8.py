"""The KV cache in 8 bits: nearly the same numbers from less than half of the memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

from daemon import Daemon
from mlxd.v1 import model_pb2 as model
from oracle import Oracle
from wire import CALL_S, Wire, refused

TOKENS = 90
# A fraction of the largest logit: elements are rounded to 127 steps in every layer; 0.011 was seen.
TOLERANCE = 0.03


def kv_bytes(wire: Wire) -> int:
    """Returns the size of a token in the KV cache, in bytes."""
    request = model.GetModelRequest(model="tiny")
    return wire.models.GetModel(request, timeout=CALL_S).model.kv_bytes_per_token


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_scores_stay_near_those_of_mlx_lm(tiny_root: Path, chunk: int) -> None:
    oracle = Oracle(tiny_root / "tiny")
    prompt = [5 + n * 7 % 300 for n in range(TOKENS)]
    expected, scale = oracle.logprobs(prompt)
    config = {"kv_dtype": "int8", "prefill_chunk_tokens": chunk}
    with Daemon([tiny_root], config, models=["tiny"]) as daemon, daemon.wire() as wire:
        scores = wire.score("tiny", prompt, top=5).tokens
        for position, entry in enumerate(scores[1:], 1):
            row = expected[position - 1]
            assert abs(entry.token.logprob - row[prompt[position]]) <= TOLERANCE * scale
        # The prefix is found again, and attended to from 8 bits.
        first = wire.generate("tiny", prompt, max_tokens=12)
        again = wire.generate("tiny", prompt, max_tokens=12)
        assert list(first.token_ids) == list(again.token_ids)
        assert again.usage.cached_tokens > TOKENS / 2
    assert np.isfinite(scale)


def test_a_load_chooses_the_kv_dtype_and_reports_it(tiny_root: Path) -> None:
    with Daemon([tiny_root]) as daemon, daemon.wire() as wire:
        wire.load("tiny")
        plain = kv_bytes(wire)
        with refused("INVALID_ARGUMENT", "INVALID_FIELD", "kv_dtype"):
            wire.load("tiny", kv_dtype=model.KV_DTYPE_INT8)
        wire.unload("tiny")
        loaded = wire.load("tiny", kv_dtype=model.KV_DTYPE_INT8)[-1].loaded.model
        assert "8-bit KV cache" in loaded.computes_in
        # Heads of dimension 16: 16 bytes and a scale of 4, not 64.
        assert kv_bytes(wire) * 64 == plain * 20
