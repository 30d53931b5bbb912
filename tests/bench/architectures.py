"""One stream of every architecture, in sizes like SmolLM2's, beside its mlx-lm module.

    tests/bench/run.sh architectures [--architectures llama,qwen3] [--rounds 3] [--check]

Random float32 weights. mlx-lm runs its generate_step, with OpenBLAS under it, in a process of its
own; the two alternate round by round, and the idle one is stopped. Compared is decoding: the median
time from one token to the next.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from architecture_rows import ROWS
from peers import Contestant, Mlxd, blas_library, environment
from stats import Report, markdown, parser, run
from streams import Ask, Heard, Prompts
from tiny_models import Architecture, build

PEER = "mlx-lm"
PROMPT = 32
# SmolLM2-135M's, with 12 of its 30 layers, so that all fit into a quarter of an hour.
SIZES: dict[str, Any] = {
    "hidden_size": 576,
    "num_hidden_layers": 12,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
MIXTURE = {"num_experts": 16, "num_local_experts": 16, "n_routed_experts": 16}
MIXTURE |= {"num_experts_per_tok": 4, "top_k_experts": 4, "moe_intermediate_size": 384}
# Consequences of the sizes above elsewhere in a row's configuration.
ADAPTED: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64, **MIXTURE},
    "gemma3_text": {"head_dim": 64, "sliding_window": 512, "query_pre_attn_scalar": 64},
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64.0},
    "gpt_oss": {"head_dim": 64, "sliding_window": 128, "intermediate_size": 384, **MIXTURE},
    "ministral3": {
        "head_dim": 64,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"] * 6,
    },
    "qwen3_next": {
        **MIXTURE,
        "head_dim": 64,
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "shared_expert_intermediate_size": 384,
        "mlp_only_layers": [],
        "full_attention_interval": 4,
    },
    "gemma4_text": {
        "head_dim": 64,
        "global_head_dim": 128,
        "sliding_window": 512,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 49152,
        "num_kv_shared_layers": 4,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 3,
    },
    "mixtral": {**MIXTURE, "intermediate_size": 384},
    "glm4_moe": {**MIXTURE, "head_dim": 64},
    "deepseek_v3": {
        **MIXTURE,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "kv_lora_rank": 128,
        "q_lora_rank": 192,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
    },
    "lfm2": {
        "block_dim": 576,
        "block_ff_dim": 1536,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "conv", "full_attention"] * 4,
    },
    "nemotron_h": {
        **MIXTURE,
        "head_dim": 64,
        "mamba_num_heads": 16,
        "mamba_head_dim": 64,
        "ssm_state_size": 64,
        "hybrid_override_pattern": list("M-M*M-M*M-ME"),
        "moe_shared_expert_intermediate_size": 384,
    },
}
for _name, _like in [
    ("qwen3_5", "qwen3_next"),
    ("qwen3_5_moe", "qwen3_next"),
    ("glm4_moe_lite", "deepseek_v3"),
    ("gemma4_text-moe", "gemma4_text"),
]:
    ADAPTED[_name] = dict(ADAPTED[_like])
ADAPTED["qwen3_5"] |= {"num_experts": 0}
ADAPTED["gemma4_text-moe"] |= {
    **MIXTURE,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "num_global_key_value_heads": 3,
}
# The same computation as another row.
LEFT_OUT = ("mistral", "mistral3", "gemma3", "gemma4", "phi3-long")


class Module(Contestant):
    """An mlx-lm module, asked by one line of JSON at a time."""

    name = PEER

    def __init__(self, folder: Path, blas: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(blas),
            text=True,
        )

    async def hear(self, ask: Ask, heard: Heard) -> None:
        """Runs one request; the times of its tokens arrive at its end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"prompt": ask.ids, "tokens": ask.tokens}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(await asyncio.to_thread(self.process.stdout.readline))
        heard.times += answer
        heard.counts += [1] * len(answer)


def serve(folder: Path) -> None:
    """Answers until the input ends."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, _ = load_model(folder)
    mx.eval(model.parameters())
    for line in sys.stdin:
        command = json.loads(line)
        steps = generate_step(mx.array(command["prompt"]), model, max_tokens=command["tokens"])
        print(json.dumps([time.perf_counter() for _ in steps]), file=answers, flush=True)


def gap(heard: Heard) -> float:
    """Returns the median time from one token to the next, in seconds."""
    times = heard.times
    return median(b - a for a, b in itertools.pairwise(times))


async def compare(row: Architecture, folder: Path, options: Any) -> dict[str, list[float]]:
    """Measures the tokens/s of both, one value per round."""
    config = row.base(**{**SIZES, **ADAPTED.get(row.label, {})})
    build(row, config, folder)
    prompts = Prompts(folder, options.seed)
    speeds: dict[str, list[float]] = {}
    contestants: list[Contestant] = [Mlxd(folder), Module(folder, blas_library())]
    try:
        for round_ in range(options.rounds + 1):
            for contestant in contestants:
                with contestant.awake():
                    _, (heard,) = await contestant.together([prompts.ask(PROMPT, options.tokens)])
                if round_ > 0:
                    speeds.setdefault(contestant.name, []).append(1 / gap(heard))
    finally:
        for contestant in contestants:
            contestant.stop()
    return speeds


async def main() -> bool:
    """Measures all architectures, one after another."""
    made = parser(__doc__ or "")
    made.add_argument("--architectures", help="names with commas; all by default")
    made.add_argument("--tokens", type=int, default=48)
    options = made.parse_args()
    wanted = options.architectures.split(",") if options.architectures else None
    report, lines = Report("One stream of every architecture, decoding", options), []
    for row in ROWS:
        if row.label in LEFT_OUT or (wanted is not None and row.label not in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            speeds = await compare(row, Path(folder) / row.label, options)
        ours, theirs = (median(values) for values in speeds.values())
        lines.append([row.label, ours, theirs, ours / theirs])
        print(f"{row.label:18}{ours:8.1f}{theirs:8.1f}{ours / theirs:7.2f}", flush=True)
        report.fact(row.label, speeds)
        report.promise(f"{row.label} beside its module", ours / theirs, 1.0, at_least=True)
    return report.end(markdown(["", "mlxd, tokens/s", "mlx-lm, tokens/s", "ratio"], lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
    else:
        run(main)
