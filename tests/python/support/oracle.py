"""mlx-lm as the reference: single runs, every float tensor cast to float32 before use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

# mlx-lm 0.32.2 passes a scale that MLX 0.32.2 does not know; without one, it has no effect.
_gather_qmm = mx.gather_qmm


def _gather_qmm_without_scale(*args: Any, global_scale: None = None, **options: Any) -> mx.array:
    assert global_scale is None
    return _gather_qmm(*args, **options)


mx.gather_qmm = _gather_qmm_without_scale

# A fraction of max |logit|. Two BLAS libraries under mlx-lm itself differ by 2e-5 at worst.
TOLERANCE = 1e-4
# A prompt counts as stable when no greedy choice is closer than ten times the tolerance.
STABLE = 10 * TOLERANCE


@dataclass(frozen=True)
class Continuation:
    """A prompt and its greedy continuation."""

    prompt: list[int]
    output: list[int]


class Oracle:
    """One checkpoint in mlx-lm."""

    def __init__(self, folder: Path) -> None:
        self.model, self.config = load_model(folder)
        self.vocabulary = {**self.config, **self.config.get("text_config", {})}["vocab_size"]
        self.model.update(tree_map(_float32, self.model.parameters()))
        for module in self.model.modules():
            if isinstance(module, nn.QuantizedEmbedding) and module.mode != "affine":
                module.__class__ = _SingleEmbedding
        mx.eval(self.model.parameters())

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the logits after each token, [tokens, vocabulary], from one uncached forward."""
        return np.array(self.model(mx.array([list(ids)]))[0].astype(mx.float32))

    def logprobs(self, ids: Sequence[int]) -> tuple[np.ndarray, float]:
        """Returns the log-probabilities after each token, and max |logit|."""
        logits = self.logits(ids).astype(np.float64)
        top = logits.max(axis=-1, keepdims=True)
        total = np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        return logits - top - total, float(np.abs(logits).max())

    def greedy(
        self, prompt: Sequence[int], count: int, processors: list[Any] | None = None
    ) -> tuple[list[int], float]:
        """Returns the greedy continuation, and the smallest gap between the two best logits."""
        output, gap = [], float("inf")
        steps = generate_step(
            mx.array(list(prompt)), self.model, max_tokens=count, logits_processors=processors
        )
        for token, logprobs in steps:
            output.append(int(token))
            second, first = np.partition(np.array(logprobs), -2)[-2:]
            gap = min(gap, float(first - second))
        return output, gap

    def stable(
        self,
        length: int,
        seed: int,
        count: int = 32,
        processors: list[Any] | None = None,
        after: Sequence[int] = (),
    ) -> Continuation:
        """Finds a random prompt whose greedy continuation has no near-tie, searching from `seed`.

        The output continues `after` and the prompt.
        """
        generator = np.random.default_rng((seed, length))
        scale = None
        for _ in range(50):
            prompt = generator.integers(4, self.vocabulary, length).tolist()
            scale = scale or float(np.abs(self.logits(prompt)).max())
            output, gap = self.greedy([*after, *prompt], count, processors)
            if gap > STABLE * scale:
                return Continuation(prompt, output)
        raise AssertionError(f"no prompt of {length} tokens without near-ties")


class _SingleEmbedding(nn.QuantizedEmbedding):
    """MLX dequantizes to bfloat16 without float scales, and everything after it would follow."""

    def __call__(self, ids: mx.array) -> mx.array:
        return super().__call__(ids).astype(mx.float32)


def _float32(parameter: mx.array) -> mx.array:
    if mx.issubdtype(parameter.dtype, mx.floating):
        return parameter.astype(mx.float32)
    return parameter
