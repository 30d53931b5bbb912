//! How mlx-lm stores an architecture, where that is more than the names that `adapt` gives: the prefix of
//! models of several parts, and tensors that a change of dtype passes over (`cast_predicate` of its models).

/// Returns what stands before every tensor's name in a folder that mlx-lm writes, for a model of several
/// parts whose text part alone is kept.
pub(crate) fn prefix(model_type: &str) -> &'static str {
    match model_type {
        "gemma3" | "gemma4" | "gemma4_unified" | "mistral3" | "qwen2_5_vl" | "qwen3_5" | "qwen3_5_moe" => {
            "language_model."
        }
        _ => "",
    }
}

/// Returns whether a tensor keeps its dtype when the model's is changed.
pub(crate) fn keeps_dtype(model_type: &str, name: &str) -> bool {
    match model_type {
        "deepseek_v3" | "kimi_k2" | "joyai_llm_flash" | "glm4_moe" | "glm4_moe_lite" => {
            name.contains("e_score_correction_bias")
        }
        "nemotron_h" => name.contains("e_score_correction_bias") || name.contains("A_log"),
        _ => model_type.starts_with("qwen3_5") && name.ends_with("A_log"),
    }
}
