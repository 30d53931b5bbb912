"""`mlxd convert` of GGUF files that gguf-py wrote.

Every block format is compared with gguf-py's own elements, every architecture with the checkpoint
that it was made of, tokenizers with the originals.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

import mlx.core as mx
from gguf import GGMLQuantizationType as Kind
from mlx_lm.utils import load_model
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

import gguf_files
from architecture_rows import row_of
from conversions import config_of, convert, oracle, run, same, tensors_of
from daemon import Daemon
from parity_cases import Case, check_greedy, check_score
from tiny_models import build
from tiny_tokenizer import EOS, PROSE, SPECIAL, VOCABULARY, tokenizer

EXACT = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)
EXACT_OF_256 = (Kind.Q4_K, Kind.Q5_K)
ROUNDED = (Kind.Q6_K, Kind.IQ4_NL)
TEXTS = [PROSE, "  two  spaces\n\ttab", "12345 67.8", "naïve café 🙂 漢字", "", " ", "<|im_end|>"]


def byte_level() -> dict[str, Any]:
    """Returns the tiny tokenizer as a GGUF file has it."""
    made = json.loads(tokenizer().to_str())
    tokens = [tokenizer().id_to_token(token) for token in range(VOCABULARY)]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "types": [3 if token in SPECIAL else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in made["model"]["merges"]],
        "ids": {"bos": 0, "eos": EOS},
    }


def original(label: str, folder: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes a checkpoint; returns its config and tensors."""
    config = {"vocab_size": VOCABULARY, **row_of(label).base(**changes)}
    build(row_of(label), config, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    return config, {name: np.array(array) for name, array in weights.items()}


def elements_of(folder: Path) -> dict[str, np.ndarray]:
    """Returns the elements of every module, dequantized by MLX in float32."""
    table = config_of(folder).get("quantization") or {}
    tensors, found = tensors_of(folder), {}
    for name, array in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("scales", "biases") and f"{module}.weight" in tensors:
            continue
        elements = array.astype(mx.float32)
        if f"{module}.scales" in tensors and leaf == "weight":
            own = table[module] if isinstance(table.get(module), dict) else table
            scales, biases = tensors[f"{module}.scales"], tensors.get(f"{module}.biases")
            group, bits, mode = own["group_size"], own["bits"], own["mode"]
            elements = mx.dequantize(array, scales, biases, group, bits, mode).astype(mx.float32)
        found[name] = np.array(elements)
    return found


def compare(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    rounded: tuple[str, ...] = (),
) -> None:
    """Fails unless a folder holds gguf-py's elements, in the model's order, exactly."""
    found = elements_of(folder)
    assert sorted(found) == sorted(tensors)
    written = gguf_files.tensors_of(config, found)
    assert sorted(written) == sorted(expected)
    for name, elements in expected.items():
        of = elements.astype(np.float16).astype(np.float32) if name in rounded else elements
        assert np.array_equal(written[name], of), name


@pytest.mark.parametrize("kind", [*EXACT, *EXACT_OF_256, *ROUNDED], ids=lambda kind: kind.name)
def test_blocks_are_what_gguf_py_dequantizes(tmp_path: Path, kind: Kind) -> None:
    config, tensors = original(
        "llama", tmp_path / "o", hidden_size=256, intermediate_size=512, num_hidden_layers=2
    )
    matrices = [name for name, array in tensors.items() if array.ndim == 2]
    kinds = {gguf_files.renamed(name, "llama"): kind for name in matrices}
    file = tmp_path / "m.gguf"
    expected = gguf_files.write(file, config, tensors, byte_level(), kinds)
    folder = convert(file, tmp_path / "exact")
    rounded = tuple(kinds) if kind in ROUNDED else ()
    compare(folder, config, tensors, expected, rounded)
    load_model(folder)
    # The same elements in float32, whatever the file has.
    dense = convert(file, tmp_path / "f32", "--dtype", "float32")
    assert "quantization" not in config_of(dense)
    compare(dense, config, tensors, expected)
    # Quantized anew: what MLX makes of the float16 elements.
    anew = convert(file, tmp_path / "q4", "--quantize", "4", "--group-size", "32")
    half = convert(file, tmp_path / "f16", "--dtype", "float16")
    same(anew, oracle(half, tmp_path / "theirs", quantize=True, q_bits=4, q_group_size=32))


@pytest.mark.parametrize(
    "label",
    [
        "llama",
        "mixtral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "gemma3_text",
        "phi3",
        "phi3-long",
    ],
)
def test_every_architecture_comes_back_as_it_was(tmp_path: Path, label: str) -> None:
    # What llama.cpp knows of Gemma 3 without being told.
    gemma = {"sliding_window_pattern": 6, "query_pre_attn_scalar": 32, "num_hidden_layers": 7}
    changes = gemma if label == "gemma3_text" else {}
    config, tensors = original(label, tmp_path / "original", **changes)
    file = tmp_path / "m.gguf"
    expected = gguf_files.write(file, config, tensors, byte_level())
    root = tmp_path / "root"
    folder = convert(file, root / "model")
    compare(folder, config, tensors, expected)
    theirs = Case(tmp_path / "original")
    with Daemon([root], models=["model"]) as daemon, daemon.wire() as wire:
        ours = Case(folder)
        check_score(ours, wire, 60)
        check_greedy(ours, wire, 20)
    text = ours.text(60)
    one, scale = theirs.oracle.logprobs(text)
    other, _ = ours.oracle.logprobs(text)
    assert np.abs(one - other).max() <= 1e-4 * scale
    for options in (("--mode", "mxfp4"), ("--recipe", "mixed_3_6", "--group-size", "32")):
        quantized = convert(file, tmp_path / options[1], *options, "--dtype", "bfloat16")
        load_model(quantized)


def sentencepiece(prefix: bool) -> tuple[Tokenizer, dict[str, Any]]:
    """Returns a tokenizer as transformers makes it, and as a GGUF file has it."""
    control = ["<unk>", "<s>", "</s>"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), replace] if prefix else [replace]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=control + raw, show_progress=False
    )
    made.train_from_iterator(PROSE.split("\n"), trainer)
    state = json.loads(made.to_str())
    # Bytes are not special tokens of SentencePiece.
    state["added_tokens"] = state["added_tokens"][: len(control)]
    state["post_processor"] = json.loads(
        processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]).__getstate__()
    )
    made = Tokenizer.from_str(json.dumps(state))
    tokens = [made.id_to_token(token) for token in range(made.get_vocab_size())]
    tokens += [f"[PAD{token}]" for token in range(len(tokens), VOCABULARY)]
    types = [3 if t in control else 6 if t in raw else 5 if t[:4] == "[PAD" else 1 for t in tokens]
    ranks = {"".join(merge): rank for rank, merge in enumerate(state["model"]["merges"])}
    known = {
        "model": "llama",
        "tokens": tokens,
        "types": [2, *types[1:]],
        "scores": [-float(ranks.get(token, 1000)) for token in tokens],
        "flags": {"add_space_prefix": prefix, "add_bos_token": True},
        "ids": {"bos": 1, "eos": 2, "unknown": 0},
    }
    return made, known


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_the_tokens_of_the_original(tmp_path: Path, prefix: bool) -> None:
    config, tensors = original("llama", tmp_path / "original")
    known, metadata = sentencepiece(prefix)
    file = tmp_path / "m.gguf"
    gguf_files.write(file, config, tensors, metadata)
    folder = convert(file, tmp_path / "out")
    rebuilt = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        expected = known.encode(text)
        assert rebuilt.encode(text).ids == expected.ids, text
        assert rebuilt.decode(expected.ids) == known.decode(expected.ids), text


