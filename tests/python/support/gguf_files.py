"""Writes tiny checkpoints as GGUF files, with gguf-py, by the names and layouts of llama.cpp.

What llama.cpp's converter does to tensors is done here: rows of q and k of Llama by neighbouring
pairs, 1 added to Gemma's norms, experts in one tensor, the gate of the shared expert as a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
NAMES |= {
    f"{mlp}.switch_mlp.{part}_proj": f"ffn_{part}_exps"
    for mlp in ("mlp", "block_sparse_moe")
    for part in ("gate", "up", "down")
}
NAMES |= {f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}
USUAL_NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}


def renamed(name: str, model_type: str) -> str:
    """Returns llama.cpp's name of a tensor."""
    names = NAMES | (GEMMA_NORMS if model_type == "gemma3_text" else USUAL_NORMS)
    module, _, leaf = name.rpartition(".")
    if module in names:
        return f"{names[module]}.{leaf}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{names[part]}.{leaf}"


def by_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Moves rows from halves to neighbouring pairs within each head (LlamaModel.permute)."""
    shape = rows.shape
    return rows.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)


def tensors_of(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the tensors as the converter writes them, in float32."""
    model_type = config["model_type"]
    made = {}
    for name, value in tensors.items():
        array = value
        if model_type in ("llama", "mixtral"):
            if ".q_proj." in name:
                array = by_pairs(array, config["num_attention_heads"])
            elif ".k_proj." in name:
                array = by_pairs(array, config["num_key_value_heads"])
        if model_type == "gemma3_text" and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if "shared_expert_gate" in name:
            array = array.squeeze()
        made[renamed(name, model_type)] = np.ascontiguousarray(array.astype(np.float32))
    return made


def write(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tokenizer: Mapping[str, Any],
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Writes a model; returns the elements of every tensor as gguf-py dequantizes them."""
    architecture = ARCHITECTURES[config["model_type"]]
    writer = GGUFWriter(path, architecture, **options)
    _numbers(writer, config)
    _tokenizer(writer, tokenizer)
    elements = {}
    for name, array in tensors_of(config, tensors).items():
        kind = (kinds or {}).get(name, GGMLQuantizationType.F32)
        packed = PACKERS[kind](array) if kind in PACKERS else gguf.quantize(array, kind)
        elements[name] = gguf.dequantize(packed, kind).reshape(array.shape)
        writer.add_tensor(name, packed, raw_dtype=kind)
    if scaling := config.get("rope_scaling"):
        for length in ("long", "short"):
            if factors := scaling.get(f"{length}_factor"):
                array = np.array(factors, np.float32)
                writer.add_tensor(f"rope_factors_{length}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return elements


def _numbers(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config["model_type"] == "phi3":
        head_dim = config["hidden_size"] // heads
        writer.add_rope_dimension_count(int(config.get("partial_rotary_factor", 1) * head_dim))
        if original := config.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)
    if window := config.get("sliding_window"):
        writer.add_sliding_window(window)
    if experts := config.get("num_experts") or config.get("num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if inner := config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(inner)
    if shared := config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(shared)


def _tokenizer(writer: GGUFWriter, tokenizer: Mapping[str, Any]) -> None:
    writer.add_tokenizer_model(tokenizer["model"])
    if "pre" in tokenizer:
        writer.add_tokenizer_pre(tokenizer["pre"])
    writer.add_token_list(tokenizer["tokens"])
    writer.add_token_types(tokenizer["types"])
    if "merges" in tokenizer:
        writer.add_token_merges(tokenizer["merges"])
    if "scores" in tokenizer:
        writer.add_token_scores(tokenizer["scores"])
    for key, value in tokenizer.get("flags", {}).items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    for key, value in tokenizer["ids"].items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", value)


def _halves(rows: np.ndarray, *values: float) -> np.ndarray:
    """Returns f16 numbers as bytes, for each block."""
    numbers = np.array([values], np.float16).repeat(rows.shape[0], 0)
    return numbers.view(np.uint8)


def _noise(array: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Returns blocks of random bytes whose scales are small numbers."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = array.size // elements
    generator = np.random.default_rng(array.size)
    noise = generator.integers(0, 256, (blocks, size), np.uint8)
    scale, least = 0.0005, 0.004
    if kind == GGMLQuantizationType.Q6_K:
        noise[:, -2:] = _halves(noise, scale / 20)
    elif kind == GGMLQuantizationType.IQ4_NL:
        noise[:, :2] = _halves(noise, scale)
    else:
        noise[:, :4] = _halves(noise, scale, least)
    return noise.reshape(*array.shape[:-1], -1)


# gguf-py packs these not at all; any bytes are blocks.
PACKERS = {
    kind: (lambda array, kind=kind: _noise(array, kind))
    for kind in (
        GGMLQuantizationType.Q4_K,
        GGMLQuantizationType.Q5_K,
        GGMLQuantizationType.Q6_K,
        GGMLQuantizationType.IQ4_NL,
    )
}
