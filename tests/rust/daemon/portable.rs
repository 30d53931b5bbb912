//! Sessions as files: what leaves one daemon goes on in another, and what is not such a file leaves nothing.

use std::sync::Arc;
use std::time::Duration;

use mlxd::store::{Export, Import};
use mlxd_client::v1::session_service_client::SessionServiceClient;
use mlxd_client::v1::{
    CreateSessionRequest, DeleteSessionRequest, ErrorReason, ExportSessionRequest, GetSessionRequest,
    GetSessionResponse, GetStatsRequest, History, ImportSessionRequest, ImportStart, Session,
    export_session_response::Event, import_session_request::Part,
};
use mlxd_client::{Client, Error};
use tokio_stream::StreamExt as _;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::daemon::connections::{client, on_tcp};
use crate::daemon::folder;
use crate::daemon::harness::{Daemon, MODEL, WORDS, prompt, turn};

async fn create(client: &Client, name: &str) {
    let labels = [("project".to_owned(), "trip".to_owned())].into();
    let request = CreateSessionRequest {
        name: name.into(),
        model: MODEL.into(),
        labels,
        pinned: true,
        history: History::Append.into(),
        ..Default::default()
    };
    client.create_session(request).await.unwrap();
}

async fn get(client: &Client, name: &str) -> GetSessionResponse {
    let (include_messages, include_token_ids) = (true, true);
    let name = name.into();
    let request = GetSessionRequest { name, include_messages, include_token_ids, ..Default::default() };
    client.get_session(request).await.unwrap()
}

async fn export(client: &Client, name: &str) -> Vec<u8> {
    let request = ExportSessionRequest { name: name.into(), ..Default::default() };
    client.export_session(request).await.unwrap().collect_file().await.unwrap()
}

/// Sends a file in pieces of this size.
async fn import_in(client: &Client, start: ImportStart, file: &[u8], piece: usize) -> Result<Session, Error> {
    let chunks: Vec<Vec<u8>> = file.chunks(piece).map(<[u8]>::to_vec).collect();
    client.import_session_file(start, chunks).await
}

async fn import(client: &Client, name: &str, file: &[u8]) -> Result<Session, Error> {
    import_in(client, ImportStart { name: name.into(), ..Default::default() }, file, 50_000).await
}

async fn names(client: &Client) -> Vec<String> {
    client.list_all_sessions().await.unwrap().into_iter().map(|session| session.name).collect()
}

fn reason<T>(outcome: Result<T, Error>) -> ErrorReason {
    outcome.err().expect("refused").reason()
}

/// Returns what of a session travels.
fn travels(session: Option<Session>) -> Session {
    let session = session.unwrap();
    Session {
        owner: String::new(),
        last_use_time: None,
        kv_bytes: 0,
        state: 0,
        cached_token_count: 0,
        ..session
    }
}

#[tokio::test]
async fn a_session_goes_on_in_another_daemon_as_if_it_had_never_left() {
    let (from, to) = (Daemon::start().await, Daemon::start().await);
    create(&from.client, "trip").await;
    for text in ["one", "two"] {
        from.client.generate(turn("trip", text)).await.unwrap();
    }
    let file = export(&from.client, "trip").await;
    // One that nobody has used since the start, too.
    let from = from.restart().await;
    let (cold, before) = (export(&from.client, "trip").await, get(&from.client, "trip").await);
    for (piece, file) in [(1, &file), (file.len(), &cold)] {
        let session = import_in(&to.client, ImportStart::default(), file, piece).await.unwrap();
        assert_eq!(travels(Some(session)), travels(before.session.clone()));
        let after = get(&to.client, "trip").await;
        assert_eq!((after.messages, &after.token_ids), (before.messages.clone(), &before.token_ids));
        assert_eq!(travels(after.session), travels(before.session.clone()));
        if piece == 1 {
            to.client.delete_session(DeleteSessionRequest { name: "trip".into() }).await.unwrap();
        }
    }
    // It is saved, and goes on.
    let to = to.restart().await;
    assert_eq!(get(&to.client, "trip").await.token_ids, before.token_ids);
    for daemon in [&from, &to] {
        daemon.client.generate(turn("trip", "three")).await.unwrap();
        assert!(daemon.engine.last_context().starts_with(&before.token_ids));
    }
    let (one, other) = (get(&from.client, "trip").await, get(&to.client, "trip").await);
    assert_eq!((one.messages, one.token_ids), (other.messages, other.token_ids));
}