def test_byte_level_tokens_are_those_of_the_original(tmp_path: Path) -> None:
    config, tensors = original("llama", tmp_path / "original")
    gguf_files.write(tmp_path / "m.gguf", config, tensors, byte_level())
    folder = convert(tmp_path / "m.gguf", tmp_path / "out")
    rebuilt = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert rebuilt.encode(text).ids == tokenizer().encode(text).ids, text


def test_a_split_model_is_read_from_its_first_part(tmp_path: Path) -> None:
    config, tensors = original("llama", tmp_path / "original")
    whole = tmp_path / "whole.gguf"
    gguf_files.write(whole, config, tensors, byte_level())
    gguf_files.write(tmp_path / "m.gguf", config, tensors, byte_level(), split_max_tensors=9)
    parts = sorted(tmp_path.glob("m-*-of-*.gguf"))
    assert len(parts) > 2
    same(convert(parts[0], tmp_path / "ours"), convert(whole, tmp_path / "expected"))
    assert "is part 2 of" in run(parts[1], tmp_path / "no").stderr
    parts[-1].unlink()
    assert "is missing" in run(parts[0], tmp_path / "no").stderr
    assert not (tmp_path / "no").exists()


def test_version_2_of_the_format_is_read_as_version_3(tmp_path: Path) -> None:
    config, tensors = original("llama", tmp_path / "original")
    new, old = tmp_path / "v3.gguf", tmp_path / "v2.gguf"
    kinds = {"blk.0.ffn_up.weight": Kind.Q8_0, "blk.1.ffn_up.weight": Kind.F16}
    gguf_files.write(new, config, tensors, byte_level(), kinds)
    whole = new.read_bytes()
    assert struct.unpack("<4sI", whole[:8]) == (b"GGUF", 3)
    # Version 3 added big-endian files; what is little-endian has the same layout.
    old.write_bytes(struct.pack("<4sI", b"GGUF", 2) + whole[8:])
    one, other = convert(old, tmp_path / "old"), convert(new, tmp_path / "new")
    same(one, other)
    assert config_of(one) == config_of(other)
    assert (one / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    for version in (1, 4):
        old.write_bytes(struct.pack("<4sI", b"GGUF", version) + whole[8:])
        assert f"version {version}" in run(old, tmp_path / "no").stderr


def test_what_cannot_be_converted_is_refused_by_name(tmp_path: Path) -> None:
    config, tensors = original("llama", tmp_path / "original")
    file, out = tmp_path / "m.gguf", tmp_path / "no"
    for metadata, why in [
        ({**byte_level(), "pre": "tekken"}, 'the pre-tokenizer "tekken" is unknown'),
        ({**byte_level(), "model": "t5"}, 'the kind "t5"'),
    ]:
        gguf_files.write(file, config, tensors, metadata)
        assert why in run(file, out).stderr
    kinds = {"blk.0.ffn_up.weight": Kind.TQ2_0}
    config, tensors = original("llama", tmp_path / "wide", hidden_size=256, intermediate_size=256)
    gguf_files.write(file, config, tensors, byte_level(), kinds)
    assert "blk.0.ffn_up.weight is stored as TQ2_0" in run(file, out).stderr
    assert not out.exists()
