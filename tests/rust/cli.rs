//! The `mlxd` program against a fake daemon on a real socket.

#![allow(clippy::expect_used, reason = "helpers of tests")]

#[path = "../../clients/rust/tests/fake/mod.rs"]
pub(crate) mod fake;

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use fake::FakeDaemon;
use serde_json::Value;

pub(crate) fn mlxd(fake: &FakeDaemon, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mlxd"));
    command.args(arguments).env("MLXD_ADDRESS", fake.socket()).stdin(Stdio::null());
    command
}

pub(crate) fn run(fake: &FakeDaemon, arguments: &[&str]) -> Output {
    mlxd(fake, arguments).output().expect("mlxd runs")
}

fn run_with_input(fake: &FakeDaemon, arguments: &[&str], input: &str) -> Output {
    let mut command = mlxd(fake, arguments);
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child: Child = pipes.spawn().expect("mlxd starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(input.as_bytes()).expect("input is written");
    drop(stdin);
    child.wait_with_output().expect("mlxd ends")
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

/// Returns stderr, with request ids replaced.
pub(crate) fn stderr(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).expect("UTF-8");
    match (text.find("[request "), text.find(']')) {
        (Some(start), Some(end)) if start < end => format!("{}[request ID{}", &text[..start], &text[end..]),
        _ => text,
    }
}

pub(crate) fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("one JSON value")
}

