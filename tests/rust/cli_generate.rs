//! Options of `mlxd generate` that shape the output: samplers, several answers, an answer that is begun.

use mlxd_client::v1::{Message, Role, generate_request::Input};

use crate::cli::fake::FakeDaemon;
use crate::cli::{json, run, stderr, stdout};

#[tokio::test(flavor = "multi_thread")]
async fn samplers_reach_the_daemon() {
    let fake = FakeDaemon::start();
    let typical = ["generate", "--typical-p", "0.5", "hi"];
    assert_eq!(run(&fake, &typical).status.code(), Some(0));
    let dry = [
        "generate",
        "--dry-multiplier",
        "0.8",
        "--dry-base",
        "2",
        "--dry-breaker",
        "a",
        "--dry-breaker",
        "b",
    ];
    assert_eq!(run(&fake, &[&dry[..], &["hi"]].concat()).status.code(), Some(0));
    let state = fake.state();
    let [typical, dry] = [0, 1].map(|index| state.generations[index].sampling.clone().unwrap());
    assert_eq!((typical.typical_p, typical.dry_multiplier), (Some(0.5), None));
    assert_eq!((dry.dry_multiplier, dry.dry_base, dry.dry_allowed_length), (Some(0.8), Some(2.0), None));
    assert_eq!(dry.dry_sequence_breakers.unwrap().texts, ["a", "b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn mirostat_is_refused_by_name() {
    let fake = FakeDaemon::start();
    let output = run(&fake, &["generate", "--mirostat", "2", "hi"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("no mirostat"), "{}", stderr(&output));
    assert!(fake.state().generations.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn several_answers_are_printed_with_their_numbers() {
    let fake = FakeDaemon::start();
    let output = run(&fake, &["generate", "--n", "2", "--best-of", "4", "hi"]);
    assert_eq!(stdout(&output), "[0]\nYou said: hi 0\n[1]\nYou said: hi 1\n");
    let request = fake.state().generations[0].clone();
    assert_eq!((request.n, request.best_of), (Some(2), Some(4)));
    let output = run(&fake, &["generate", "--best-of", "4", "hi"]);
    assert_eq!(stdout(&output), "You said: hi\n");
    let value = json(&run(&fake, &["generate", "--json", "--n", "2", "hi"]));
    assert_eq!(value["choices"][1]["text"], "You said: hi 1");
    let in_session = ["generate", "--session", "trip", "--n", "2", "hi"];
    assert_eq!(run(&fake, &in_session).status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_begun_is_the_last_message() {
    let fake = FakeDaemon::start();
    assert_eq!(run(&fake, &["generate", "--continue", "Dear ", "Write."]).status.code(), Some(0));
    let request = fake.state().generations[0].clone();
    let Some(Input::Chat(chat)) = request.input else { panic!("no chat: {request:?}") };
    let said: Vec<(Role, String)> =
        chat.messages.iter().map(|message| (message.role(), Message::text(message))).collect();
    assert_eq!(said, [(Role::User, "Write.".to_owned()), (Role::Assistant, "Dear ".to_owned())]);
    assert!(chat.continue_final_message && !chat.allow_control_tokens);
    assert_eq!(run(&fake, &["generate", "--allow-control-tokens", "hi"]).status.code(), Some(0));
    let request = fake.state().generations[1].clone();
    assert!(matches!(request.input, Some(Input::Chat(chat)) if chat.allow_control_tokens));
    assert_eq!(run(&fake, &["generate", "--raw", "--continue", "a", "b"]).status.code(), Some(2));
}