#[tokio::test]
async fn an_export_is_the_session_of_one_moment() {
    let daemon = Daemon::start().await;
    create(&daemon.client, "s").await;
    // An answer of two million bytes.
    daemon.client.generate(turn("s", "flood")).await.unwrap();
    let count = get(&daemon.client, "s").await.session.unwrap().token_count;
    let request = |count| ExportSessionRequest { name: "s".into(), expected_token_count: Some(count) };
    let moved = daemon.client.export_session(request(count + 1)).await.map(drop).unwrap_err();
    assert_eq!(moved.reason(), ErrorReason::SessionMoved);
    assert_eq!(moved.call().unwrap().metadata["actual"], count.to_string());
    let mut stream = daemon.client.export_session(request(count)).await.unwrap();
    let mut file = Vec::new();
    let mut chunks = 0;
    while let Some(event) = stream.next_event().await.unwrap() {
        match event {
            Event::Chunk(bytes) => {
                assert!(bytes.len() <= 65_536);
                file.extend(bytes);
            }
            Event::Finished(finished) => assert_eq!(finished.file_bytes, file.len() as u64),
        }
        if chunks == 0 {
            daemon.client.generate(turn("s", "later")).await.unwrap();
        }
        chunks += 1;
    }
    assert!(chunks > 30, "{chunks}");
    import(&daemon.client, "then", &file).await.unwrap();
    let then = get(&daemon.client, "then").await;
    assert_eq!((then.session.unwrap().token_count, then.messages.len()), (count, 2));
    // A running turn is not part of it.
    let mut running = daemon.client.stream_generate(turn("then", "hang")).await.unwrap();
    running.next_event().await.unwrap();
    import(&daemon.client, "idle", &export(&daemon.client, "then").await).await.unwrap();
    let idle = get(&daemon.client, "idle").await.session.unwrap();
    assert_eq!((idle.token_count, idle.busy), (count, false));
}

#[tokio::test]
async fn what_is_not_such_a_file_leaves_nothing_behind() {
    let daemon = Daemon::start().await;
    create(&daemon.client, "s").await;
    daemon.client.generate(turn("s", "one")).await.unwrap();
    let file = export(&daemon.client, "s").await;
    let bytes = async || daemon.client.get_stats(GetStatsRequest {}).await.unwrap().session_bytes;
    let before = bytes().await;
    for size in (0..file.len()).step_by(9) {
        let cut = import(&daemon.client, "new", &file[..size]).await;
        assert_eq!(reason(cut), ErrorReason::SessionFileInvalid, "{size}");
        let mut flipped = file.clone();
        flipped[size] ^= 1;
        let refused = reason(import(&daemon.client, "new", &flipped).await);
        let is_format = refused == ErrorReason::SessionFileUnsupported && (12..16).contains(&size);
        assert!(refused == ErrorReason::SessionFileInvalid || is_format, "{size}: {refused:?}");
    }
    let longer = [&file[..], b"x"].concat();
    assert_eq!(reason(import(&daemon.client, "new", &longer).await), ErrorReason::SessionFileInvalid);
    let mut newer = file.clone();
    newer[12] = 9;
    let error = import(&daemon.client, "new", &newer).await.unwrap_err();
    let call = error.call().unwrap();
    assert_eq!((call.code, call.reason), (Code::FailedPrecondition, ErrorReason::SessionFileUnsupported));
    assert_eq!((&*call.metadata["format"], &*call.metadata["format_max"]), ("9", "2"));
    let absent = ImportStart { name: "new".into(), model: "absent".into(), ..Default::default() };
    let absent = import_in(&daemon.client, absent, &file, 100).await;
    assert_eq!(reason(absent), ErrorReason::ModelNotFound);
    assert_eq!(reason(import(&daemon.client, "a name", &file).await), ErrorReason::InvalidField);
    assert_eq!(reason(import(&daemon.client, "", &file).await), ErrorReason::SessionExists);
    assert_eq!((names(&daemon.client).await, bytes().await), (vec!["s".to_owned()], before));
}

