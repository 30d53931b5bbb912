//! A daemon without models, for tests of clients: it answers over a real unix socket, echoes its input,
//! and records every call. Special texts make it misbehave; `answer` lists them.

#![allow(dead_code, unreachable_pub, reason = "each test program uses another part of it")]
#![allow(clippy::expect_used, clippy::panic, reason = "a fake that cannot work ends the test")]

mod inference;
mod models;
mod server;
mod sessions;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use mlxd_client::v1::{ModelInfo, ModelState, Session};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Server code for the client's own messages.
#[allow(missing_docs, reason = "generated code")]
#[allow(clippy::all, clippy::pedantic, clippy::allow_attributes_without_reason, reason = "generated code")]
pub mod services {
    include!("../gen/mlxd.v1.server.rs");
}

/// The fake's models and sessions, and the recorded calls.
#[derive(Default)]
pub struct State {
    /// Metadata of every call, with the method's name.
    pub calls: Vec<(&'static str, MetadataMap)>,
    /// Every GenerateRequest.
    pub generations: Vec<mlxd_client::v1::GenerateRequest>,
    /// Generations whose caller went away.
    pub cancelled: u32,
    /// Models by name.
    pub models: BTreeMap<String, ModelInfo>,
    /// Sessions by name.
    pub sessions: BTreeMap<String, Session>,
    /// Temperature that the models' files name; 0 if they name none.
    pub temperature: f32,
    /// What is wrong with the model roots.
    pub problems: Vec<String>,
    /// Time that each page of a list takes.
    pub page_delay: Duration,
}

/// A running fake; it stops when dropped.
pub struct FakeDaemon {
    state: Arc<Mutex<State>>,
    folder: tempfile::TempDir,
    task: tokio::task::JoinHandle<()>,
}

/// A second socket that passes everything on to the fake's, until it is cut.
pub struct Wire {
    socket: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Wire {
    /// The path of its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Breaks every connection, as the end of a daemon does.
    pub async fn cut(self) {
        std::fs::remove_file(&self.socket).expect("the socket exists");
        self.task.abort();
        _ = self.task.await;
    }
}

/// The four services.
#[derive(Clone)]
pub struct Fake {
    state: Arc<Mutex<State>>,
}

impl FakeDaemon {
    /// Starts it on a socket in a folder of its own; one model, `tiny`, is resident.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let socket = UnixListener::bind(folder.path().join("s")).expect("the socket binds");
        let state = Arc::new(Mutex::new(State::default()));
        let model = |name: &str, model_state: ModelState| {
            let resident = model_state == ModelState::Resident;
            let info = ModelInfo {
                name: name.into(),
                state: model_state.into(),
                architecture: "llama".into(),
                context_length: 2048,
                parameter_count: 134_515_008,
                stored_as: "bfloat16".into(),
                computes_in: if resident { "float32".into() } else { String::new() },
                file_bytes: 269_060_552,
                weight_bytes: if resident { 538_060_032 } else { 0 },
                kv_slab_bytes: if resident { 48 << 20 } else { 0 },
                kv_idle_bytes: if resident { 12 << 20 } else { 0 },
                ..ModelInfo::default()
            };
            (name.to_owned(), info)
        };
        state.lock().expect("state").models = BTreeMap::from([
            model("tiny", ModelState::Resident),
            model("owner/large", ModelState::Available),
        ]);
        let fake = Fake { state: state.clone() };
        let router = Server::builder()
            .add_service(services::inference_service_server::InferenceServiceServer::new(fake.clone()))
            .add_service(services::model_service_server::ModelServiceServer::new(fake.clone()))
            .add_service(services::session_service_server::SessionServiceServer::new(fake.clone()))
            .add_service(services::server_service_server::ServerServiceServer::new(fake));
        let task = tokio::spawn(async move {
            router.serve_with_incoming(UnixListenerStream::new(socket)).await.expect("the fake serves");
        });
        Self { state, folder, task }
    }

    /// The path of its socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// Opens a second socket for it.
    pub fn wire(&self) -> Wire {
        let (socket, target) = (self.folder.path().join("w"), self.socket());
        let listener = UnixListener::bind(&socket).expect("the socket binds");
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                let target = target.clone();
                connections.spawn(async move {
                    let mut far = UnixStream::connect(target).await.expect("the fake accepts");
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
            }
        });
        Wire { socket, task }
    }

    /// A folder for the test's files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Returns its state, locked.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("state")
    }

    /// Waits until a condition holds, for at most 30 seconds.
    pub async fn until(&self, what: &str, condition: impl Fn(&State) -> bool) {
        for _ in 0..3000 {
            if condition(&self.state()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}: not within 30 seconds");
    }
}

impl Drop for FakeDaemon {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("state")
    }

    /// Records a call and returns its message.
    fn note<T>(&self, method: &'static str, request: tonic::Request<T>) -> T {
        let (metadata, _, message) = request.into_parts();
        self.state().calls.push((method, metadata));
        message
    }

    /// Records a call for a page, and takes its time.
    async fn note_page<T>(&self, method: &'static str, request: tonic::Request<T>) -> T {
        let message = self.note(method, request);
        let delay = self.state().page_delay;
        tokio::time::sleep(delay).await;
        message
    }

    /// Returns the model of a name.
    fn model(&self, name: &str) -> Result<ModelInfo, Status> {
        self.state().models.get(name).cloned().ok_or_else(|| {
            refusal(
                Code::NotFound,
                "MODEL_NOT_FOUND",
                &format!("no model named {name:?} under the model roots or in the Hugging Face cache"),
                &[],
            )
        })
    }
}

/// Makes a status as the daemon does.
pub fn refusal(code: Code, reason: &str, message: &str, metadata: &[(&str, &str)]) -> Status {
    let mut details = ErrorDetails::new();
    let metadata: std::collections::HashMap<String, String> =
        metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    details.set_error_info(reason, "mlxd.v1", metadata);
    Status::with_error_details(code, message, details)
}
