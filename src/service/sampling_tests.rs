//! Ranges, defaults and what the model says.

use super::*;
use crate::hub::DefaultSampling;
use crate::service::OutputOptions;

const LIMITS: Limits = Limits {
    message_bytes_max: 1 << 20,
    connections_max: 1,
    connections_unproven_max: 1,
    first_call: std::time::Duration::ZERO,
    streams_per_connection_max: 1,
    keep_alive: std::time::Duration::from_secs(1),
    sessions_max: 1,
    sessions_pinned_max: 1,
    session_labels_max: 1,
    session_ttl: std::time::Duration::from_secs(1),
    session_ttl_max: std::time::Duration::from_secs(1),
    max_tokens_default: 4096,
    choices_max: 1,
    dry_context_max: 100,
    score_tokens_max: 1,
    top_logprobs_max: 20,
    stop_strings_max: 2,
    stop_string_bytes_max: 4,
    stop_token_ids_max: 2,
    logit_bias_max: 2,
    text_bytes_max: 1,
    answer_bytes_max: 1,
    session_bytes_max: 1,
    sessions_bytes_max: 1,
    sessions_disk_bytes_max: 1,
    session_watches_max: 1,
    session_saves_max: 1,
    receive_bytes_max: 1,
    receive_bytes_per_connection_max: 1,
    receive: std::time::Duration::ZERO,
    chat_parts_max: 1,
    tools_max: 1,
    preparations_max: None,
    grammar_bytes_max: 1 << 20,
    grammar_depth_max: 100,
    grammar_work_max: 1_000_000,
    grammar_compile: std::time::Duration::from_secs(60),
    grammar_cache_bytes_max: 1 << 20,
    downloads_running_max: 1,
};

fn facts() -> ModelFacts {
    ModelFacts {
        architecture: "llama".into(),
        context_length: 100,
        vocabulary_size: 50,
        parameter_count: 0,
        stored_as: String::new(),
        file_bytes: 0,
        default_sampling: DefaultSampling {
            temperature: 0.5,
            top_p: 0.9,
            top_k: 40,
            min_p: 0.0,
            repetition_penalty: 1.1,
            typical_p: 1.0,
        },
    }
}