#[tokio::test]
async fn an_import_replaces_a_session_where_that_is_asked_for_and_it_is_as_expected() {
    let daemon = Daemon::start().await;
    for name in ["old", "new"] {
        create(&daemon.client, name).await;
        daemon.client.generate(turn(name, name)).await.unwrap();
    }
    daemon.client.generate(turn("new", "more")).await.unwrap();
    let (file, before) = (export(&daemon.client, "new").await, get(&daemon.client, "old").await);
    let count = before.session.as_ref().unwrap().token_count;
    let send = async |replace, expected_token_count, file: &[u8]| {
        let name = "old".to_owned();
        let start = ImportStart { name, replace, expected_token_count, ..Default::default() };
        import_in(&daemon.client, start, file, 999).await
    };
    assert_eq!(reason(send(false, None, &file).await), ErrorReason::SessionExists);
    assert_eq!(reason(send(false, Some(count), &file).await), ErrorReason::InvalidField);
    assert_eq!(reason(send(true, Some(count + 1), &file).await), ErrorReason::SessionMoved);
    let cut = &file[..file.len() - 1];
    assert_eq!(reason(send(true, Some(count), cut).await), ErrorReason::SessionFileInvalid);
    let after = get(&daemon.client, "old").await;
    assert_eq!((after.messages, after.token_ids), (before.messages, before.token_ids));
    send(true, Some(count), &file).await.unwrap();
    let daemon = daemon.restart().await;
    let (old, new) = (get(&daemon.client, "old").await, get(&daemon.client, "new").await);
    assert_eq!((old.messages, old.token_ids), (new.messages, new.token_ids));
    // Under the name that the file has, and where there is none.
    let start = || ImportStart { replace: true, ..Default::default() };
    assert_eq!(import_in(&daemon.client, start(), &file, 999).await.unwrap().name, "new");
    daemon.client.delete_session(DeleteSessionRequest { name: "new".into() }).await.unwrap();
    import_in(&daemon.client, start(), &file, 999).await.unwrap();
    assert_eq!(names(&daemon.client).await, ["new", "old"]);
}

#[tokio::test]
async fn messages_of_an_import_come_in_their_order() {
    let daemon = Daemon::start().await;
    create(&daemon.client, "s").await;
    let file = export(&daemon.client, "s").await;
    let start = || Some(Part::Start(ImportStart { name: "new".into(), ..Default::default() }));
    let chunk = || Some(Part::Chunk(file.clone()));
    let sent = async |parts: Vec<Option<Part>>| {
        let parts = parts.into_iter().map(|part| ImportSessionRequest { part });
        let mut calls = SessionServiceClient::new(daemon.channel().await);
        calls.import_session(tokio_stream::iter(parts.collect::<Vec<_>>())).await
    };
    let field = |status: Status| {
        let info = status.get_error_details().error_info().unwrap().clone();
        assert_eq!((status.code(), info.reason.as_str()), (Code::InvalidArgument, "INVALID_FIELD"));
        info.metadata["field"].clone()
    };
    let empty = || Some(Part::Chunk(Vec::new()));
    for (parts, wrong) in [
        (vec![], "start"),
        (vec![None], "start"),
        (vec![chunk()], "start"),
        (vec![start(), start()], "start"),
        (vec![start(), None], "part"),
        (vec![start(), empty()], "chunk"),
        (vec![start(), chunk(), empty()], "chunk"),
    ] {
        assert_eq!(field(sent(parts).await.unwrap_err()), wrong);
    }
    assert!(sent(vec![start()]).await.is_err());
    sent(vec![start(), chunk()]).await.unwrap();
}