#[tokio::test(flavor = "multi_thread")]
async fn generate_asks_the_only_resident_model_and_streams() {
    let fake = FakeDaemon::start();
    let output =
        run(&fake, &["generate", "--system", "Be short.", "--temperature", "0.5", "--stats", "Hi you"]);
    assert_eq!(stdout(&output), "You said: Hi you\n");
    assert_eq!(
        stderr(&output),
        "prompt 2 tokens (0 cached), first token after 20 ms, 4 tokens at 30.0 tokens/s, 0.12 s in total\n"
    );
    assert_eq!(output.status.code(), Some(0));
    let state = fake.state();
    let request = &state.generations[0];
    assert_eq!(request.model, "tiny");
    let sampling = request.sampling.as_ref().unwrap();
    assert_eq!((sampling.temperature, sampling.top_p, sampling.seed), (Some(0.5), None, None));
    let Some(mlxd_client::v1::generate_request::Input::Chat(chat)) = &request.input else {
        panic!("no chat: {request:?}");
    };
    assert_eq!(
        chat.messages.iter().map(mlxd_client::v1::Message::text).collect::<Vec<_>>(),
        ["Be short.", "Hi you"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn generate_json_is_one_object_with_the_contracts_names() {
    let fake = FakeDaemon::start();
    let output = run(&fake, &["generate", "-m", "tiny", "--json", "a b c"]);
    let value = json(&output);
    assert_eq!(value["text"], "You said: a b c");
    assert_eq!(value["finish_reason"], "stop");
    assert_eq!(value["usage"]["prompt_tokens"], 3);
    assert_eq!(value["timings"]["time_to_first_token"], 0.02);
}

#[tokio::test(flavor = "multi_thread")]
async fn generate_reads_raw_text_and_stop_strings_from_a_pipe() {
    let fake = FakeDaemon::start();
    let arguments = ["generate", "--raw", "--stop", "a", "--stop", "b", "--max-tokens", "5", "-"];
    let output = run_with_input(&fake, &arguments, "Once\nupon\n");
    assert_eq!(stdout(&output), "You said: Once\nupon\n");
    let state = fake.state();
    let stopping = state.generations[0].stopping.as_ref().unwrap();
    assert_eq!((stopping.max_tokens, stopping.stop_strings.len()), (Some(5), 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn generate_makes_its_session_once_and_continues_it() {
    let fake = FakeDaemon::start();
    for turn in 1..=2 {
        let output = run(&fake, &["generate", "--session", "trip", "--json", "go on"]);
        assert_eq!(json(&output)["session_token_count"], 6 * turn, "{}", stderr(&output));
    }
    let state = fake.state();
    assert_eq!(state.sessions["trip"].model, "tiny");
    let created = state.calls.iter().filter(|(method, _)| *method == "CreateSession").count();
    assert_eq!(created, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_cancels_the_call_and_exits_130() {
    let fake = FakeDaemon::start();
    let mut command = mlxd(&fake, &["generate", "hang"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("mlxd starts");
    let mut first = [0; 4];
    child.stdout.as_mut().expect("a pipe").read_exact(&mut first).expect("the first delta");
    assert_eq!(&first, b"You ");
    let id = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(id, rustix::process::Signal::INT).expect("a signal");
    assert_eq!(child.wait().expect("mlxd ends").code(), Some(130));
    fake.until("the call is cancelled", |state| state.cancelled == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_one_line_with_reason_and_request() {
    let fake = FakeDaemon::start();
    let output = run(&fake, &["generate", "overflow"]);
    assert_eq!(
        stderr(&output),
        "error: the input has 3000 tokens; the model's context of 2048 leaves no room for an answer \
         (CONTEXT_OVERFLOW) [request ID]\n"
    );
    assert_eq!(output.status.code(), Some(1));
    // In the middle of an answer: the line it broke off in is ended first.
    let output = run(&fake, &["generate", "die"]);
    assert_eq!(stdout(&output), "You \n");
    assert!(stderr(&output).contains("(NON_FINITE_LOGITS)"), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_hint_at_a_remedy() {
    let fake = FakeDaemon::start();
    let hint = |arguments: &[&str]| {
        let output = run(&fake, arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        stderr(&output).lines().nth(1).map(str::to_owned).unwrap_or_default()
    };
    assert_eq!(hint(&["generate", "-m", "x", "hi"]), "hint: `mlxd ps --all` lists the available models");
    assert!(hint(&["load", "owner/huge"]).contains("mlxd unload"));
    assert!(hint(&["unload", "owner/large"]).contains("mlxd load"));
    let nowhere = hint(&["ps", "--address", "unix:///nonexistent/s"]);
    assert!(nowhere.contains("mlxd serve"), "{nowhere}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_daemon_is_named_with_the_systems_reason() {
    let fake = FakeDaemon::start();
    let output = run(&fake, &["ps", "--address", "/nonexistent/s"]);
    let line = stderr(&output);
    assert!(
        line.starts_with("error: no daemon answers at unix:///nonexistent/s: No such file or directory"),
        "{line}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_usage_exits_with_2() {
    let fake = FakeDaemon::start();
    for arguments in [
        vec!["generate", "--temperature", "warm", "hi"],
        vec!["generate", "--raw", "--system", "x", "hi"],
        vec!["serve", "--listen", "127.0.0.1:1"],
        vec!["fly"],
        vec![],
    ] {
        assert_eq!(run(&fake, &arguments).status.code(), Some(2), "{arguments:?}");
    }
    run(&fake, &["load", "owner/large"]);
    let output = run(&fake, &["generate", "hi"]);
    assert_eq!(stderr(&output), "error: name one of the resident models with -m: owner/large, tiny\n");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(run(&fake, &["--help"]).status.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn load_shows_its_progress_and_its_result() {
    let fake = FakeDaemon::start();
    let output = run(&fake, &["load", "owner/large"]);
    assert_eq!(
        stdout(&output),
        "loaded owner/large: llama, 135M parameters, stored as bfloat16, computes in float32, 513 MiB\n"
    );
    assert_eq!(stderr(&output), "downloading 257 MiB\nloading 257 MiB\nwarming 257 MiB\n");
    assert_eq!(json(&run(&fake, &["load", "tiny", "--json"]))["state"], "resident");
    assert_eq!(json(&run(&fake, &["unload", "tiny", "--json"]))["freed_bytes"], 588_452_752_u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_answers_with_its_exit_code() {
    let fake = FakeDaemon::start();
    let fits = run(&fake, &["load", "owner/large", "--dry-run"]);
    assert_eq!(stdout(&fits), "owner/large fits: it needs 513 MiB, 7.45 GiB are available\n");
    assert_eq!(fits.status.code(), Some(0));
    let too_large = run(&fake, &["load", "owner/huge", "--dry-run", "--json"]);
    assert_eq!(json(&too_large)["fits"], false);
    assert_eq!(too_large.status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn ps_shows_models_sessions_and_memory() {
    let fake = FakeDaemon::start();
    run(&fake, &["generate", "--session", "trip", "hi"]);
    insta::assert_snapshot!("ps_all", stdout(&run(&fake, &["ps", "--all"])));
    let value = json(&run(&fake, &["ps", "--json"]));
    assert_eq!(value["models"].as_array().unwrap().len(), 1);
    assert_eq!(value["sessions"][0]["name"], "trip");
    assert_eq!(value["stats"]["memory"]["kv_idle_bytes"], 12 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_takes_turns_from_a_pipe_and_leaves_no_session_behind() {
    let fake = FakeDaemon::start();
    let output =
        run_with_input(&fake, &["chat", "--system", "Be short."], "one\n\ntwo\n/undo\n/stats\nthree\n");
    assert_eq!(stdout(&output), "You said: one\nYou said: two\nYou said: three\n", "{}", stderr(&output));
    assert!(stderr(&output).contains("turns: 1, tokens: 4"), "{}", stderr(&output));
    let state = fake.state();
    assert!(state.sessions.is_empty());
    let system = state.generations.iter().map(|request| match &request.input {
        Some(mlxd_client::v1::generate_request::Input::Chat(chat)) => chat.messages.len(),
        _ => 0,
    });
    assert_eq!(system.collect::<Vec<_>>(), [2, 1, 1], "instructions go with the first turn only");
    drop(state);

    let output = run_with_input(&fake, &["chat", "--session", "kept"], "one\n/fork copy\n/reset\n");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let state = fake.state();
    assert_eq!(state.sessions["kept"].turns.len(), 0);
    assert_eq!(state.sessions["copy"].turns.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_in_a_pipe_stops_at_the_first_failure() {
    let fake = FakeDaemon::start();
    let output = run_with_input(&fake, &["chat"], "overflow\nnever\n");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(fake.state().generations.len(), 1);
    assert!(fake.state().sessions.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn output_that_cannot_be_written_is_an_error_and_a_note_is_not() {
    let fake = FakeDaemon::start();
    let output =
        mlxd(&fake, &["generate", "--stats", "Hi"]).stderr(closed_pipe()).output().expect("mlxd runs");
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0), "You said: Hi\n"));
    for arguments in [&["generate", "Hi"][..], &["generate", "--json", "Hi"], &["ps"], &["ps", "--json"]] {
        let output = mlxd(&fake, arguments).stdout(closed_pipe()).output().expect("mlxd runs");
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(1), ""), "{arguments:?}");
        let both =
            mlxd(&fake, arguments).stdout(closed_pipe()).stderr(closed_pipe()).status().expect("mlxd runs");
        assert_eq!(both.code(), Some(1), "{arguments:?}");
    }
    let usage =
        mlxd(&fake, &["generate", "--no-such-flag"]).stderr(closed_pipe()).status().expect("mlxd runs");
    assert_eq!(usage.code(), Some(2));
    let help = mlxd(&fake, &["--help"]).stdout(closed_pipe()).status().expect("mlxd runs");
    assert_eq!(help.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_text_of_a_pipe_or_a_file_follows_the_prompt() {
    let fake = FakeDaemon::start();
    let output = run_with_input(&fake, &["generate", "Summarize this:"], "one\ntwo\n");
    assert_eq!(stdout(&output), "You said: Summarize this:\n\none\ntwo\n", "{}", stderr(&output));

    let notes = fake.folder().join("notes.txt");
    std::fs::write(&notes, "three\n").unwrap();
    let mut command = mlxd(&fake, &["generate", "Summarize this:"]);
    let output = command.stdin(File::open(&notes).unwrap()).output().expect("mlxd runs");
    assert_eq!(stdout(&output), "You said: Summarize this:\n\nthree\n");

    let (ours, theirs) = UnixStream::pair().unwrap();
    (&ours).write_all(b"four\n").unwrap();
    drop(ours);
    let mut command = mlxd(&fake, &["generate", "Summarize this:"]);
    let output = command.stdin(OwnedFd::from(theirs)).output().expect("mlxd runs");
    assert_eq!(stdout(&output), "You said: Summarize this:\n\nfour\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_pipe_adds_nothing_to_a_prompt_and_a_note_says_so() {
    let fake = FakeDaemon::start();
    for input in ["", "\n", " \r\n\n"] {
        let output = run_with_input(&fake, &["generate", "Hi"], input);
        let found = (stdout(&output), output.status.code());
        assert_eq!(found, ("You said: Hi\n".into(), Some(0)), "{input:?}");
        assert_eq!(stderr(&output), "stdin is empty: only the prompt is sent\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_stdin_leaves_stdin_unread() {
    let fake = FakeDaemon::start();
    // A pipe that stays open: reading it would never end.
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = mlxd(&fake, &["generate", "--no-stdin", "Hi"]);
    let output = command.stdin(reader).output().expect("mlxd runs");
    drop(writer);
    assert_eq!((stdout(&output).as_str(), stderr(&output).as_str()), ("You said: Hi\n", ""));
    for arguments in [&["generate", "--no-stdin"][..], &["generate", "--no-stdin", "-"]] {
        assert_eq!(run_with_input(&fake, arguments, "Hi").status.code(), Some(2), "{arguments:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_pipe_or_prompt_is_an_error_and_asks_nothing() {
    let fake = FakeDaemon::start();
    for input in ["", "\n", " \r\n\n"] {
        for arguments in [&["generate"][..], &["generate", "-"]] {
            let output = run_with_input(&fake, arguments, input);
            let found = (stderr(&output), output.status.code());
            assert_eq!(found, ("error: stdin is empty\n".into(), Some(2)), "{arguments:?} {input:?}");
        }
    }
    let output = run(&fake, &["generate", ""]);
    assert_eq!((stderr(&output).as_str(), output.status.code()), ("error: the prompt is empty\n", Some(2)));
    assert!(fake.state().generations.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_temperature_is_the_one_given_else_the_models_else_seven_tenths() {
    let fake = FakeDaemon::start();
    let sent = || fake.state().generations.last().unwrap().sampling.as_ref().unwrap().temperature;
    for command in [&["generate", "hi"][..], &["generate", "--session", "a", "hi"]] {
        run(&fake, command);
        assert_eq!(sent(), Some(0.7));
    }
    run_with_input(&fake, &["chat"], "hi\n");
    assert_eq!(sent(), Some(0.7));
    run(&fake, &["generate", "--temperature", "0", "hi"]);
    assert_eq!(sent(), Some(0.0));
    fake.state().temperature = 0.3;
    run(&fake, &["generate", "hi"]);
    assert_eq!(sent(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_of_another_model_is_refused() {
    let fake = FakeDaemon::start();
    run(&fake, &["generate", "--session", "trip", "hi"]);
    for arguments in [
        &["generate", "-m", "owner/large", "--session", "trip", "hi"][..],
        &["chat", "-m", "owner/large", "--session", "trip"],
    ] {
        let output = run(&fake, arguments);
        let line = "error: the session trip is bound to tiny: omit -m, or use another --session\n";
        assert_eq!((stderr(&output).as_str(), output.status.code()), (line, Some(2)));
    }
    assert_eq!(fake.state().generations.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_lost_in_the_middle_of_a_chat_is_named() {
    let fake = FakeDaemon::start();
    let wire = fake.wire();
    let mut command = mlxd(&fake, &["chat"]);
    command.env("MLXD_ADDRESS", wire.socket());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("mlxd starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    let mut answers = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut answer = String::new();
    stdin.write_all(b"one\n").expect("input is written");
    answers.read_line(&mut answer).expect("an answer");
    assert_eq!(answer, "You said: one\n");
    wire.cut().await;
    stdin.write_all(b"two\n").expect("input is written");
    // Whether the program has noticed the loss by now decides which it is.
    assert_ended(child, &["the connection to the daemon is lost: ", "no daemon answers at "]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_lost_in_the_middle_of_an_answer_is_named() {
    let fake = FakeDaemon::start();
    let wire = fake.wire();
    let mut command = mlxd(&fake, &["generate", "hang"]);
    command.env("MLXD_ADDRESS", wire.socket()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("mlxd starts");
    let mut first = [0; 4];
    child.stdout.as_mut().expect("a pipe").read_exact(&mut first).expect("the first delta");
    wire.cut().await;
    assert_ended(child, &["the connection to the daemon is lost: "]);
}

fn assert_ended(child: Child, errors: &[&str]) {
    let output = child.wait_with_output().expect("mlxd ends");
    let lines = stderr(&output);
    let error = lines.strip_prefix("error: ").unwrap_or_default();
    assert!(errors.iter().any(|expected| error.starts_with(expected)), "{lines}");
    assert!(lines.contains("hint: ") && lines.contains("`mlxd serve`"), "{lines}");
    assert!(!lines.contains("h2"), "{lines}");
    assert_eq!(output.status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_to_a_daemon_that_stands_still_ends_at_its_timeout() {
    let fake = FakeDaemon::start();
    let socket = fake.folder().join("silent");
    let _silent = UnixListener::bind(&socket).unwrap();
    let address = socket.to_str().unwrap();
    let output = run(&fake, &["ps", "--timeout", "0.1", "--address", address]);
    assert!(stderr(&output).contains("(DEADLINE)"), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(run(&fake, &["ps", "--timeout", "-1"]).status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_model_is_the_hints_say_how_to_get_one() {
    let fake = FakeDaemon::start();
    fake.state().models.remove("tiny");
    let output = run(&fake, &["generate", "hi"]);
    assert_eq!(stderr(&output), "error: no model is resident; name one with -m: owner/large\n");
    fake.state().models.clear();
    for arguments in [&["generate", "hi"][..], &["chat"], &["bench"]] {
        let output = run(&fake, arguments);
        assert!(stderr(&output).contains("`mlxd serve --model-root DIR`"), "{}", stderr(&output));
        assert!(!stderr(&output).contains("mlxd ps"), "{}", stderr(&output));
        assert_eq!(output.status.code(), Some(2));
    }
    let shown = stdout(&run(&fake, &["ps", "--all"]));
    assert!(shown.starts_with("the daemon finds no model: "), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bench_finds_a_path_that_cannot_be_written_before_the_run() {
    let fake = FakeDaemon::start();
    for option in ["--svg", "--json"] {
        let output = run(&fake, &["bench", option, "/nonexistent/sweep"]);
        assert!(stderr(&output).contains("/nonexistent/sweep: No such file"), "{}", stderr(&output));
        assert_eq!(output.status.code(), Some(1));
    }
    assert!(fake.state().generations.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn output_that_cannot_be_written_is_an_error_and_no_panic() {
    let fake = FakeDaemon::start();
    let commands = [
        &["generate", "hi"][..],
        &["generate", "--json", "--stats", "hi"],
        &["generate", "overflow"],
        &["ps"],
        &["ps", "--json"],
        &["load", "owner/large"],
        &["load", "owner/large", "--dry-run"],
        &["unload", "owner/large"],
        &["bench", "-m", "tiny", "--concurrency", "1", "--requests", "1", "--warmup", "0"],
        &["--help"],
        &["--version"],
        &["fly"],
    ];
    for arguments in commands {
        for (what, output) in [("a closed pipe", closed_pipe as fn() -> Stdio), ("a full disk", full_disk)] {
            let mut command = mlxd(&fake, arguments);
            let status = command.stdout(output()).stderr(output()).status().expect("mlxd runs");
            let code = status.code().expect("an exit, no signal");
            assert!(code <= 2, "{arguments:?} into {what} ended with {code}");
        }
    }
    if Path::new("/dev/full").exists() {
        let output = mlxd(&fake, &["generate", "hi"]).stdout(full_disk()).output().expect("mlxd runs");
        assert!(stderr(&output).starts_with("error: No space left on device"), "{}", stderr(&output));
        assert_eq!(output.status.code(), Some(1));
    }
}

/// An output whose reader has left.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    writer.into()
}

/// An output without room, on systems that have such a device.
fn full_disk() -> Stdio {
    File::options().write(true).open("/dev/full").map_or_else(|_| Stdio::null(), Stdio::from)
}
