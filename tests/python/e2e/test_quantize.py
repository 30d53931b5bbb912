"""Loads that quantize, and checkpoints that others have quantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

import mlx.core as mx

from architecture_rows import row_of
from checkpoints import Checkpoint
from checkpoints import build as build_llama
from conversions import convert, run
from daemon import Daemon
from mlxd.v1 import model_pb2
from tiny_models import build
from wire import Wire, failure

TOKENS = list(range(40, 90))
Options = model_pb2.QuantizeOptions
AFFINE = Options(bits=4, group_size=32)
CASES: dict[str, tuple[Options, tuple[str, ...]]] = {
    "q4": (AFFINE, ("--quantize", "4", "--group-size", "32")),
    "q3-g64": (Options(bits=3), ("--quantize", "3")),
    "mxfp4": (Options(mode=model_pb2.QUANT_MODE_MXFP4), ("--mode", "mxfp4")),
    "nvfp4": (Options(mode=model_pb2.QUANT_MODE_NVFP4), ("--mode", "nvfp4")),
    "mixed": (
        Options(recipe=model_pb2.QUANT_RECIPE_MIXED_2_6, group_size=32),
        ("--recipe", "mixed_2_6", "--group-size", "32"),
    ),
}
FOREIGN = (
    "awq",
    "gptq",
    "fp8",
    "compressed-tensors",
    "bitsandbytes",
    "hqq",
    "eetq",
    "quanto",
    "torchao",
)
# A second architecture whose experts are stacked and whose router keeps 8 bits.
MODELS = ("llama", "qwen3_moe")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with models in bfloat16, and what each case converts them to."""
    made = tmp_path_factory.mktemp("quantize")
    build_llama(Checkpoint("llama", {"num_hidden_layers": 8}, dtype=mx.bfloat16), made)
    row = row_of("qwen3_moe")
    build(row, row.base(), made / "qwen3_moe", "bf16")
    row = row_of("lfm2")
    build(row, row.base(), made / "lfm2", "bf16")
    for model in MODELS:
        for name, (_, options) in CASES.items():
            convert(made / model, made / f"{model}-{name}", *options)
    return made


@pytest.fixture(scope="module")
def wire(root: Path) -> Iterator[Wire]:
    """A connection to a daemon that dequantizes what it loads."""
    with Daemon([root]) as daemon, daemon.wire() as wire:
        yield wire


def loaded(wire: Wire, model: str, **fields: Any) -> model_pb2.ModelInfo:
    """Loads a model, after asking what it needs."""
    planned = wire.load(model, validate_only=True, **fields)[-1].validated
    info = wire.load(model, **fields)[-1].loaded.model
    # The first request's KV cache counts too, as an eighth of the weights at most.
    assert info.weight_bytes <= planned.needed_bytes <= info.weight_bytes * 9 // 8
    return info


def logprobs(wire: Wire, model: str) -> list[float]:
    """Scores a text."""
    scores = wire.score(model, TOKENS)
    return [entry.token.logprob for entry in scores.tokens[1:]]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_a_load_that_quantizes_has_the_numbers_of_a_conversion(
    wire: Wire, model: str, case: str
) -> None:
    options, _ = CASES[case]
    ours = loaded(wire, model, quantize=options)
    assert "quantized to" in ours.computes_in
    one = logprobs(wire, model)
    wire.unload(model)
    converted = loaded(wire, f"{model}-{case}")
    assert one == logprobs(wire, f"{model}-{case}")
    wire.unload(f"{model}-{case}")
    assert (ours.weight_bytes, ours.parameter_count) == (
        converted.weight_bytes,
        converted.parameter_count,
    )


def test_where_the_dense_model_does_not_fit_the_quantized_one_does(root: Path) -> None:
    with Daemon([root]) as daemon, daemon.wire() as wire:
        dense = loaded(wire, "llama").weight_bytes
    with (
        Daemon([root], {"memory_budget_bytes": dense - 1}) as daemon,
        daemon.wire() as wire,
    ):
        assert not wire.load("llama", validate_only=True)[-1].validated.fits
        info = loaded(wire, "llama", quantize=AFFINE)
        assert info.weight_bytes < dense / 2
        assert info.computes_in == "float32, quantized to 4-bit affine, group 32 at load"
        packed = logprobs(wire, "llama")
        wire.unload("llama")
        loaded(wire, "llama-q4")
        assert packed == logprobs(wire, "llama-q4")


def test_quantizations_that_do_not_exist_are_refused_by_field(wire: Wire) -> None:
    for options, why in [
        (Options(bits=7), "2, 3, 4, 5, 6 or 8"),
        (Options(group_size=48), "32, 64 or 128"),
        (Options(mode=model_pb2.QUANT_MODE_MXFP8, bits=4), "8 bits in groups of 32"),
        (Options(bits=4, recipe=model_pb2.QUANT_RECIPE_MIXED_2_6), "says the bits itself"),
        (Options(mode=99), "unknown mode"),  # type: ignore[arg-type]
    ]:
        with pytest.raises(grpc.RpcError) as caught:
            wire.load("llama", quantize=options)
        refusal = failure(caught.value)
        assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
        assert all(field.startswith("quantize") for field in refusal.fields)
        assert why in refusal.message
    with pytest.raises(grpc.RpcError) as caught:
        wire.load("lfm2", quantize=CASES["mixed"][0])
    assert failure(caught.value).reason == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize("method", FOREIGN)
def test_what_others_have_quantized_is_refused_by_name(
    root: Path, tmp_path: Path, method: str
) -> None:
    for place in ("whole", "text"):
        folder = tmp_path / "root" / place
        shutil.copytree(root / "llama", folder)
        config = json.loads((folder / "config.json").read_text())
        quantization = {"quant_method": method, "bits": 4, "weight_block_size": [128, 128]}
        if place == "whole":
            config["quantization_config"] = quantization
        else:
            config["text_config"] = {"quantization_config": quantization}
        (folder / "config.json").write_text(json.dumps(config))
        done = run(folder, tmp_path / "out")
        assert f"quantized with {method}" in done.stderr
        assert not (tmp_path / "out").exists()
    with Daemon([tmp_path / "root"]) as daemon, daemon.wire() as wire:
        for place in ("whole", "text"):
            with pytest.raises(grpc.RpcError) as caught:
                wire.load(place)
            assert failure(caught.value).reason == "MODEL_UNSUPPORTED"
            assert f"quantized with {method}, which only others" in failure(caught.value).message
            assert "a copy that was quantized for MLX" in failure(caught.value).message
