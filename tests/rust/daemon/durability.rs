//! Sessions over the ends of daemons: what was acknowledged is there again, for its owner, until it expires.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mlxd::clock::SystemClock;
use mlxd::config::Config;
use mlxd::daemon;
use mlxd_client::v1::{
    CreateSessionRequest, DeleteSessionRequest, ErrorReason, ForkSessionRequest, GetSessionRequest,
    GetSessionResponse, GetStatsRequest, ScoreRequest, Session, SessionStoreStats, TruncateSessionRequest,
    score_request, truncate_session_request::To,
};
use tonic::Code;

use crate::daemon::fake::Fake;
use crate::daemon::harness::{Daemon, MODEL, config, create, turn, unstopped};

async fn get(daemon: &Daemon, name: &str) -> Result<GetSessionResponse, mlxd_client::Error> {
    let request = GetSessionRequest {
        name: name.into(),
        include_messages: true,
        include_token_ids: true,
        ..Default::default()
    };
    daemon.client.get_session(request).await
}

async fn say(daemon: &Daemon, name: &str, texts: &[&str]) {
    for text in texts {
        daemon.client.generate(turn(name, text)).await.unwrap();
    }
}

async fn names(daemon: &Daemon) -> Vec<String> {
    daemon.client.list_all_sessions().await.unwrap().into_iter().map(|session| session.name).collect()
}

async fn stats(daemon: &Daemon) -> SessionStoreStats {
    daemon.client.get_stats(GetStatsRequest {}).await.unwrap().session_store.unwrap()
}

fn reason<T>(outcome: Result<T, mlxd_client::Error>) -> ErrorReason {
    outcome.err().expect("refused").reason()
}

/// Returns a session without what is in memory only: cached KV, and what it shares with others.
fn lasting(session: Session) -> Session {
    Session { content_bytes: 0, kv_bytes: 0, state: 0, cached_token_count: 0, ..session }
}

#[tokio::test]
async fn sessions_go_on_after_a_restart_as_if_there_had_been_none() {
    let daemon = Daemon::start().await;
    create(&daemon.client, "s", MODEL).await;
    say(&daemon, "s", &["one", "two"]).await;
    let fork = ForkSessionRequest { name: "s".into(), new_name: "f".into(), ..Default::default() };
    daemon.client.fork_session(fork).await.unwrap();
    let cut = TruncateSessionRequest { name: "f".into(), to: Some(To::TurnCount(1)), ..Default::default() };
    daemon.client.truncate_session(cut).await.unwrap();
    create(&daemon.client, "gone", MODEL).await;
    daemon.client.delete_session(DeleteSessionRequest { name: "gone".into() }).await.unwrap();
    let before = [get(&daemon, "s").await.unwrap(), get(&daemon, "f").await.unwrap()];
    assert_eq!(
        stats(&daemon).await,
        SessionStoreStats { enabled: true, durable: true, unwritten_sessions: 0 }
    );

    let daemon = daemon.restart().await;
    assert_eq!(names(&daemon).await, ["f", "s"]);
    // A list reads no content; everything else does.
    let listed = daemon.client.list_all_sessions().await.unwrap();
    let views: Vec<_> = before.iter().rev().map(|answer| lasting(answer.session.clone().unwrap())).collect();
    assert_eq!(listed.into_iter().map(lasting).collect::<Vec<_>>(), views);
    for (name, before) in ["s", "f"].into_iter().zip(&before) {
        let GetSessionResponse { session, messages, token_ids, .. } = get(&daemon, name).await.unwrap();
        assert_eq!((&messages, &token_ids), (&before.messages, &before.token_ids));
        assert_eq!(session.map(lasting), before.session.clone().map(lasting));
    }
    say(&daemon, "s", &["three"]).await;
    let held = &before[0].token_ids;
    assert!(daemon.engine.last_context().starts_with(held), "the new turn goes on from the old tokens");

    let daemon = daemon.restart().await;
    let texts: Vec<_> =
        get(&daemon, "s").await.unwrap().messages.iter().map(mlxd_client::v1::Message::text).collect();
    assert_eq!(texts, ["one", "yes", "two", "yes", "three", "yes"]);
}

#[tokio::test]
async fn every_first_use_reads_what_was_stored() {
    let daemon = Daemon::start().await;
    for name in ["turn", "fork", "cut", "score"] {
        create(&daemon.client, name, MODEL).await;
        say(&daemon, name, &["one"]).await;
    }
    let held = get(&daemon, "turn").await.unwrap().token_ids;
    let daemon = daemon.restart().await;
    say(&daemon, "turn", &["two"]).await;
    assert!(daemon.engine.last_context().starts_with(&held));
    let fork = ForkSessionRequest { name: "fork".into(), new_name: "copy".into(), ..Default::default() };
    daemon.client.fork_session(fork).await.unwrap();
    assert_eq!(get(&daemon, "copy").await.unwrap().token_ids, held);
    let cut = TruncateSessionRequest { name: "cut".into(), to: Some(To::TurnCount(0)), ..Default::default() };
    assert_eq!(daemon.client.truncate_session(cut).await.unwrap().token_count, 0);
    let input = Some(score_request::Input::Text("ab".into()));
    daemon.client.score(ScoreRequest { session: "score".into(), input, ..Default::default() }).await.unwrap();
    assert!(daemon.engine.last_context().starts_with(&held));
}

#[tokio::test]
async fn a_turn_that_was_rolled_back_is_not_stored() {
    let daemon = Daemon::start().await;
    create(&daemon.client, "s", MODEL).await;
    say(&daemon, "s", &["one"]).await;
    let before = get(&daemon, "s").await.unwrap();
    let mut stream = daemon.client.stream_generate(turn("s", "hang")).await.unwrap();
    stream.next_event().await.unwrap();
    drop(stream);
    daemon.engine.wait_running(0).await;
    let daemon = daemon.restart().await;
    let after = get(&daemon, "s").await.unwrap();
    assert_eq!((after.token_ids, after.messages), (before.token_ids, before.messages));
}