#[tokio::test]
async fn limits_of_the_importer_count() {
    let from = Daemon::start().await;
    create(&from.client, "s").await;
    let small = export(&from.client, "s").await;
    from.client.generate(turn("s", "flood")).await.unwrap();
    let file = export(&from.client, "s").await;
    let daemon = Daemon::with(|config| {
        config.limits.session_bytes_max = 1 << 20;
        config.limits.sessions_bytes_max = 3 << 20;
        config.limits.sessions_max = 2;
        config.limits.sessions_pinned_max = 1;
    })
    .await;
    let limit = async |name: &str, file: &[u8]| {
        let error = import(&daemon.client, name, file).await.unwrap_err();
        let call = error.call().unwrap().clone();
        assert_eq!((call.code, call.reason), (Code::ResourceExhausted, ErrorReason::SessionLimit));
        call.metadata["limit"].clone()
    };
    assert_eq!(limit("large", &file).await, "session_bytes_max");
    import(&daemon.client, "a", &small).await.unwrap();
    assert_eq!(limit("b", &small).await, "sessions_pinned_max");
    let start = ImportStart { name: "b".into(), pinned: Some(false), ..Default::default() };
    assert!(!import_in(&daemon.client, start, &small, 9).await.unwrap().pinned);
    assert_eq!(limit("c", &small).await, "sessions_max");
    let stats = daemon.client.get_stats(GetStatsRequest {}).await.unwrap();
    assert_eq!((stats.sessions, stats.pinned_sessions), (2, 1));
}

#[tokio::test]
async fn an_import_that_stalls_or_drips_ends() {
    let daemon = Daemon::with(|config| config.limits.receive = Duration::from_millis(500)).await;
    create(&daemon.client, "s").await;
    let file = export(&daemon.client, "s").await;
    let begun = vec![file[..20].to_vec()];
    let stalls = tokio_stream::iter(begun).chain(tokio_stream::pending());
    // A byte now and then, of a frame that is long.
    let header =
        [&file[..16], b"mlx1", &10_u64.to_le_bytes(), &1_000_000_u64.to_le_bytes(), &[0; 48]].concat();
    let drops = tokio_stream::iter(std::iter::repeat(vec![0])).throttle(Duration::from_millis(10));
    let drips = tokio_stream::once(header).chain(drops);
    let start = || ImportStart { name: "new".into(), ..Default::default() };
    for error in [
        daemon.client.import_session(start(), stalls).await.unwrap_err(),
        daemon.client.import_session(start(), drips).await.unwrap_err(),
    ] {
        let call = error.call().unwrap();
        assert_eq!((call.code, call.reason), (Code::DeadlineExceeded, ErrorReason::Deadline), "{error}");
        assert_eq!(call.metadata["limit"], "receive_s");
    }
    assert_eq!(names(&daemon.client).await, ["s"]);
    // Its bytes are given back.
    import(&daemon.client, "new", &file).await.unwrap();
}

#[tokio::test]
async fn an_import_that_never_ends_is_refused_by_its_size() {
    let daemon = Daemon::with(|config| config.limits.session_bytes_max = 1 << 20).await;
    create(&daemon.client, "s").await;
    let file = export(&daemon.client, "s").await;
    // Frames that add nothing, one after the other, each intact: made of the first by whoever can hash.
    let header =
        [&file[..16], b"mlx1", &10_u64.to_le_bytes(), &2_000_000_u64.to_le_bytes(), &[0; 48]].concat();
    let endless = tokio_stream::once(header).chain(tokio_stream::iter(std::iter::repeat(vec![0; 65_536])));
    let start = ImportStart { name: "new".into(), ..Default::default() };
    let error = daemon.client.import_session(start, endless).await.unwrap_err();
    let expected = [ErrorReason::SessionFileInvalid, ErrorReason::SessionLimit];
    assert!(expected.contains(&error.reason()), "{error}");
    assert_eq!(names(&daemon.client).await, ["s"]);
}

