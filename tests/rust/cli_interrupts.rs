//! Ctrl-C in the commands of the program that read stdin, against a fake daemon on a real socket.

#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests")]

use std::io::{PipeReader, Read as _, Write as _, pipe};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::cli::fake::FakeDaemon;
use crate::cli::mlxd;

/// Longest wait of a test.
const DEADLINE: Duration = Duration::from_secs(30);

fn interrupt(child: &Child) {
    kill_process(Pid::from_child(child), Signal::INT).expect("a signal");
}

/// Waits for the end of a process; one that does not end is killed, and the test fails.
async fn ended(mut child: Child) -> ExitStatus {
    let id = Pid::from_child(&child);
    let waiting = tokio::task::spawn_blocking(move || child.wait());
    let Ok(ended) = tokio::time::timeout(DEADLINE, waiting).await else {
        kill_process(id, Signal::KILL).expect("a signal");
        panic!("mlxd goes on after Ctrl-C");
    };
    ended.expect("a thread").expect("mlxd ends")
}

/// Waits until the reader of a pipe has taken what was written.
async fn until_read(pipe: &PipeReader) {
    let read = async {
        while rustix::io::ioctl_fionread(pipe).expect("a pipe") > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, read).await.expect("stdin is read");
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_a_chat_from_a_pipe_and_its_session() {
    for arguments in [&["run", "tiny"][..], &["chat"]] {
        let fake = FakeDaemon::start();
        let mut command = mlxd(&fake, arguments);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("mlxd starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin.write_all(b"hang\nnever\n").expect("input is written");
        let mut first = [0; 4];
        child.stdout.as_mut().expect("a pipe").read_exact(&mut first).expect("the first delta");
        assert_eq!(&first, b"You ");
        interrupt(&child);
        assert_eq!(ended(child).await.code(), Some(130), "{arguments:?}");
        fake.until("the call is cancelled", |state| state.cancelled == 1).await;
        let state = fake.state();
        assert!(state.sessions.is_empty(), "{arguments:?}");
        assert_eq!(state.generations.len(), 1, "{arguments:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_a_chat_that_waits_for_a_pipe() {
    for arguments in [&["run", "tiny"][..], &["chat"]] {
        let fake = FakeDaemon::start();
        let (reader, mut writer) = pipe().expect("a pipe");
        let ours = reader.try_clone().expect("a pipe");
        let child = mlxd(&fake, arguments).stdin(reader).spawn().expect("mlxd starts");
        writer.write_all(b"half a line").expect("input is written");
        until_read(&ours).await;
        interrupt(&child);
        assert_eq!(ended(child).await.code(), Some(130), "{arguments:?}");
        assert!(fake.state().sessions.is_empty(), "{arguments:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_a_command_that_reads_its_prompt() {
    let fake = FakeDaemon::start();
    for arguments in [&["generate"][..], &["generate", "-"], &["generate", "Summarize:"]] {
        let (reader, mut writer) = pipe().expect("a pipe");
        let ours = reader.try_clone().expect("a pipe");
        let child = mlxd(&fake, arguments).stdin(reader).spawn().expect("mlxd starts");
        writer.write_all(b"half a text").expect("input is written");
        until_read(&ours).await;
        interrupt(&child);
        let status = ended(child).await;
        assert_eq!(status.signal(), Some(Signal::INT.as_raw()), "{arguments:?}");
    }
    assert!(fake.state().generations.is_empty());
}
