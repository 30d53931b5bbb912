"""The architectures that the daemon serves: a small configuration and a sweep of each."""

from __future__ import annotations

from typing import Any

from tiny_models import Architecture
from tiny_tokenizer import VOCABULARY

TIED = {"tie_word_embeddings": [True, False]}
HEAD_DIM = {"head_dim": [8, 16, 32, 48]}
WINDOWS = {"sliding_window": [5, 11, 40]}
BIAS = {"attention_bias": [True, False]}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
SCALINGS = {
    "rope_scaling": [
        None,
        {"type": "linear", "factor": 2.0},
        LLAMA3,
        YARN,
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
        {"rope_type": "dynamic", "factor": 2.0},
    ]
}
EXPERTS = {
    "num_experts": [4, 8],
    "num_experts_per_tok": [1, 2, 3],
    "moe_intermediate_size": [32, 64],
}
ROUTED = {
    "n_routed_experts": [4, 8],
    "num_experts_per_tok": [2, 3],
    "n_shared_experts": [1, 2],
    "routed_scaling_factor": [1.0, 2.5],
    "norm_topk_prob": [True, False],
    "first_k_dense_replace": [0, 1],
    "moe_intermediate_size": [32, 64],
    "groups": [(1, 1), (2, 1), (4, 3)],
}