#[tokio::test]
async fn a_session_expires_while_no_daemon_runs() {
    let daemon = Daemon::start().await;
    create(&daemon.client, "long", MODEL).await;
    let ttl = Some(prost_types::Duration { seconds: 0, nanos: 1 });
    let brief = CreateSessionRequest { name: "brief".into(), model: MODEL.into(), ttl, ..Default::default() };
    daemon.client.create_session(brief).await.unwrap();
    let daemon = daemon.restart().await;
    assert_eq!(names(&daemon).await, ["long"]);
    assert_eq!(reason(get(&daemon, "brief").await), ErrorReason::SessionNotFound);
    create(&daemon.client, "brief", MODEL).await;
    let daemon = daemon.restart().await;
    assert_eq!(names(&daemon).await, ["brief", "long"]);
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let files = std::fs::read_dir(folder.join("state/sessions")).unwrap().map(|file| file.unwrap().path());
    let mut files: Vec<_> = files.filter(|file| file.file_name().unwrap() != "clean").collect();
    files.sort();
    files
}

#[tokio::test]
async fn a_damaged_session_answers_data_loss_and_its_neighbour_answers() {
    let daemon = Daemon::start().await;
    for name in ["damaged", "sound"] {
        create(&daemon.client, name, MODEL).await;
        say(&daemon, name, &["one"]).await;
    }
    let folder = daemon.leave().await;
    let file = &files(folder.path())[0];
    let mut bytes = std::fs::read(file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(file, bytes).unwrap();
    let daemon = Daemon::start_in(folder, |_| {}).await;
    assert_eq!(names(&daemon).await, ["damaged", "sound"]);
    say(&daemon, "sound", &["two"]).await;
    for _ in 0..2 {
        let error = daemon.client.generate(turn("damaged", "two")).await.unwrap_err();
        let call = error.call().unwrap();
        assert_eq!((call.code, call.reason), (Code::DataLoss, ErrorReason::SessionDamaged));
        assert_eq!(call.metadata["session"], "damaged");
        assert_eq!(reason(get(&daemon, "damaged").await), ErrorReason::SessionDamaged);
    }
    // Once more with what is known of it now.
    let daemon = daemon.restart().await;
    assert_eq!(reason(get(&daemon, "damaged").await), ErrorReason::SessionDamaged);
    daemon.client.delete_session(DeleteSessionRequest { name: "damaged".into() }).await.unwrap();
    create(&daemon.client, "damaged", MODEL).await;
    let daemon = daemon.restart().await;
    assert_eq!(get(&daemon, "damaged").await.unwrap().token_ids, Vec::<u32>::new());
    assert_eq!(get(&daemon, "sound").await.unwrap().messages.len(), 4);
}

#[tokio::test]
async fn a_file_that_cannot_be_read_now_is_read_once_it_can_be() {
    let daemon = Daemon::start().await;
    create(&daemon.client, "s", MODEL).await;
    say(&daemon, "s", &["one"]).await;
    let daemon = daemon.restart().await;
    let file = &files(daemon.folder.path())[0];
    let aside = daemon.folder.path().join("aside");
    std::fs::rename(file, &aside).unwrap();
    // A link is not followed.
    std::os::unix::fs::symlink(&aside, file).unwrap();
    for _ in 0..2 {
        let error = get(&daemon, "s").await.unwrap_err();
        let call = error.call().unwrap();
        assert_eq!((call.code, call.reason), (Code::Unavailable, ErrorReason::SessionUnreadable));
        assert_eq!(call.metadata["session"], "s");
        assert!(call.retry_after.is_some());
    }
    std::fs::rename(&aside, file).unwrap();
    assert_eq!(get(&daemon, "s").await.unwrap().messages.len(), 2);
}

#[tokio::test]
async fn a_second_daemon_on_the_folder_does_not_start_and_names_the_key() {
    let daemon = Daemon::start().await;
    let other = tempfile::tempdir().unwrap();
    let mut config = config(&other);
    config.state_dir = Some(daemon.folder.path().join("state"));
    let refused = async |config: Config| {
        let (_, handle) = Fake::start(config.engine);
        let clock = Arc::new(SystemClock::new());
        let served = daemon::serve(handle, &config, clock, unstopped(), |_| panic!("it serves"));
        tokio::time::timeout(Duration::from_secs(20), served).await.unwrap().unwrap_err().to_string()
    };
    let error = refused(config.clone()).await;
    assert!(error.starts_with("`state_dir`: a daemon (pid "), "{error}");
    config.state_dir = Some(other.path().join("newer"));
    std::fs::create_dir(other.path().join("newer")).unwrap();
    std::fs::write(other.path().join("newer/version"), "3\n").unwrap();
    let error = refused(config.clone()).await;
    assert!(error.contains("`state_dir`: ") && error.contains("has format \"3\""), "{error}");
    create(&daemon.client, "s", MODEL).await;
}

#[tokio::test]
async fn without_a_folder_sessions_end_with_the_daemon() {
    let daemon = Daemon::with(|config| config.state_dir = None).await;
    create(&daemon.client, "s", MODEL).await;
    say(&daemon, "s", &["one"]).await;
    assert_eq!(stats(&daemon).await, SessionStoreStats::default());
    let folder = daemon.leave().await;
    assert!(!folder.path().join("state").exists());
    let daemon = Daemon::start_in(folder, |_| {}).await;
    assert_eq!(names(&daemon).await, Vec::<String>::new());
}
