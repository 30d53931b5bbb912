//! Connections that misbehave, and what the others notice of it: nothing.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use mlxd::config::Config;
use mlxd_client::v1::ErrorReason;
use mlxd_client::{BearerToken, Client, ConnectOptions};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UnixStream};

use crate::daemon::harness::{Daemon, MODEL, prompt};
use crate::daemon::raw::{
    CANCEL, DATA, GENERATE, GOAWAY, HEADERS, HEALTH, RST_STREAM, Raw, SERVING, call, frame, headers,
    same_authority,
};

/// A daemon that serves TCP too, with the token "secret".
pub async fn on_tcp(change: impl FnOnce(&mut Config)) -> (Daemon, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "secret").unwrap();
    std::fs::set_permissions(&token, PermissionsExt::from_mode(0o600)).unwrap();
    let daemon = Daemon::with(|config| {
        config.listen = Some("127.0.0.1:0".parse().unwrap());
        config.token_file = Some(token);
        change(config);
    });
    (daemon.await, folder)
}

pub async fn client(daemon: &Daemon, token: &str) -> Client {
    let address = Some(format!("http://{}", daemon.bound.tcp.unwrap()).parse().unwrap());
    let token = Some(BearerToken::new(token));
    Client::connect_with(ConnectOptions { address, token, ..ConnectOptions::default() }).await.unwrap()
}

async fn raw(daemon: &Daemon) -> Raw<UnixStream> {
    Raw::begin(UnixStream::connect(&daemon.bound.socket).await.unwrap()).await
}

#[tokio::test]
async fn silent_connections_do_not_shut_the_port() {
    let (daemon, _token) = on_tcp(|config| {
        config.limits.connections_max = 4;
        config.limits.connections_unproven_max = 8;
    })
    .await;
    let address = daemon.bound.tcp.unwrap();
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let mut strangers = Vec::new();
    for _ in 0..6 {
        let stranger = client(&daemon, "wrong").await;
        let refused = stranger.generate(prompt("a")).await.unwrap_err();
        assert_eq!(refused.reason(), ErrorReason::Unauthenticated);
        strangers.push(stranger);
    }
    for _ in 0..3 {
        client(&daemon, "secret").await.generate(prompt("a")).await.unwrap();
    }
    drop((silent, strangers));
}

#[tokio::test]
async fn clients_that_all_come_at_once_are_all_served() {
    let daemon = Daemon::with(|config| config.models = vec![MODEL.into()]).await;
    let address = format!("unix://{}", daemon.bound.socket.display());
    // None calls before all have connected, as after a restart.
    let all = Arc::new(tokio::sync::Barrier::new(100));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let (address, all) = (address.clone(), Arc::clone(&all));
        clients.spawn(async move {
            let client = Client::connect(&address).await.unwrap();
            all.wait().await;
            client.generate(prompt("a")).await
        });
    }
    let answers = clients.join_all().await;
    assert!(answers.iter().all(Result::is_ok), "{:?}", answers.into_iter().find_map(Result::err));
}

#[tokio::test]
async fn a_connection_without_a_call_is_closed_and_its_client_connects_again() {
    let (daemon, _token) = on_tcp(|config| config.limits.first_call = Duration::from_millis(50)).await;
    let mut tcp = TcpStream::connect(daemon.bound.tcp.unwrap()).await.unwrap();
    let mut unix = UnixStream::connect(&daemon.bound.socket).await.unwrap();
    let mut rest = Vec::new();
    tcp.read_to_end(&mut rest).await.unwrap();
    unix.read_to_end(&mut rest).await.unwrap();
    daemon.client.generate(prompt("a")).await.unwrap();
    let mut served = raw(&daemon).await;
    served.is_served(1).await;
    // One that has made a call stays, however silent it is then.
    let mut later = UnixStream::connect(&daemon.bound.socket).await.unwrap();
    later.read_to_end(&mut rest).await.unwrap();
    served.is_served(3).await;
}

#[tokio::test]
async fn a_connection_too_many_is_told_the_limit() {
    let daemon = Daemon::with(|config| config.limits.connections_max = 1).await;
    let address = format!("unix://{}", daemon.bound.socket.display());
    let (first, second) =
        (Client::connect(&address).await.unwrap(), Client::connect(&address).await.unwrap());
    first.generate(prompt("a")).await.unwrap();
    let error = second.generate(prompt("a")).await.unwrap_err();
    let call = error.call().unwrap();
    assert_eq!((call.reason, call.metadata["limit"].as_str()), (ErrorReason::QueueFull, "connections_max"));
    assert!(call.retry_after.is_some());
    first.generate(prompt("a")).await.unwrap();
    drop(first);
    let freed = async {
        while second.generate(prompt("a")).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), freed).await.unwrap();
}

