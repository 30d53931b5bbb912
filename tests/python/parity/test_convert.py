"""`mlxd convert` against `mlx_lm.convert`, byte for byte, and what both load of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

import mlx.core as mx
from mlx_lm.utils import load_model

from architecture_rows import ROWS, row_of
from checkpoints import Checkpoint
from checkpoints import build as build_llama
from conversions import config_of, convert, oracle, same
from daemon import Daemon, default_model
from parity_cases import Case, check_greedy, check_score
from raw_layouts import RAW, rewrite
from tiny_models import Architecture, build

RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
# Options of ours, and the same for mlx-lm.
AFFINE = {
    f"q{bits}-g{group}": (
        ("--quantize", str(bits), "--group-size", str(group)),
        {"quantize": True, "q_bits": bits, "q_group_size": group},
    )
    for bits in (2, 3, 4, 5, 6, 8)
    for group in (32, 64, 128)
}
MODES = {
    mode: (("--mode", mode), {"quantize": True, "q_mode": mode})
    for mode in ("mxfp4", "nvfp4", "mxfp8")
}
MIXED = {
    recipe: (
        ("--recipe", recipe, "--group-size", "32"),
        {"quantize": True, "quant_predicate": recipe, "q_group_size": 32},
    )
    for recipe in RECIPES
}
CASTS = {
    dtype: (("--dtype", dtype), {"dtype": dtype}) for dtype in ("float32", "float16", "bfloat16")
}
PLAIN: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {"plain": ((), {})}
EVERY = {**PLAIN, **AFFINE, **MODES, **MIXED, **CASTS}
SOME = {name: EVERY[name] for name in ("plain", "q4-g32", "nvfp4", "mixed_3_6", "float16")}
# It has no `down_proj`, by which the recipes choose.
WITHOUT_RECIPES = ("lfm2",)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with rows of 128, 9 layers so that recipes have a middle, in bfloat16 and shards."""
    config = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 9}
    checkpoint = Checkpoint("llama", config, dtype=mx.bfloat16, shards=3)
    return build_llama(checkpoint, tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("case", EVERY)
def test_every_format_is_that_of_mlx_lm_to_the_last_bit(
    llama: Path, tmp_path: Path, case: str
) -> None:
    options, theirs = EVERY[case]
    ours = convert(llama, tmp_path / "ours", *options)
    expected = oracle(llama, tmp_path / "theirs", **theirs)
    same(ours, expected)
    assert quantization(ours) == quantization(expected)
    assert (ours / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def quantization(folder: Path) -> dict[str, Any] | None:
    """Returns a config's table, with the mode that mlx-lm leaves out where it is affine."""
    config = config_of(folder)
    table: dict[str, Any] | None = config.get("quantization")
    assert config.get("quantization_config") == table
    modules = {name: of for name, of in (table or {}).items() if isinstance(of, dict)}
    return table and {**table, **{name: {"mode": "affine", **of} for name, of in modules.items()}}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every architecture in bfloat16, as its makers publish it."""
    root = tmp_path_factory.mktemp("published")
    for row in ROWS:
        # Granite's outputs go into groups of 64 whatever is asked for.
        sizes = {"intermediate_size": 128} if row.model_type == "granite" else {}
        folder = build(row, row.base(**sizes), root / row.label, "bf16")
        if row.label in RAW and row.label != "gpt_oss":
            rewrite(folder, row.label)
    return root


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_every_architecture_is_converted_as_mlx_lm_does(
    published: Path, tmp_path: Path, row: Architecture, case: str
) -> None:
    if case in RECIPES and row.model_type in WITHOUT_RECIPES:
        pytest.skip("mlx-lm's recipes do not fit it")
    options, theirs = SOME[case]
    source = published / row.label
    ours = convert(source, tmp_path / "ours", *options)
    expected = oracle(source, tmp_path / "theirs", **theirs)
    same(ours, expected)
    assert quantization(ours) == quantization(expected)


def test_the_release_of_gpt_oss_keeps_its_experts(tmp_path: Path) -> None:
    row = row_of("gpt_oss")
    source = build(row, row.base(), tmp_path / "source", "mxfp4-experts")
    rewrite(source, "gpt_oss")
    for case in ("plain", "q4-g32"):
        options, theirs = EVERY[case]
        ours = convert(source, tmp_path / f"ours-{case}", *options)
        expected = oracle(source, tmp_path / f"theirs-{case}", **theirs)
        same(ours, expected)
        assert quantization(ours) == quantization(expected)


@pytest.mark.parametrize("case", ["q4-g32", "mxfp4", "mixed_2_6"])
def test_what_was_converted_is_served_with_the_numbers_of_mlx_lm(
    llama: Path, tmp_path: Path, case: str
) -> None:
    folder = convert(llama, tmp_path / "root" / "model", *EVERY[case][0])
    load_model(folder)
    with Daemon([folder.parent], models=["model"]) as daemon, daemon.wire() as wire:
        one = Case(folder)
        check_score(one, wire, 100)
        check_greedy(one, wire, 33)


@pytest.mark.real
@pytest.mark.parametrize("case", [*MIXED, "q4-g32", "q8-g64", "mxfp4"])
def test_a_real_model_is_quantized_as_mlx_lm_does(real: Path, tmp_path: Path, case: str) -> None:
    options, theirs = EVERY[case]
    ours = convert(real, tmp_path / "ours", *options)
    same(ours, oracle(real, tmp_path / "theirs", **theirs))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model in bfloat16."""
    folder = default_model()
    if not (folder / "config.json").exists():
        pytest.skip(f"no default model in {folder}: run `make model` or set MLXD_MODEL_DIR")
    out = tmp_path_factory.mktemp("real") / "dense"
    return oracle(folder, out, dequantize=True, dtype="bfloat16")
