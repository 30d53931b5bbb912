//! A running daemon and ways to call it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mlxd::clock::SystemClock;
use mlxd::config::{Config, Overrides};
use mlxd::daemon::{self, Bound, Control, DaemonError};
use mlxd::hub::read_text_files;
use mlxd::text::Tokenizer;
use mlxd_client::Client;
use mlxd_client::v1::{
    ChatInput, CreateSessionRequest, ErrorReason, GenerateRequest, LoadModelRequest, LoadProgress,
    generate_request::Input, load_model_response::Event,
};
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

use crate::daemon::fake::Fake;
use crate::daemon::folder;

/// The model every daemon has.
pub const MODEL: &str = "tiny";
/// A model whose tokens are words, where a test adds it.
pub const WORDS: &str = "words";

pub struct Daemon {
    pub engine: Fake,
    pub client: Client,
    pub bound: Bound,
    pub folder: TempDir,
    /// Configurations to take over.
    pub reloads: mpsc::Sender<Config>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), DaemonError>>,
}

impl Daemon {
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        folder::write(&folder.path().join("models").join(MODEL));
        Self::start_in(folder, change).await
    }

    /// Stops it and starts another in its folder.
    pub async fn restart(self) -> Self {
        Self::start_in(self.leave().await, |_| {}).await
    }

    /// Stops it; returns its folder.
    pub async fn leave(mut self) -> TempDir {
        self.stop();
        let Self { task, client, folder, .. } = self;
        drop(client);
        let ended = tokio::time::timeout(Duration::from_secs(20), task).await.expect("the daemon ends");
        ended.unwrap().unwrap();
        folder
    }

    pub async fn start_in(folder: TempDir, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = config(&folder);
        change(&mut config);
        let (engine, handle) = Fake::start(config.engine);
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, bound) = oneshot::channel();
        let (reloads, receiver) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            let control = Control { stop: async { drop(stopped.await) }, reloads: receiver };
            let ready = |bound: &Bound| drop(ready.send(bound.clone()));
            daemon::serve(handle, &config, Arc::new(SystemClock::new()), control, ready).await
        });
        let bound = bound.await.expect("the daemon starts");
        let client = Client::connect(&format!("unix://{}", bound.socket.display())).await.unwrap();
        Self { engine, client, bound, folder, reloads, stop: Some(stop), task }
    }

    /// Adds the model whose tokens are words; returns its tokenizer.
    pub fn add_words(&self) -> Tokenizer {
        let folder = self.folder.path().join("models").join(WORDS);
        folder::write_words(&folder);
        Tokenizer::new(&read_text_files(&folder).unwrap()).unwrap()
    }

    /// A connection without the client's conveniences.
    pub async fn channel(&self) -> Channel {
        let address = format!("unix://{}", self.bound.socket.display());
        Endpoint::from_shared(address).unwrap().connect().await.unwrap()
    }

    /// A connection whose streams stop after a few bytes that are not read.
    pub async fn narrow(&self) -> Channel {
        let address = format!("unix://{}", self.bound.socket.display());
        let endpoint = Endpoint::from_shared(address).unwrap().initial_stream_window_size(65_535);
        endpoint.connect().await.unwrap()
    }

    /// As a signal does.
    pub fn stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    /// Returns the daemon's outcome.
    pub async fn ended(self) -> Result<(), DaemonError> {
        let Self { task, client, folder: _folder, .. } = self;
        drop(client);
        tokio::time::timeout(Duration::from_secs(20), task).await.expect("the daemon ends").unwrap()
    }
}

/// A configuration whose paths lie in `folder`.
pub fn config(folder: &TempDir) -> Config {
    let file: PathBuf = folder.path().join("mlxd.toml");
    let text = format!(
        "socket = \"{0}/run/mlxd.sock\"\nmodel_roots = [\"{0}/models\"]\nhf_cache = \"{0}/hf\"\n\
         state_dir = \"{0}/state\"\n",
        folder.path().display()
    );
    std::fs::write(&file, text).unwrap();
    Config::load(&Overrides { config_file: Some(file), ..Overrides::default() }).unwrap()
}

/// A chat turn.
pub fn chat(text: &str) -> GenerateRequest {
    GenerateRequest { model: MODEL.into(), ..GenerateRequest::chat(text) }
}

/// A raw prompt.
pub fn prompt(text: &str) -> GenerateRequest {
    GenerateRequest { model: MODEL.into(), ..GenerateRequest::prompt(text) }
}

/// A chat turn in a session, which names the model.
pub fn turn(session: &str, text: &str) -> GenerateRequest {
    GenerateRequest { session: session.into(), ..GenerateRequest::chat(text) }
}

/// A conversation.
pub fn asking(chat: ChatInput) -> GenerateRequest {
    GenerateRequest { input: Some(Input::Chat(chat)), ..prompt("") }
}

/// Creates a session.
pub async fn create(client: &Client, name: &str, model: &str) {
    let request = CreateSessionRequest { name: name.into(), model: model.into(), ..Default::default() };
    client.create_session(request).await.unwrap();
}

/// Returns the field for which a request is refused.
pub async fn refused(daemon: &Daemon, request: GenerateRequest) -> String {
    let error = daemon.client.generate(request).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::InvalidField, "{error}");
    error.call().unwrap().field_violations[0].field.clone()
}

/// Loads the model; returns its progress and its end.
pub async fn load(
    client: &Client,
    request: LoadModelRequest,
) -> Result<(Vec<LoadProgress>, Event), mlxd_client::Error> {
    let mut stream = client.load_model(LoadModelRequest { model: MODEL.into(), ..request }).await?;
    let mut progress = Vec::new();
    loop {
        match stream.next_event().await?.expect("a load has an end") {
            Event::Progress(step) => progress.push(step),
            end => {
                assert_eq!(stream.next_event().await?, None, "a load has one end");
                return Ok((progress, end));
            }
        }
    }
}

/// The control of a daemon that is never stopped.
pub fn unstopped() -> Control<std::future::Pending<()>> {
    Control { stop: std::future::pending(), reloads: mpsc::channel(1).1 }
}