#[tokio::test]
async fn invented_names_do_not_hide_the_connection() {
    let daemon = Daemon::start().await;
    let address = format!("unix://{}", daemon.bound.socket.display());
    for names in [["a", "b"], ["a", "c"]] {
        let client = Client::connect(&address).await.unwrap();
        for name in names {
            let mut request = tonic::Request::new(prompt("x"));
            request.metadata_mut().insert("x-mlxd-client", name.parse().unwrap());
            client.generate(request).await.unwrap();
        }
    }
    let (names, on) = (daemon.engine.clients(), daemon.engine.connections());
    assert_eq!((names[0] == names[2], names[0] == names[1]), (true, false), "a name is the principal's");
    assert_eq!((on[0] == on[1], on[2] == on[3], on[0] == on[2]), (true, true, false));
}

#[tokio::test]
async fn a_path_as_authority_is_served_on_the_socket() {
    let daemon = Daemon::start().await;
    for authority in ["%2Frun%2Fmlxd.sock", "/run/mlxd.sock"] {
        let mut raw = raw(&daemon).await;
        raw.write(&call(1, authority, HEALTH, &[])).await;
        assert_eq!(raw.until(DATA, 1).await.payload, SERVING);
        raw.write(&same_authority(3)).await;
        assert_eq!(raw.until(DATA, 3).await.payload, SERVING);
    }
}

#[tokio::test]
async fn a_path_in_a_huffman_code_as_authority_is_served_on_the_socket() {
    let daemon = Daemon::start().await;
    // `/run/mlxd_1.sock`.
    let code = [0x62, 0xcb, 0x6a, 0x62, 0x9a, 0x3c, 0xc9, 0x10, 0x57, 0x41, 0xc9, 0xd7];
    let mut bytes = call(1, "/run/mlxd.so", HEALTH, &[]);
    let place = bytes.windows(12).position(|part| part == b"/run/mlxd.so").unwrap();
    bytes[place - 1] |= 0x80;
    bytes[place..place + 12].copy_from_slice(&code);
    let mut raw = raw(&daemon).await;
    // The code arrives in two parts.
    raw.write(&bytes[..place + 5]).await;
    raw.write(&bytes[place + 5..]).await;
    assert_eq!(raw.until(DATA, 1).await.payload, SERVING);
}

/// 250 calls, each cancelled at once: more than the HTTP/2 library lets wait.
fn cancelled_calls() -> Vec<u8> {
    let cancelled =
        |stream| [call(stream, "localhost", GENERATE, &[]), frame(RST_STREAM, 0, stream, &CANCEL)].concat();
    (0..250).flat_map(|number| cancelled(2 * number + 1)).collect()
}

#[tokio::test]
async fn calls_cancelled_in_one_write_end_alone() {
    let daemon = Daemon::start().await;
    let mut raw = raw(&daemon).await;
    raw.write(&cancelled_calls()).await;
    raw.is_served(501).await;
}

#[tokio::test]
async fn a_stranger_who_cancels_as_many_loses_its_connection_alone() {
    let (daemon, _token) = on_tcp(|_| {}).await;
    let connect = async || Raw::begin(TcpStream::connect(daemon.bound.tcp.unwrap()).await.unwrap()).await;
    let (mut stranger, honest) = (connect().await, client(&daemon, "secret").await);
    honest.generate(prompt("a")).await.unwrap();
    stranger.write(&[cancelled_calls(), call(501, "localhost", HEALTH, &[])].concat()).await;
    let goaway = loop {
        let frame = stranger.read().await;
        assert_ne!(frame.stream, 501, "the call after them is answered");
        if frame.kind == GOAWAY {
            break String::from_utf8_lossy(&frame.payload).into_owned();
        }
    };
    assert!(goaway.contains("too_many_resets"), "{goaway}");
    honest.generate(prompt("a")).await.unwrap();
    client(&daemon, "secret").await.generate(prompt("a")).await.unwrap();
}

#[tokio::test]
async fn messages_refused_by_the_hundred_end_alone() {
    let daemon = Daemon::with(|config| config.limits.message_bytes_max = 1024).await;
    let mut raw = raw(&daemon).await;
    let streams = (0..1100).map(|number| 2 * number + 1);
    for stream in streams.clone() {
        // The head of a message of 4,096 bytes.
        let begun = frame(DATA, 0, stream, &[0, 0, 0, 16, 0]);
        raw.write(&[headers(stream, "localhost", GENERATE), begun].concat()).await;
        raw.until(HEADERS, stream).await;
    }
    // What was under way when the answers came.
    let late: Vec<u8> = streams.flat_map(|stream| frame(DATA, 0, stream, &[0; 8])).collect();
    raw.write(&late).await;
    raw.is_served(2201).await;
}
