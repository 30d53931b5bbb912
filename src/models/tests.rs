//! Every registered architecture against configs that are right, incomplete or absurd.

use mlx_rs::Dtype;
use serde_json::{Value, json};

use super::config::Key;
use super::rotation::Rotation;
use super::*;

const SETUP: Setup = Setup { dtype: Dtype::Float32, kernels: KernelSet::Composed, int8_kv: false };

/// A config with the keys of all architectures.
fn config(model_type: &str) -> Value {
    let mut all = json!({
        "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "norm_eps": 1e-5,
        "layer_norm_epsilon": 1e-5, "vocab_size": 128, "attention_bias": false, "mlp_bias": false,
        "rope_theta": 1e4, "rope_traditional": false, "tie_word_embeddings": true, "rope_scaling": null,
        "rope_parameters": {
            "rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 32,
        },
    });
    let experts = json!({
        "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "top_k_experts": 2, "enable_moe_block": true, "n_shared_experts": 1, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
        "norm_topk_prob": false, "decoder_sparse_step": 1, "mlp_only_layers": [], "n_group": 2,
        "topk_group": 1, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "moe_latent_size": 32,
    });
    let attention = json!({
        "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
        "v_head_dim": 32, "use_qk_norm": true, "sliding_window": 8,
        "sliding_window_pattern": 2, "query_pre_attn_scalar": 24.0, "attention_multiplier": 0.2,
        "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 16, "full_attention_interval": 2,
        "no_rope_layer_interval": 2, "max_position_embeddings": 256, "global_head_dim": 32,
    });
    let recurrent = json!({
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "conv_L_cache": 3, "block_ff_dim": 96,
        "block_auto_adjust_ff_dim": true, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0, "full_attn_idxs": [1, 3], "mamba_num_heads": 8,
        "mamba_head_dim": 16, "ssm_state_size": 16, "conv_kernel": 4, "n_groups": 2,
        "hybrid_override_pattern": "M*-E",
    });
    let factors = json!({ "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5 });
    let own = match model_type {
        "gpt_oss" => json!({ "attention_bias": true }),
        "gemma3" | "gemma3_text" => json!({ "rope_parameters": null }),
        "gemma4" | "gemma4_text" | "gemma4_unified" => json!({
            "rope_parameters": null, "final_logit_softcapping": 30.0, "use_double_wide_mlp": false,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        }),
        "phi3" | "glm4_moe" | "qwen3_next" | "qwen3_5" | "qwen3_5_moe" => {
            json!({ "partial_rotary_factor": 0.5 })
        }
        _ => json!({}),
    };
    for more in [experts, attention, recurrent, factors, own, json!({ "model_type": model_type })] {
        let keys = more.as_object().cloned().unwrap_or_default();
        all.as_object_mut().unwrap().extend(keys);
    }
    all
}

fn refusal(config: &Value) -> Option<OpenError> {
    open(config, SETUP).err()
}

#[test]
fn every_registered_architecture_opens() {
    for model_type in model_types() {
        let loading = open(&config(model_type), SETUP).unwrap_or_else(|why| panic!("{model_type}: {why:?}"));
        assert_eq!(loading.pieces(), 8, "{model_type}");
        assert!(loading.kv_shape().bytes_per_token() > 0, "{model_type}");
    }
}

#[test]
fn no_value_of_a_key_leads_to_a_panic() {
    let odd = [
        json!(null),
        json!(0),
        json!(-1),
        json!(1),
        json!(3),
        json!(i32::MAX),
        json!(i32::MIN),
        json!(u64::MAX),
        json!(1e300),
        json!(0.1),
        json!(true),
        json!("odd"),
        json!([]),
        json!([-1, "odd"]),
        json!({}),
    ];
    for model_type in model_types() {
        let good = config(model_type);
        for key in good.as_object().unwrap().keys().filter(|key| *key != "model_type") {
            for value in &odd {
                let mut config = good.clone();
                config[key] = value.clone();
                if let Ok(loading) = open(&config, SETUP) {
                    loading.kv_shape().bytes_per_token();
                }
            }
        }
    }
}

#[test]
fn a_missing_size_is_named() {
    for (model_type, key) in [
        ("llama", "hidden_size"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "head_dim"),
        ("lfm2", "norm_eps"),
        ("nemotron_h", "layer_norm_epsilon"),
        ("granite", "attention_bias"),
    ] {
        let mut config = config(model_type);
        config.as_object_mut().unwrap().remove(key);
        let expected = OpenError::Invalid(format!("config.json: {key} is missing"));
        assert_eq!(refusal(&config), Some(expected), "{model_type}");
    }
}

#[test]
fn an_activation_that_is_not_implemented_is_refused_by_name() {
    for (model_type, key) in
        [("llama", "hidden_act"), ("gemma2", "hidden_activation"), ("nemotron_h", "mlp_hidden_act")]
    {
        let mut config = config(model_type);
        config[key] = json!("mish");
        assert_eq!(refusal(&config), Some(OpenError::Unsupported(format!("config.json: {key} \"mish\""))));
    }
}

#[test]
fn a_key_is_read_as_its_architecture_says() {
    let config = json!({ "given": 3, "null": null });
    let given = Given::new(&config).unwrap();
    let error = |why: &str| Some(OpenError::Invalid(format!("config.json: {why}")));
    assert_eq!(Key::Required.read(&given, "given"), Ok(3));
    assert_eq!(Key::<i32>::Required.read(&given, "absent").err(), error("absent is missing"));
    assert_eq!(Key::<Option<i32>>::Required.read(&given, "null").err(), error("null is null"));
    assert_eq!(Key::Or(5).read(&given, "given"), Ok(3));
    assert_eq!(Key::Or(5).read(&given, "absent"), Ok(5));
    assert_eq!(Key::Or(Some(5)).read(&given, "null"), Ok(None));
    assert_eq!(Key::Or(5).read(&given, "null").err(), error("null is null"));
    assert_eq!(Key::Always(5).read(&given, "given"), Ok(5));
    assert_eq!(given.silent(), ["absent", "null"]);
}

#[test]
fn an_own_key_that_is_missing_or_null_or_of_another_type_is_named() {
    for (model_type, key) in [
        ("qwen3_moe", "moe_intermediate_size"),
        ("gemma4_text", "num_kv_shared_layers"),
        ("granite", "logits_scaling"),
        ("deepseek_v3", "kv_lora_rank"),
        ("nemotron_h", "ssm_state_size"),
    ] {
        let mut config = config(model_type);
        let why = |config: &Value| match refusal(config) {
            Some(OpenError::Invalid(why)) => why,
            other => panic!("{model_type} {key}: {other:?}"),
        };
        config[key] = Value::Null;
        assert_eq!(why(&config), format!("config.json: {key} is null"));
        config[key] = json!("odd");
        assert!(why(&config).starts_with(&format!("config.json: {key}: ")), "{}", why(&config));
        config.as_object_mut().unwrap().remove(key);
        assert_eq!(why(&config), format!("config.json: {key} is missing"));
    }
}

#[test]
fn two_names_of_one_key_may_not_contradict_each_other() {
    let mut config = config("qwen3_moe");
    config.as_object_mut().unwrap().remove("n_routed_experts");
    config["num_local_experts"] = json!(4);
    let why = "config.json: num_experts is 8 and num_local_experts is 4";
    assert_eq!(refusal(&config), Some(OpenError::Invalid(why.into())));
    config.as_object_mut().unwrap().remove("num_experts");
    assert_eq!(refusal(&config), None);
}

#[test]
fn the_limits_of_a_mambas_steps_are_read_by_both_names() {
    let opens = |limits: &Value| {
        let mut config = config("nemotron_h");
        config.as_object_mut().unwrap().extend(limits.as_object().unwrap().clone());
        refusal(&config).is_none()
    };
    let limit = json!([0.01, 0.1]);
    for good in [
        json!({ "time_step_limit": limit }),
        json!({ "mamba_dt_limit": limit }),
        json!({ "time_step_limit": limit, "mamba_dt_limit": limit }),
        json!({ "time_step_limit": [0.0, { "__float__": "Infinity" }] }),
    ] {
        assert!(opens(&good), "{good}");
    }
    for bad in [
        json!({ "time_step_limit": limit, "mamba_dt_limit": [0.0, 0.1] }),
        json!({ "time_step_limit": [0.1, 0.01] }),
        json!({ "mamba_dt_limit": "odd" }),
        json!({ "time_step_limit": null }),
    ] {
        assert!(!opens(&bad), "{bad}");
    }
}

#[test]
fn a_rotation_is_found_where_transformers_5_writes_it_before_the_keys_beside_it() {
    let read = |config: Value| {
        Rotation::read(&Given::new(&config).unwrap()).map(|found| (found.theta, found.part, found.scaling))
    };
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 5.0 });
    let old = json!({ "type": "linear", "factor": 2.0 });
    let both = json!({ "rope_theta": 7.0, "partial_rotary_factor": 0.5, "rope_parameters": yarn });
    assert_eq!(read(both.clone()), Ok((Some(5.0), Some(0.5), yarn)));
    let mut three = both;
    three["rope_scaling"] = old.clone();
    assert_eq!(read(three), Ok((Some(7.0), Some(0.5), old)));
    assert_eq!(read(json!({})), Ok((None, None, Value::Null)));
    for (config, key) in [
        (json!({ "rope_theta": null }), "rope_theta"),
        (json!({ "rope_parameters": { "rope_theta": null } }), "rope_parameters.rope_theta"),
        (json!({ "rope_scaling": "yarn" }), "rope_scaling"),
        (json!({ "rope_parameters": { "full_attention": {} } }), "rope_parameters.full_attention"),
    ] {
        match read(config) {
            Err(OpenError::Invalid(why)) => assert!(why.contains(&format!("config.json: {key}")), "{why}"),
            other => panic!("{key}: {other:?}"),
        }
    }
}