#[tokio::test]
async fn half_sent_imports_keep_nobody_out() {
    let daemon = Daemon::start().await;
    create(&daemon.client, "s").await;
    let file = export(&daemon.client, "s").await;
    let mut halves = tokio::task::JoinSet::new();
    for number in 0..64 {
        let (client, chunk) = (daemon.client.clone(), file[..file.len() / 2].to_vec());
        halves.spawn(async move {
            let start = ImportStart { name: format!("half-{number}"), ..Default::default() };
            let chunks = tokio_stream::once(chunk).chain(tokio_stream::pending());
            client.import_session(start, chunks).await
        });
    }
    let honest = async {
        for number in 0..10 {
            daemon.client.generate(prompt("a")).await.unwrap();
            import(&daemon.client, &format!("whole-{number}"), &file).await.unwrap();
        }
    };
    tokio::select! {
        ended = halves.join_next() => panic!("nothing ends before its time: {ended:?}"),
        () = honest => {}
    }
}

#[tokio::test]
async fn a_file_belongs_to_whoever_imports_it() {
    let (daemon, _token) = on_tcp(|_| {}).await;
    create(&daemon.client, "s").await;
    daemon.client.generate(turn("s", "one")).await.unwrap();
    let other = client(&daemon, "secret").await;
    let refused = other.export_session(ExportSessionRequest { name: "s".into(), ..Default::default() }).await;
    assert_eq!(reason(refused.map(drop)), ErrorReason::SessionNotFound);
    let file = export(&daemon.client, "s").await;
    let session = import(&other, "", &file).await.unwrap();
    assert!(session.owner.starts_with("token:"));
    assert_eq!((names(&other).await, names(&daemon.client).await), (vec!["s".into()], vec!["s".into()]));
    let owner = get(&daemon.client, "s").await.session.unwrap().owner;
    assert!(!String::from_utf8_lossy(&file).contains(&owner), "the file does not tell whose it was");
}

#[tokio::test]
async fn tokens_that_the_model_does_not_have_are_those_of_another_tokenizer() {
    let daemon = Daemon::start().await;
    daemon.add_words();
    create(&daemon.client, "s").await;
    daemon.client.generate(turn("s", "one")).await.unwrap();
    let file = export(&daemon.client, "s").await;
    let start = ImportStart { name: "words".into(), model: WORDS.into(), ..Default::default() };
    import_in(&daemon.client, start, &file, 1000).await.unwrap();
    // A file that says that they are of this tokenizer, which has fewer.
    let mut read = Import::new(1 << 20);
    read.add(&file).unwrap();
    let (outline, mut contents) = read.finish().unwrap();
    let forged: Arc<[u32]> = contents.tokens.iter().map(|id| id + folder::VOCABULARY).collect();
    contents.tokens = forged;
    let forged: Vec<u8> = Export::new(&outline, contents).flatten().collect();
    import(&daemon.client, "forged", &forged).await.unwrap();
    for name in ["words", "forged"] {
        let raw = mlxd_client::v1::GenerateRequest { session: name.into(), ..prompt("x") };
        let raw = mlxd_client::v1::GenerateRequest { model: String::new(), ..raw };
        let refused = daemon.client.generate(raw).await;
        assert_eq!(reason(refused), ErrorReason::SessionTokenizerChanged, "{name}");
    }
    let answer = daemon.client.generate(turn("forged", "two")).await.unwrap();
    assert_eq!(answer.history(), mlxd_client::v1::HistoryOutcome::Rerendered);
    assert!(daemon.engine.last_context().iter().all(|id| *id < folder::VOCABULARY));
}

#[tokio::test]
async fn an_import_takes_the_lifetime_that_it_is_given_or_may_have() {
    let from = Daemon::start().await;
    create(&from.client, "s").await;
    let file = export(&from.client, "s").await;
    let daemon = Daemon::with(|config| config.limits.session_ttl_max = Duration::from_secs(3600)).await;
    let session = import(&daemon.client, "", &file).await.unwrap();
    assert_eq!(session.ttl.unwrap().seconds, 3600, "a day is more than this daemon allows");
    let ttl = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    let start = |seconds| ImportStart { name: "brief".into(), ttl: ttl(seconds), ..Default::default() };
    let long = import_in(&daemon.client, start(4000), &file, 100).await;
    assert_eq!(reason(long), ErrorReason::InvalidField);
    let session = import_in(&daemon.client, start(60), &file, 100).await.unwrap();
    assert_eq!(session.ttl, ttl(60));
}