MIXTURE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GEMMA3 = {
    "head_dim": 32,
    "sliding_window": 11,
    "sliding_window_pattern": 3,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1e6,
    "query_pre_attn_scalar": 24,
}
DEEPSEEK = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "moe_layer_freq": 1,
    "rope_scaling": {**YARN, "type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0},
}
LATENT = {
    "kv_lora_rank": [16, 32],
    "q_lora_rank": [None, 48],
    "qk_rope_head_dim": [8, 16],
    "qk_nope_head_dim": [32],
    "v_head_dim": [32, 64],
    "heads": [(4, 4), (2, 2)],
    "rope_scaling": [None, {**YARN, "type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}],
}
GEMMA4 = {
    "num_hidden_layers": 6,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "use_double_wide_mlp": True,
    "sliding_window": 11,
    "sliding_window_pattern": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "tie_word_embeddings": True,
    "final_logit_softcapping": 30.0,
}
NEXT = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 32,
    "mlp_only_layers": [0],
    "moe_intermediate_size": 32,
    "partial_rotary_factor": 0.5,
    "norm_topk_prob": True,
    "full_attention_interval": 2,
}
DELTA = {
    "linear_num_value_heads": [2, 4],
    "linear_num_key_heads": [1, 2],
    "linear_key_head_dim": [8, 32],
    "linear_value_head_dim": [16, 24],
    "linear_conv_kernel_dim": [2, 4],
    "full_attention_interval": [2, 3],
    "num_hidden_layers": [3, 4],
}
NEXT_ROPE = {
    "type": "default",
    "mrope_section": [2, 3, 3],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
QWEN35 = {**NEXT, "rope_parameters": NEXT_ROPE}
QWEN35_WITHOUT = ("rope_theta", "partial_rotary_factor", "mlp_only_layers")


def _layers(kinds: list[str], *lengths: int) -> list[dict[str, Any]]:
    return [
        {"num_hidden_layers": n, "layer_types": [kinds[i % len(kinds)] for i in range(n)]}
        for n in lengths
    ]


ROWS = [
    Architecture(
        "llama", choices={**TIED, **HEAD_DIM, **BIAS, **SCALINGS, "mlp_bias": [True, False]}
    ),
    Architecture(
        "qwen2_moe",
        {"shared_expert_intermediate_size": 48, **MIXTURE},
        {**EXPERTS, "shared_expert_intermediate_size": [32, 64]},
    ),
    Architecture("mistral", choices={**TIED, **HEAD_DIM, **SCALINGS}),
    Architecture("qwen2", choices={**TIED, **SCALINGS}),
    Architecture("qwen3", {"head_dim": 32}, {**TIED, **HEAD_DIM, **SCALINGS}),
    Architecture(
        "qwen3_moe",
        {"head_dim": 32, "norm_topk_prob": True, **MIXTURE},
        {
            **TIED,
            **HEAD_DIM,
            **EXPERTS,
            "norm_topk_prob": [True, False],
            "decoder_sparse_step": [1, 2],
            "mlp_only_layers": [[], [1]],
        },
    ),
    Architecture(
        "gemma3_text",
        GEMMA3,
        {
            **HEAD_DIM,
            **WINDOWS,
            "sliding_window_pattern": [1, 2, 3],
            "num_hidden_layers": [3, 4],
            "query_pre_attn_scalar": [16, 40],
            "rope_scaling": [None, {"rope_type": "linear", "factor": 8.0}],
        },
    ),
    Architecture("gemma3", GEMMA3, {**WINDOWS, "num_hidden_layers": [3, 4]}, text="gemma3_text"),
    Architecture(
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
        {
            **HEAD_DIM,
            "attn_logit_softcapping": [2.0, 50.0],
            "final_logit_softcapping": [5.0, 30.0],
            "query_pre_attn_scalar": [16, 40],
        },
    ),
    Architecture(
        "phi3",
        {"partial_rotary_factor": 0.5},
        {
            **TIED,
            "heads": [(4, 4), (4, 2)],
            "partial_rotary_factor": [0.5, 1.0],
            "rope_scaling": [None, {"type": "linear", "factor": 2.0, "long_factor": [1.0]}],
        },
    ),
    Architecture(
        "phi3",
        {
            "original_max_position_embeddings": 512,
            "rope_scaling": {
                "type": "longrope",
                "long_factor": [1.0 + 0.3 * i for i in range(8)],
                "short_factor": [1.0] * 8,
            },
        },
        {"heads": [(4, 4), (4, 1)]},
        name="phi3-long",
    ),
    Architecture(
        "gpt_oss",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "sliding_window": 11,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_scaling": {**YARN, "factor": 32.0},
        },
        {
            **HEAD_DIM,
            **WINDOWS,
            "num_local_experts": [4, 8],
            "num_experts_per_tok": [1, 3],
            "num_hidden_layers": [2, 4],
            "rope_scaling": [{"rope_type": "default"}, YARN],
        },
    ),
    Architecture(
        "ministral3",
        {
            "head_dim": 16,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                **YARN,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        {
            **TIED,
            **HEAD_DIM,
            **WINDOWS,
            "layers": _layers(["full_attention", "sliding_attention"], 2, 3, 4),
        },
    ),
    Architecture("mistral3", choices=HEAD_DIM, text="mistral"),
    Architecture(
        "qwen3_next",
        NEXT,
        {
            **TIED,
            **DELTA,
            **EXPERTS,
            **BIAS,
            "head_dim": [16, 32],
            "norm_topk_prob": [True, False],
            "mlp_only_layers": [[], [1]],
            "decoder_sparse_step": [1, 2],
            "partial_rotary_factor": [0.25, 1.0],
        },
    ),
    Architecture(
        "qwen3_5", {**QWEN35, "num_experts": 0}, {**TIED, **DELTA, **BIAS}, without=QWEN35_WITHOUT
    ),
    Architecture("qwen3_5_moe", QWEN35, {**TIED, **DELTA, **EXPERTS}, without=QWEN35_WITHOUT),
    Architecture(
        "gemma4_text",
        GEMMA4,
        {
            **WINDOWS,
            "heads": [(4, 1), (4, 2), (8, 2)],
            "head_dim": [16, 32],
            "global_head_dim": [32, 48],
            "num_kv_shared_layers": [0, 2],
            "hidden_size_per_layer_input": [0, 16],
            "use_double_wide_mlp": [True, False],
            "final_logit_softcapping": [None, 5.0],
            "layers": _layers(["sliding_attention", "sliding_attention", "full_attention"], 6, 9),
            "num_hidden_layers": [6],
        },
    ),
    Architecture(
        "gemma4_text",
        {
            **GEMMA4,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "attention_k_eq_v": True,
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        {
            **WINDOWS,
            "num_experts": [4, 8],
            "top_k_experts": [1, 3],
            "num_hidden_layers": [6],
            "attention_k_eq_v": [True, False],
        },
        name="gemma4_text-moe",
    ),
    Architecture("gemma4", GEMMA4, {**WINDOWS, "num_hidden_layers": [6]}, text="gemma4_text"),
    Architecture(
        "smollm3",
        {"num_hidden_layers": 4},
        {**TIED, **SCALINGS, "no_rope_layer_interval": [2, 3, 4]},
    ),
    Architecture(
        "mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        {**TIED, "num_local_experts": [4, 8], "num_experts_per_tok": [1, 2, 3]},
    ),
    Architecture(
        "glm4_moe",
        {
            "head_dim": 32,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "use_qk_norm": True,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "rope_scaling": None,
        },
        {
            **HEAD_DIM,
            **BIAS,
            **ROUTED,
            "n_routed_experts": [8],
            "use_qk_norm": [True, False],
            "partial_rotary_factor": [0.5, 1.0],
        },
    ),
    Architecture(
        "glm4_moe_lite",
        {**DEEPSEEK, "n_group": 1, "topk_group": 1},
        {**LATENT, **ROUTED, **BIAS, "n_routed_experts": [8]},
    ),
    Architecture("deepseek_v3", DEEPSEEK, {**LATENT, **ROUTED, **BIAS, "n_routed_experts": [8]}),
    Architecture(
        "olmo2", choices={**TIED, **HEAD_DIM, **BIAS, **SCALINGS, "mlp_bias": [True, False]}
    ),
    Architecture(
        "lfm2",
        {
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": 64,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
            "block_ff_dim": 96,
            "layer_types": ["conv", "full_attention", "conv"],
            "tie_word_embeddings": True,
        },
        {
            "conv_bias": [True, False],
            "conv_L_cache": [2, 3, 5],
            "block_multiple_of": [8, 32],
            "block_ffn_dim_multiplier": [1.0, 1.3],
            "block_auto_adjust_ff_dim": [True, False],
            "layers": _layers(["conv", "full_attention", "conv", "conv"], 2, 3, 5),
        },
    ),
    Architecture(
        "granite",
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_bias": False,
            "mlp_bias": False,
        },
        {
            **TIED,
            **BIAS,
            **SCALINGS,
            "mlp_bias": [True, False],
            "logits_scaling": [3.0, 8.0],
            "residual_multiplier": [0.22, 1.0],
            "embedding_multiplier": [1.0, 12.0],
        },
    ),
    Architecture(
        "nemotron_h",
        {
            "head_dim": 16,
            "attention_bias": False,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "mamba_proj_bias": False,
            "ssm_state_size": 16,
            "conv_kernel": 4,
            "n_groups": 2,
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-5,
            "use_bias": False,
            "use_conv_bias": True,
            "hybrid_override_pattern": list("M-M*E"),
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
        },
        {
            **BIAS,
            "head_dim": [16, 32],
            "mamba_num_heads": [4, 8],
            "mamba_head_dim": [8, 16],
            "ssm_state_size": [8, 32],
            "n_groups": [1, 2],
            "conv_kernel": [2, 4],
            "layers": [{"mamba_proj_bias": bias, "use_bias": bias} for bias in (True, False)],
            "mlp_bias": [True, False],
            "use_conv_bias": [True, False],
            "hybrid_override_pattern": [list("M*"), list("MM-E*M"), list("*-M")],
            "groups": [(1, 1), (2, 1)],
            "norm_topk_prob": [True, False],
            "moe_latent_size": [None, 32],
            "time_step_limit": [[0.0, 1e9], [0.3, 0.6]],
        },
        without=("num_hidden_layers",),
    ),
]


def row_of(label: str) -> Architecture:
    """Returns an architecture by its label."""
    (row,) = [row for row in ROWS if row.label == label]
    return row
