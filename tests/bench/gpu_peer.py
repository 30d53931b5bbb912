"""The peer on a GPU: mlx-lm in a process that answers one line of JSON with another.

    gpu_peer.py make FOLDER SHAPE      writes a random 4-bit checkpoint
    gpu_peer.py FOLDER                 {"prompts": [[1, 2]], "tokens": 8} -> {"times": [[0.1, ...]]}
                                       {"ids": [1, 2, 3], "from": 2} -> {"logprobs": [-3.2]}

The weights are random integers with scales that keep activations near one: speed does not depend on
their values. `times` are the seconds at which each stream got each of its tokens; `logprobs` are
those of the ids from a place on, all in one forward.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "quantization": {"group_size": 64, "bits": 4},
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    # For a quick check that everything runs.
    "tiny": {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": False,
    },
}


def quantized(rows: int, columns: int, scale: float) -> dict[str, mx.array]:
    """A 4-bit matrix with entries of about `scale`."""
    packed = mx.random.randint(0, 2**32 - 1, (rows, columns // 8), dtype=mx.uint32)
    # Sixteen equally likely steps have a standard deviation of 4.6 steps.
    scales = mx.random.uniform(0.8, 1.2, (rows, columns // 64)) * (scale / 4.6)
    return {
        "weight": packed,
        "scales": scales.astype(mx.bfloat16),
        "biases": (scales * -7.5).astype(mx.bfloat16),
    }


def make(folder: Path, shape: str, seed: int = 0) -> None:
    """Writes config.json and one file of tensors a layer."""
    mx.random.seed(seed)
    config = BASE | SHAPES[shape]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    folder.mkdir(parents=True, exist_ok=True)

    def save(file: str, matrices: dict[str, tuple[int, int, float]], norms: list[str]) -> None:
        tensors = {f"{norm}.weight": mx.ones((hidden,), dtype=mx.bfloat16) for norm in norms}
        for name, (rows, columns, scale) in matrices.items():
            for part, tensor in quantized(rows, columns, scale).items():
                tensors[f"{name}.{part}"] = tensor
        mx.save_safetensors(str(folder / file), tensors, {"format": "mlx"})

    vocabulary = config["vocab_size"]
    ends = {"model.embed_tokens": (vocabulary, hidden, 1 / math.sqrt(hidden))}
    if not config["tie_word_embeddings"]:
        ends["lm_head"] = ends["model.embed_tokens"]
    save("model-ends.safetensors", ends, ["model.norm"])
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        narrow, wide = 1 / math.sqrt(hidden), 1 / math.sqrt(inner)
        matrices = {
            f"{name}.self_attn.q_proj": (queries, hidden, narrow),
            f"{name}.self_attn.k_proj": (keys, hidden, narrow),
            f"{name}.self_attn.v_proj": (keys, hidden, narrow),
            f"{name}.self_attn.o_proj": (hidden, queries, narrow),
            f"{name}.mlp.gate_proj": (inner, hidden, narrow),
            f"{name}.mlp.up_proj": (inner, hidden, narrow),
            f"{name}.mlp.down_proj": (hidden, inner, wide),
        }
        norms = [f"{name}.input_layernorm", f"{name}.post_attention_layernorm"]
        save(f"model-{layer:03}.safetensors", matrices, norms)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def alone(model: Any, tokenizer: Any, prompt: list[int], tokens: int) -> list[list[float]]:
    """One stream through stream_generate."""
    from mlx_lm.generate import stream_generate

    start = time.perf_counter()
    answers = stream_generate(model, tokenizer, prompt, max_tokens=tokens)
    return [[time.perf_counter() - start for _ in answers]]


def together(model: Any, prompts: list[list[int]], tokens: int) -> list[list[float]]:
    """All prompts at once through BatchGenerator."""
    from mlx_lm.generate import BatchGenerator

    start = time.perf_counter()
    generator = BatchGenerator(model, max_tokens=tokens)
    uids = generator.insert(prompts)
    times: dict[int, list[float]] = {uid: [] for uid in uids}
    unfinished = len(uids)
    while unfinished:
        _, responses = generator.next()
        now = time.perf_counter() - start
        for response in responses:
            times[response.uid].append(now)
            unfinished -= response.finish_reason is not None
    generator.close()
    return [times[uid] for uid in uids]


def generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int
) -> list[list[float]]:
    """Runs the prompts in the faster of both ways for their number."""
    if len(prompts) == 1:
        times = alone(model, tokenizer, prompts[0], tokens)
    else:
        times = together(model, prompts, tokens)
    assert all(len(stream) == tokens for stream in times)
    return times


def score(model: Any, ids: list[int], first: int) -> list[float]:
    """Returns the log-probabilities of the ids from `first` on."""
    logits = model(mx.array([ids[:-1]]))[0, first - 1 :].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.take_along_axis(logprobs, mx.array(ids[first:])[:, None], axis=-1)[:, 0].tolist()


def serve(folder: Path) -> None:
    """Answers until the input ends."""
    from mlx_lm.utils import load_model, load_tokenizer

    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, _ = load_model(folder)
    mx.eval(model.parameters())
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token_ids = None
    for line in sys.stdin:
        command = json.loads(line)
        if "ids" in command:
            answer = {"logprobs": score(model, command["ids"], command["from"])}
        else:
            answer = {"times": generate(model, tokenizer, command["prompts"], command["tokens"])}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), sys.argv[3])
    else:
        serve(Path(sys.argv[1]))