fn refused(sent: &SamplingOptions) -> String {
    match sent.check(&LIMITS).and_then(|()| sent.resolve(&facts(), (50, &LIMITS), || Ok([].into()))) {
        Err(Error::InvalidField { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

fn resolved(sent: &SamplingOptions) -> Sampling {
    sent.check(&LIMITS).unwrap();
    sent.resolve(&facts(), (50, &LIMITS), || Ok([].into())).unwrap()
}

#[test]
fn every_range_is_checked_and_nan_is_in_none() {
    let default = SamplingOptions::default;
    for bad in [f32::NAN, f32::INFINITY, -0.1, 100.5] {
        assert_eq!(refused(&SamplingOptions { temperature: Some(bad), ..default() }), "sampling.temperature");
        assert_eq!(refused(&SamplingOptions { top_p: Some(bad), ..default() }), "sampling.top_p");
        let repetition = SamplingOptions { repetition_penalty: Some(bad), ..default() };
        assert_eq!(refused(&repetition), "sampling.repetition_penalty");
        assert_eq!(refused(&SamplingOptions { min_p: Some(bad), ..default() }), "sampling.min_p");
        let options = SamplingOptions { repetition_penalty: Some(bad), ..default() };
        assert_eq!(refused(&options), "sampling.repetition_penalty");
    }
    for bad in [f32::NAN, -100.5, 100.5] {
        let options = SamplingOptions { presence_penalty: Some(bad), ..default() };
        assert_eq!(refused(&options), "sampling.presence_penalty");
        let options = SamplingOptions { frequency_penalty: Some(bad), ..default() };
        assert_eq!(refused(&options), "sampling.frequency_penalty");
    }
    let bias = |entries: &[(u32, f32)]| SamplingOptions {
        logit_bias: entries.iter().copied().collect(),
        ..default()
    };
    assert_eq!(refused(&bias(&[(3, f32::NAN)])), "sampling.logit_bias[3]");
    assert_eq!(refused(&bias(&[(50, 1.0)])), "sampling.logit_bias[50]");
    assert_eq!(refused(&bias(&[(1, 0.0), (2, 0.0), (3, 0.0)])), "sampling.logit_bias");
}

#[test]
fn unset_is_the_models_default_and_zero_is_zero() {
    let unset = resolved(&SamplingOptions::default());
    assert_eq!((unset.temperature, unset.top_p, unset.top_k), (0.5, 0.9, 40));
    assert_eq!(unset.repetition, Penalty { value: 1.1, context_size: 20 });
    let zero = resolved(&SamplingOptions {
        temperature: Some(0.0),
        top_p: Some(0.0),
        top_k: Some(0),
        seed: Some(0),
        repetition_penalty: Some(0.0),
        repetition_context_size: Some(0),
        ..Default::default()
    });
    assert_eq!((zero.temperature, zero.top_p, zero.top_k, zero.seed), (0.0, 1.0, 0, 0));
    assert_eq!(zero.repetition, Penalty { value: 1.0, context_size: 0 });
}

#[test]
fn a_top_k_of_the_vocabulary_and_more_is_off() {
    assert_eq!(resolved(&SamplingOptions { top_k: Some(50), ..Default::default() }).top_k, 0);
    assert_eq!(resolved(&SamplingOptions { top_k: Some(49), ..Default::default() }).top_k, 49);
}

#[test]
fn stop_strings_are_bounded_and_not_empty() {
    let refused = |options: &StoppingOptions| match options.check(&LIMITS) {
        Err(Error::InvalidField { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let stops = |texts: &[&str]| StoppingOptions {
        stop_strings: texts.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    assert_eq!(refused(&stops(&["a", ""])), "stopping.stop_strings[1]");
    assert_eq!(refused(&stops(&["12345"])), "stopping.stop_strings[0]");
    assert_eq!(refused(&stops(&["a", "b", "c"])), "stopping.stop_strings");
    let none = StoppingOptions { max_tokens: Some(0), ..Default::default() };
    assert_eq!(refused(&none), "stopping.max_tokens");
}

#[test]
fn logprobs_are_bounded() {
    let check = |top_logprobs| OutputOptions { top_logprobs, token_ids: false }.check(&LIMITS);
    assert_eq!(
        check(Some(21)),
        Err(Error::field("output.logprobs", "top_logprobs_max: must be 0 to 20")),
        "the key, as of every limit"
    );
    assert!(check(Some(0)).is_ok() && check(None).is_ok());
}

#[test]
fn a_repetition_penalty_that_leaves_no_numbers_is_refused() {
    let sent = |penalty| SamplingOptions { repetition_penalty: Some(penalty), ..SamplingOptions::default() };
    for bad in [1e-38, f32::MIN_POSITIVE / 2.0, 0.009] {
        assert_eq!(refused(&sent(bad)), "sampling.repetition_penalty");
    }
    for (good, in_force) in [(0.0, 1.0), (0.01, 0.01), (100.0, 100.0)] {
        assert_eq!(resolved(&sent(good)).repetition.value, in_force);
    }
}

#[test]
fn typical_p_is_off_at_both_ends_and_dry_without_a_strength() {
    let off =
        [None, Some(0.0), Some(1.0)].map(|typical_p| SamplingOptions { typical_p, ..Default::default() });
    assert!(off.iter().all(|sent| resolved(sent).typical_p == 1.0));
    let half = SamplingOptions { typical_p: Some(0.5), ..SamplingOptions::default() };
    assert_eq!(resolved(&half).typical_p, 0.5);
    assert_eq!(resolved(&SamplingOptions::default()).dry, None);
    let dry = |dry| SamplingOptions { dry, ..SamplingOptions::default() };
    let zero = DryOptions { multiplier: Some(0.0), base: Some(2.0), ..DryOptions::default() };
    assert_eq!(resolved(&dry(zero)).dry, None);
    let on = DryOptions { multiplier: Some(0.8), ..DryOptions::default() };
    let on = resolved(&dry(on)).dry.unwrap();
    assert_eq!((on.base, on.allowed_length, on.context_size), (1.75, 2, 100), "all is the limit");
    assert_eq!(&*on.breakers, ["\n", ":", "\"", "*"]);
    let sequence_breakers = Some(Vec::new());
    let without = DryOptions { multiplier: Some(0.8), sequence_breakers, ..DryOptions::default() };
    assert!(resolved(&dry(without)).dry.unwrap().breakers.is_empty());
}

#[test]
fn values_of_dry_out_of_range_are_refused() {
    let dry = |dry| refused(&SamplingOptions { dry, ..SamplingOptions::default() });
    let default = DryOptions::default;
    for bad in [f32::NAN, -1.0, 101.0] {
        assert_eq!(dry(DryOptions { multiplier: Some(bad), ..default() }), "sampling.dry_multiplier");
        assert_eq!(dry(DryOptions { base: Some(bad), ..default() }), "sampling.dry_base");
        let typical = SamplingOptions { typical_p: Some(bad), ..SamplingOptions::default() };
        assert_eq!(refused(&typical), "sampling.typical_p");
    }
    assert_eq!(dry(DryOptions { base: Some(0.9), ..default() }), "sampling.dry_base");
    assert_eq!(dry(DryOptions { allowed_length: Some(0), ..default() }), "sampling.dry_allowed_length");
    assert_eq!(dry(DryOptions { context_size: Some(101), ..default() }), "sampling.dry_context_size");
    let breakers = |texts: &[&str]| {
        let texts = texts.iter().map(ToString::to_string).collect();
        dry(DryOptions { sequence_breakers: Some(texts), ..default() })
    };
    assert_eq!(breakers(&["a", ""]), "sampling.dry_sequence_breakers[1]");
    assert_eq!(breakers(&["12345"]), "sampling.dry_sequence_breakers[0]");
    assert_eq!(breakers(&["a", "b", "c"]), "sampling.dry_sequence_breakers");
}
