"""Tiny random checkpoints of the llama family, written with mlx-lm's own model classes.

Each is a folder as Hugging Face lays it out. Together they cover what src/models/llama.rs can be
configured to do and every way its weights may be stored. Same seed, same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import llama
from mlx_lm.utils import quantize_model

from tiny_tokenizer import EOS, VOCABULARY, write_tokenizer

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": EOS,
}

# As llama 3, with an original context short enough for all three bands of wavelengths to
# occur in a head of dimension 16.
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its differences from BASE, and its storage."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    dtype: mx.Dtype = mx.float32
    # (bits, group size) of the affine quantization, and modules that differ from it.
    quantized: tuple[int, int] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    shards: int = 1
    # Tensors that old exporters leave in a file and that say nothing new.
    leftovers: bool = False


SLIDING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 11,
}

PARITY = [
    Checkpoint("mha-f32", {"num_hidden_layers": 3}),
    Checkpoint(
        "defaults-f32",
        without=("num_key_value_heads", "rope_theta", "tie_word_embeddings"),
        leftovers=True,
    ),
    Checkpoint(
        "gqa-bf16-sharded",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "rope_theta": 500000.0},
        dtype=mx.bfloat16,
        shards=3,
    ),
    Checkpoint(
        "mqa-biases-f16",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        dtype=mx.float16,
    ),
    Checkpoint(
        "head-dim-tied-bf16",
        {"head_dim": 32, "num_key_value_heads": 2, "tie_word_embeddings": True},
        dtype=mx.bfloat16,
    ),
    Checkpoint(
        "rope-linear-q4g64",
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "num_key_value_heads": 2},
        dtype=mx.bfloat16,
        quantized=(4, 64),
    ),
    Checkpoint(
        "rope-llama3-q4g32",
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "tie_word_embeddings": True},
        quantized=(4, 32),
    ),
    Checkpoint(
        "rope-llama3-type-q8-bias",
        {"rope_scaling": {"type": "llama3", **LLAMA3}, "attention_bias": True},
        dtype=mx.float16,
        quantized=(8, 32),
    ),
    Checkpoint(
        "mistral-rope-default-f32",
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "num_key_value_heads": 2,
            "sliding_window": None,
            "rope_scaling": {"rope_type": "default"},
            "num_hidden_layers": 4,
        },
        shards=2,
    ),
    Checkpoint("sliding-f32", {**SLIDING, "num_key_value_heads": 2}),
    # Heads of dimension 8, which our own attention does not support.
    Checkpoint(
        "sliding-small-heads-bf16", {**SLIDING, "num_attention_heads": 8}, dtype=mx.bfloat16
    ),
    Checkpoint("q8g64-tied", {"tie_word_embeddings": True}, quantized=(8, 64), dtype=mx.bfloat16),
    Checkpoint(
        "mixed-tied-bf16",
        {"tie_word_embeddings": True, "num_key_value_heads": 2, "num_hidden_layers": 3},
        dtype=mx.bfloat16,
        quantized=(4, 32),
        overrides={
            "model.embed_tokens": {"group_size": 32, "bits": 8},
            "model.layers.1.mlp.down_proj": {"group_size": 64, "bits": 6},
            "model.layers.2.self_attn.o_proj": False,
        },
    ),
    # 96 is not a multiple of 64: the quantizer leaves down_proj dense, without recording it.
    Checkpoint("q4g64-dense-down", {"intermediate_size": 96}, dtype=mx.float16, quantized=(4, 64)),
    Checkpoint("q3g32", {"mlp_bias": True, "num_key_value_heads": 2}, quantized=(3, 32)),
    Checkpoint("q6g64", {"num_key_value_heads": 1}, dtype=mx.bfloat16, quantized=(6, 64)),
]


def build(checkpoint: Checkpoint, root: Path, seed: int = 0) -> Path:
    """Writes the checkpoint's folder under `root`."""
    config = {k: v for k, v in {**BASE, **checkpoint.config}.items() if k not in checkpoint.without}
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.update(tree_map_with_path(random_parameter, model.parameters()))
    model.set_dtype(checkpoint.dtype)
    if checkpoint.quantized:
        bits, group_size = checkpoint.quantized
        model, config = quantize_model(
            model, config, group_size, bits, quant_predicate=_predicate(checkpoint.overrides)
        )
        left_out = {path: False for path, how in checkpoint.overrides.items() if how is False}
        config["quantization"].update(left_out)
        config["quantization_config"] = config["quantization"]
    weights = dict(tree_flatten(model.parameters()))
    if checkpoint.leftovers:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        inv_freq = 1e4 ** (mx.arange(8) / -8)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = inv_freq.astype(mx.float16)
    folder = root / checkpoint.name
    write(folder, config, weights, checkpoint.shards)
    return folder


def write(folder: Path, config: dict[str, Any], weights: dict[str, mx.array], shards: int) -> None:
    """Writes a checkpoint's files into a new folder, the tiny tokenizer among them."""
    folder.mkdir(parents=True)
    _write_weights(folder, weights, shards)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS]}))
    write_tokenizer(folder)


def random_parameter(path: str, like: mx.array) -> mx.array:
    """Draws values with which every part of the model matters: logits of a few units, attention
    neither flat nor one-hot, blocks that add about as much as the embedding contains."""
    if path.endswith("norm.weight"):
        return mx.random.uniform(0.5, 1.5, like.shape)
    if path.endswith(".bias"):
        return mx.random.normal(like.shape) * 0.3
    if "embed_tokens" in path or "lm_head" in path:
        return mx.random.normal(like.shape) * 0.5
    gain = 1.0 if "v_proj" in path or "o_proj" in path else 1.5
    return mx.random.normal(like.shape) * (gain / math.sqrt(like.shape[-1]))


def _predicate(overrides: dict[str, Any]) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    def decide(path: str, _module: nn.Module) -> bool | dict[str, Any]:
        return overrides.get(path, True)

    return decide


def _write_weights(folder: Path, weights: dict[str, mx.array], shards: int) -> None:
    metadata = {"format": "mlx"}
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata)
        return
    names = sorted(weights)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        mx.save_safetensors(str(folder / file), {n: weights[n] for n in part}, metadata)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(array.nbytes for array in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
