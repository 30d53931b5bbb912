"""Sampling against mlx-lm's formulas: penalties and bias by greedy ids, filters by the tokens they
retain and by the frequency of each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors

from oracle import Oracle
from tiny_tokenizer import VOCABULARY, decode
from wire import Wire

PROMPT_TOKENS = 24
DRAWS = 400

# The fields of SamplingOptions are the arguments of mlx-lm's make_logits_processors.
PENALTIES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7, "repetition_context_size": 0},
    "repetition-recent": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 3.0, "presence_context_size": 12},
    "frequency": {"frequency_penalty": 1.5, "frequency_context_size": 40},
    "bias": {"logit_bias": {40: 6.0, 41: -4.0}},
    "all": {
        "logit_bias": {50: 5.0},
        "repetition_penalty": 1.3,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.7,
    },
}


@pytest.fixture(scope="module")
def oracle(tiny_root: Path) -> Oracle:
    """mlx-lm on `tiny`."""
    return Oracle(tiny_root / "tiny")


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_and_bias_choose_what_mlx_lm_chooses(
    oracle: Oracle, wire: Wire, name: str
) -> None:
    options = PENALTIES[name]
    case = oracle.stable(PROMPT_TOKENS, seed=3, processors=make_logits_processors(**options))
    plain, _ = oracle.greedy(case.prompt, len(case.output))
    assert case.output != plain, "the case shows nothing"
    reply = wire.generate("tiny", case.prompt, max_tokens=len(case.output), sampling=options)
    assert list(reply.token_ids) == case.output


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 2.0, "top_p": 0.9, "min_p": 0.05, "top_k": 8},
        {"temperature": 0.7},
        {"temperature": 1.0, "typical_p": 0.3},
        {"temperature": 1.3, "typical_p": 0.8, "top_p": 0.9, "top_k": 20},
    ],
    ids=lambda sampling: "-".join(sampling),
)
def test_tokens_come_as_often_as_the_filtered_distribution_says(
    oracle: Oracle, wire: Wire, sampling: dict[str, Any]
) -> None:
    prompt = oracle.stable(PROMPT_TOKENS, seed=5, count=1).prompt
    expected = _distribution(oracle, prompt, sampling)
    drawn: Counter[int] = Counter()
    for seed in range(DRAWS):
        reply = wire.generate("tiny", prompt, max_tokens=1, sampling={**sampling, "seed": seed})
        drawn.update(reply.token_ids)
    assert all(expected[token] > 0 for token in drawn), "a token that the filters drop"
    # Five standard deviations of each count; seeds are fixed, so the outcome is too.
    for token in np.flatnonzero(expected > 0.01):
        mean = DRAWS * expected[token]
        deviation = np.sqrt(mean * (1 - expected[token]))
        assert abs(drawn[int(token)] - mean) <= 5 * deviation + 1e-9, (token, drawn[int(token)])


def _distribution(oracle: Oracle, prompt: list[int], sampling: dict[str, Any]) -> np.ndarray:
    raw = oracle.logprobs(prompt)[0][-1:].astype(np.float32)
    if "typical_p" in sampling:
        raw = _typical(raw, sampling["typical_p"])
    logprobs = mx.array(raw)
    if "top_p" in sampling:
        logprobs = apply_top_p(logprobs, sampling["top_p"])
    if "min_p" in sampling:
        logprobs = apply_min_p(logprobs, sampling["min_p"])
    if "top_k" in sampling:
        logprobs = apply_top_k(logprobs, sampling["top_k"])
    return np.array(mx.softmax(logprobs / sampling["temperature"], axis=-1))[0]


def _typical(logprobs: np.ndarray, typical_p: float) -> np.ndarray:
    """Keeps the typical set (Meister et al. 2022, https://arxiv.org/abs/2202.00666, equation 6)."""
    log = logprobs[0].astype(np.float64)
    entropy = -(np.exp(log) * log).sum()
    order = np.argsort(np.abs(-log - entropy), kind="stable")
    kept = order[: np.searchsorted(np.cumsum(np.exp(log[order])), typical_p) + 1]
    result = np.full_like(log, -np.inf)
    result[kept] = log[kept]
    result -= np.log(np.exp(result[kept]).sum())
    return result[None].astype(np.float32)


def _dry(
    multiplier: float,
    base: float,
    allowed_length: int,
    context_size: int = 0,
    breakers: frozenset[int] = frozenset(),
) -> Any:
    """DRY by its definition (https://github.com/oobabooga/text-generation-webui/pull/5677)."""

    def process(tokens: Any, logits: Any) -> Any:
        context = [int(token) for token in np.array(tokens)][-context_size:]
        penalties = np.zeros(logits.shape[-1], np.float32)
        for place in range(1, len(context)):
            length = 0
            while (
                length < place
                and context[place - 1 - length] == context[-1 - length]
                and context[-1 - length] not in breakers
            ):
                length += 1
            if length >= allowed_length and context[place] not in breakers:
                penalty = multiplier * base ** (length - allowed_length)
                token = context[place]
                penalties[token] = max(penalties[token], min(penalty, 10_000.0))
        return logits - mx.array(penalties)

    return process


DRY: dict[str, dict[str, Any]] = {
    "dry-broken": {"dry_multiplier": 5.0, "dry_base": 1.2, "dry_allowed_length": 1},
    "dry": {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2},
    "dry-strong": {"dry_multiplier": 5.0, "dry_base": 1.2, "dry_allowed_length": 1},
    "dry-recent": {
        "dry_multiplier": 5.0,
        "dry_base": 1.5,
        "dry_allowed_length": 1,
        "dry_context_size": 12,
    },
}


@pytest.mark.parametrize("name", DRY)
def test_dry_chooses_what_its_definition_chooses(oracle: Oracle, wire: Wire, name: str) -> None:
    options = DRY[name]
    values = {key.removeprefix("dry_"): value for key, value in options.items()}
    breaker = decode([41]) if name == "dry-broken" else ""
    having = [id_ for id_ in range(VOCABULARY) if breaker and breaker in decode([id_])]
    definition = _dry(**values, breakers=frozenset(having))
    # A few tokens that come again and again.
    bias = dict.fromkeys(range(40, 46), 40.0)
    biased = make_logits_processors(logit_bias=bias)
    case = oracle.stable(PROMPT_TOKENS, seed=3, processors=[*biased, definition])
    plain, _ = oracle.greedy(case.prompt, len(case.output), biased)
    assert case.output != plain, "the case shows nothing"
    sampling = {**options, "logit_bias": bias}
    sampling["dry_sequence_breakers"] = {"texts": [breaker] if breaker else []}
    reply = wire.generate("tiny", case.prompt, max_tokens=len(case.output), sampling=sampling)
    assert list(reply.token_ids) == case.output


def test_the_same_seed_gives_the_same_tokens_alone_and_in_a_batch(wire: Wire) -> None:
    sampling = {"temperature": 1.0, "top_p": 0.95, "seed": 11}
    prompt = list(range(10, 40))
    alone = wire.generate("tiny", prompt, max_tokens=48, sampling=sampling)
    others = [
        wire.stream("tiny", list(range(50, 60 + n)), max_tokens=200, sampling={"temperature": 1.0})
        for n in range(7)
    ]
    for other in others:
        assert next(other).HasField("started")
    among = wire.generate("tiny", prompt, max_tokens=48, sampling=sampling)
    for other in others:
        other.cancel()
    assert list(among.token_ids) == list(alone.token_ids)
    different = wire.generate("tiny", prompt, max_tokens=48, sampling={**sampling, "seed": 12})
    assert list(different.token_ids) != list(alone.token_ids)


def test_without_a_seed_each_request_draws_its_own(wire: Wire) -> None:
    prompt = list(range(10, 40))
    sampling = {"temperature": 1.5}
    replies = [wire.generate("tiny", prompt, max_tokens=24, sampling=sampling) for _ in range(3)]
    assert len({tuple(reply.token_ids) for reply in replies}) == 3
    # The answer names the drawn seed, which reproduces the output.
    told = {**sampling, "seed": replies[0].sampling.seed}
    again = wire.generate("tiny", prompt, max_tokens=24, sampling=told)
    assert list(again.token_ids) == list(replies[0].token_ids)
