//! The `config.json` of a model in a GGUF file, but for its quantization: the keys that transformers and
//! mlx-lm read.

use serde_json::{Value, json};

use super::super::HubError;
use super::gguf::Gguf;
use super::numbers::{Experts, Family, Numbers};
use super::rope;

/// Layers of Gemma 3's 27B, whose queries are scaled otherwise than those of its sisters
/// (llama.cpp, llama-model.cpp, `f_attention_scale`).
const GEMMA3_27B_LAYERS: u64 = 62;

/// Returns the config. `tokens` is the number of tokens of the tokenizer.
///
/// # Errors
/// `Damaged` if the tokenizer has more tokens than the model has embeddings, `Unsupported` for a scaling of
/// the rotation that no config can say.
pub(super) fn build(
    gguf: &Gguf,
    numbers: &Numbers,
    tokens: usize,
    generation: &Value,
) -> Result<Value, HubError> {
    if tokens > numbers.vocab {
        let why = format!("has {tokens} tokens, but embeddings for {}", numbers.vocab);
        return Err(gguf.damaged(why));
    }
    let mut config = usual(numbers);
    config["rope_scaling"] = rope::scaling(gguf, numbers)?;
    for (key, value) in own(numbers).as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        if let Some(id) = generation.get(key) {
            config[key] = id.clone();
        }
    }
    Ok(config)
}

fn usual(numbers: &Numbers) -> Value {
    json!({
        "hidden_size": numbers.hidden,
        "intermediate_size": numbers.feed_forward,
        "num_hidden_layers": numbers.layers,
        "num_attention_heads": numbers.heads,
        "num_key_value_heads": numbers.kv_heads,
        "head_dim": numbers.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": numbers.context_length,
        "rms_norm_eps": numbers.norm_eps,
        "rope_theta": numbers.rope_base,
        "vocab_size": numbers.vocab,
        "tie_word_embeddings": numbers.tied,
    })
}

/// Returns what an architecture has besides, or otherwise.
fn own(numbers: &Numbers) -> Value {
    let window = Some(numbers.window).filter(|&window| window > 0);
    let experts = numbers.experts.unwrap_or(Experts { count: 0, used: 0, inner: 0, shared: 0 });
    match numbers.family {
        Family::Llama => json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": numbers.biases.qkv,
            "mlp_bias": numbers.biases.mlp,
        }),
        Family::Mixtral => json!({
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": experts.count,
            "num_experts_per_tok": experts.used,
            "sliding_window": window,
        }),
        Family::Qwen2 => json!({
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "use_sliding_window": false,
        }),
        Family::Qwen2Moe => qwen_mixture("Qwen2MoeForCausalLM", "qwen2_moe", experts),
        Family::Qwen3 => json!({
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": false,
            "use_sliding_window": false,
        }),
        Family::Qwen3Moe => qwen_mixture("Qwen3MoeForCausalLM", "qwen3_moe", experts),
        Family::Gemma3 => {
            let scalar = match numbers.layers {
                GEMMA3_27B_LAYERS => numbers.hidden / numbers.heads,
                _ => numbers.head_dim,
            };
            json!({
                "architectures": ["Gemma3ForCausalLM"],
                "model_type": "gemma3_text",
                "hidden_act": null,
                "hidden_activation": "gelu_pytorch_tanh",
                "attention_bias": false,
                "query_pre_attn_scalar": scalar,
                "sliding_window": numbers.window,
                "sliding_window_pattern": 6,
                "rope_local_base_freq": 10000.0,
            })
        }
        Family::Phi3 => json!({
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "original_max_position_embeddings": numbers.rope_original,
            "partial_rotary_factor": numbers.rotated as f64 / numbers.head_dim as f64,
            "sliding_window": window,
        }),
    }
}

/// Returns what Qwen's mixtures have besides: all layers mix, and only Qwen 3's shares add up to one
/// (llama.cpp, llama-model.cpp, `build_moe_ffn`).
fn qwen_mixture(class: &str, model_type: &str, experts: Experts) -> Value {
    let mut config = json!({
        "architectures": [class],
        "model_type": model_type,
        "use_sliding_window": false,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.used,
        "moe_intermediate_size": experts.inner,
        "norm_topk_prob": model_type == "qwen3_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    });
    if experts.shared > 0 {
        config["shared_expert_intermediate_size"] = json!(experts.shared);
    } else {
        config["attention_bias"] = json!(false);
    }
    config
}
