"""Checkpoints as their makers publish them: single experts, PyTorch's axes, parts beside the text.

Each function takes the tensors that mlx-lm writes and gives them in the raw layout; mlx-lm's own
`sanitize` is what brings them back in the oracle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

Tensors = dict[str, mx.array]


def single_experts(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """Stacks `….switch_mlp.{part}.…` as `….experts.{e}.{names[part]}.…`."""
    raw: Tensors = {}
    for name, array in tensors.items():
        found = re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.(\w+)", name)
        if not found:
            raw[name] = array
            continue
        prefix, part, kind = found.groups()
        for expert in range(array.shape[0]):
            raw[f"{prefix}.experts.{expert}.{names[part]}.{kind}"] = array[expert]
    return raw


SAME = {part: part for part in ("gate_proj", "up_proj", "down_proj")}


def qwen(tensors: Tensors) -> Tensors:
    """Single experts; convolutions by PyTorch's axes, and with them norms less one."""
    norms = ("_layernorm.weight", "model.norm.weight", ".q_norm.weight", ".k_norm.weight")
    raw = single_experts(tensors, SAME)
    recurrent = any("conv1d" in name for name in raw)
    for name, array in raw.items():
        if "conv1d.weight" in name:
            raw[name] = array.moveaxis(1, 2)
        elif recurrent and name.endswith(norms):
            raw[name] = array - 1
    return raw


def mixtral(tensors: Tensors) -> Tensors:
    """Experts of three matrices by number."""
    return single_experts(tensors, {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"})


def nemotron(tensors: Tensors) -> Tensors:
    """Experts of two matrices, convolutions by PyTorch's axes, and layers that predict more."""
    raw = single_experts(tensors, {"fc1": "up_proj", "fc2": "down_proj"})
    for name, array in raw.items():
        if "conv1d.weight" in name:
            raw[name] = array.moveaxis(1, 2)
    return {**raw, "mtp.layers.0.norm.weight": mx.ones((64,))}


def deepseek(tensors: Tensors) -> Tensors:
    """One matrix from the latent vector to keys and values."""
    raw = single_experts(tensors, SAME)
    for name in [name for name in raw if name.endswith("embed_q.weight")]:
        prefix = name.removesuffix("embed_q.weight")
        keys, values = raw.pop(name).swapaxes(-1, -2), raw.pop(f"{prefix}unembed_out.weight")
        both = mx.concatenate([keys, values], axis=1)
        raw[f"{prefix}kv_b_proj.weight"] = both.reshape(-1, both.shape[-1])
    return raw


def lfm2(tensors: Tensors) -> Tensors:
    """Convolutions by PyTorch's axes."""
    return {
        name: array.transpose(0, 2, 1) if "conv.weight" in name else array
        for name, array in tensors.items()
    }


def gemma4(tensors: Tensors) -> Tensors:
    """Gate and up of all experts in one tensor."""
    raw = dict(tensors)
    for name in [name for name in raw if name.endswith("switch_glu.gate_proj.weight")]:
        prefix = name.removesuffix("switch_glu.gate_proj.weight")
        up, down = (raw.pop(f"{prefix}switch_glu.{part}_proj.weight") for part in ("up", "down"))
        raw[f"{prefix}gate_up_proj"] = mx.concatenate([raw.pop(name), up], axis=-2)
        raw[f"{prefix}down_proj"] = down
    return raw


def gemma3(tensors: Tensors) -> Tensors:
    """A model with a vision encoder."""
    return {
        **tensors,
        "vision_tower.encoder.weight": mx.ones((3, 3)),
        "multi_modal_projector.weight": mx.ones((3,)),
    }


def gpt_oss(tensors: Tensors) -> Tensors:
    """mxfp4 as OpenAI publishes it: rows of gate and up in turn, elements as bytes."""
    raw = {name: array for name, array in tensors.items() if "mlp.experts" not in name}
    for name in [name for name in tensors if name.endswith("experts.gate_proj.weight")]:
        prefix = name.removesuffix("gate_proj.weight")
        for kind, ending in [("weight", "_blocks"), ("scales", "_scales"), ("bias", "_bias")]:
            gate, up = (tensors[f"{prefix}{part}_proj.{kind}"] for part in ("gate", "up"))
            both = mx.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])
            raw[f"{prefix}gate_up_proj{ending}"] = _blocks(both) if kind == "weight" else both
            down = tensors[f"{prefix}down_proj.{kind}"]
            raw[f"{prefix}down_proj{ending}"] = _blocks(down) if kind == "weight" else down
    return raw


def _blocks(packed: mx.array) -> mx.array:
    """16 bytes for each group of 32 elements."""
    return packed.view(mx.uint8).reshape(*packed.shape[:-1], -1, 16)


RAW: dict[str, Callable[[Tensors], Tensors]] = {
    "qwen3_moe": qwen,
    "qwen3_next": qwen,
    "qwen3_5": qwen,
    "qwen2_moe": qwen,
    "glm4_moe": qwen,
    "mixtral": mixtral,
    "nemotron_h": nemotron,
    "deepseek_v3": deepseek,
    "glm4_moe_lite": deepseek,
    "lfm2": lfm2,
    "gemma4_text-moe": gemma4,
    "gemma3": gemma3,
    "gpt_oss": gpt_oss,
}


def rewrite(folder: Path, name: str) -> None:
    """Puts a checkpoint that mlx-lm wrote into its raw layout."""
    file = folder / "model.safetensors"
    raw = RAW[name](dict(mx.load(str(file))))
    # They are read when they are needed, and the file is about to be another.
    mx.eval(raw)
    mx.save_safetensors(str(file), raw, {"format": "pt"})
    if name == "gpt_oss":
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        del config["quantization"]
        config["quantization_config"] = {"quant_method": "mxfp4"}
        (folder / "config.json").write_text(json.dumps(config))
