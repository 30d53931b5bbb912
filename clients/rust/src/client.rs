//! One connection to a daemon and a method for every RPC. A method takes the message itself, or a
//! [`tonic::Request`] around it for a deadline or further metadata.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;
use tokio_stream::{Stream, StreamExt as _};
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{IntoRequest, Request};

use crate::address::{Address, default_address};
use crate::call::{Call, TIMEOUT_HEADER};
use crate::error::{Error, Result};
use crate::stream::{ExportStream, GenerateStream, LoadStream, WatchStream};
use crate::v1::inference_service_client::InferenceServiceClient;
use crate::v1::model_service_client::ModelServiceClient;
use crate::v1::server_service_client::ServerServiceClient;
use crate::v1::session_service_client::SessionServiceClient;
use crate::v1::{
    CapabilitiesRequest, CapabilitiesResponse, CountTokensRequest, CountTokensResponse, CreateSessionRequest,
    DeleteSessionRequest, DeleteSessionResponse, ExportSessionRequest, ExtendSessionRequest,
    ExtendSessionResponse, ForkSessionRequest, GenerateRequest, GenerateResponse, GetModelRequest,
    GetSessionRequest, GetSessionResponse, GetStatsRequest, GetStatsResponse, ImportSessionRequest,
    ImportStart, ListModelsRequest, ListModelsResponse, ListSessionsRequest, ListSessionsResponse,
    LoadModelRequest, Message, ModelInfo, SaveSessionRequest, SaveSessionResponse, ScoreRequest,
    ScoreResponse, Session, TruncateSessionRequest, UnloadModelRequest, UnloadModelResponse,
    UpdateSessionRequest, WatchSessionsRequest, import_session_request::Part,
};

/// Largest message that this client accepts, in bytes. Scores of a long text are the largest messages:
/// 64 MiB hold 20 alternatives for each of about 150,000 tokens.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Longest timeout of a connection's calls; a longer one is this one. A year: no call lasts as long.
const TIMEOUT_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// Time to wait for a connection; a socket of this machine answers at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A bearer token. It is not shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct BearerToken(String);

impl BearerToken {
    /// Wraps a token; white space around it, such as a file's last line end, is not part of it.
    #[must_use]
    pub fn new(token: &str) -> Self {
        Self(token.trim().to_owned())
    }

    /// Reads a token file, as [`BearerToken::new`].
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn from_file(path: &Path) -> Result<Self> {
        let token = std::fs::read_to_string(path).map_err(|error| Error::InvalidOption {
            option: "token file",
            why: format!("{}: {error}", path.display()),
        })?;
        Ok(Self::new(&token))
    }
}

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BearerToken(…)")
    }
}

/// Options of a connection.
#[derive(Clone, Debug, Default)]
pub struct ConnectOptions {
    /// The daemon's address; [`default_address`] if unset.
    pub address: Option<Address>,
    /// Identifies the caller. TCP requires it; on a unix socket the daemon sees the peer's uid.
    pub token: Option<BearerToken>,
    /// Names this client among those of the same principal, for fairness; the connection if unset.
    pub client_name: Option<String>,
    /// Deadline of each call that sets none of its own with [`Request::set_timeout`], all its requests
    /// and its whole stream included; none if unset.
    pub timeout: Option<Duration>,
}

/// A connection to a daemon. Clones share it; calls run concurrently.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    address: Address,
    metadata: MetadataMap,
    timeout: Option<Duration>,
}

/// Defines methods for unary RPCs; `via field` takes the one field out of the response.
macro_rules! unary {
    ($($(#[$doc:meta])* $service:ident.$method:ident($request:ty) -> $response:ty $(, via $field:ident)?;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Errors
            /// The call failed; [`Error::reason`] tells why.
            pub async fn $method(&self, request: impl IntoRequest<$request>) -> Result<$response> {
                let (request, call) = self.prepare(request);
                let response = call.answer(self.$service().$method(request)).await?.into_inner();
                $(
                    let request_id = call.request_id;
                    let response = response
                        .$field
                        .ok_or(Error::Incomplete { missing: stringify!($field), request_id })?;
                )?
                Ok(response)
            }
        )*
    };
}

impl Client {
    /// Connects to `unix:///path`, `unix:/path`, an absolute path or `http://host:port`.
    ///
    /// # Errors
    /// The address is malformed, or no daemon answers there.
    pub async fn connect(address: &str) -> Result<Self> {
        let address = Some(address.parse()?);
        Self::connect_with(ConnectOptions { address, ..ConnectOptions::default() }).await
    }

    /// Connects to the daemon of this user: [`default_address`].
    ///
    /// # Errors
    /// There is no default address, or no daemon answers there.
    pub async fn connect_default() -> Result<Self> {
        Self::connect_with(ConnectOptions::default()).await
    }

    /// Connects with the given options.
    ///
    /// # Errors
    /// An option is invalid, or no daemon answers.
    pub async fn connect_with(options: ConnectOptions) -> Result<Self> {
        let ConnectOptions { address, token, client_name, timeout } = options;
        let address = address.map_or_else(default_address, Ok)?;
        let mut metadata = MetadataMap::new();
        if let Some(BearerToken(token)) = token {
            metadata.insert("authorization", header("token", &format!("Bearer {token}"))?);
        }
        if let Some(name) = client_name {
            metadata.insert("x-mlxd-client", header("client name", &name)?);
        }
        let endpoint = Endpoint::from_shared(address.to_string()).map_err(|error| Error::InvalidOption {
            option: "address",
            why: format!("{address}: {error}"),
        })?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .connect()
            .await
            .map_err(|source| Error::Connect { address: address.to_string(), source: Box::new(source) })?;
        let timeout = timeout.map(|timeout| timeout.min(TIMEOUT_MAX));
        Ok(Self { channel, address, metadata, timeout })
    }

    /// The daemon's address.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    unary! {
        /// Runs one request to its end. Dropping the future cancels the call.
        inference.generate(GenerateRequest) -> GenerateResponse;
        /// Renders and tokenizes an input without running it.
        inference.count_tokens(CountTokensRequest) -> CountTokensResponse;
        /// Computes the log-probability of every token of a given text.
        inference.score(ScoreRequest) -> ScoreResponse;
        /// Unloads a resident model and returns the number of bytes freed.
        models.unload_model(UnloadModelRequest) -> UnloadModelResponse;
        /// Describes one model.
        models.get_model(GetModelRequest) -> ModelInfo, via model;
        /// Lists one page of models.
        models.list_models(ListModelsRequest) -> ListModelsResponse;
        /// Creates an empty session.
        sessions.create_session(CreateSessionRequest) -> Session, via session;
        /// Describes a session, with one page of its messages if asked for.
        sessions.get_session(GetSessionRequest) -> GetSessionResponse;
        /// Lists one page of the caller's sessions.
        sessions.list_sessions(ListSessionsRequest) -> ListSessionsResponse;
        /// Changes a session's lifetime, labels or pin.
        sessions.update_session(UpdateSessionRequest) -> Session, via session;
        /// Adds an input to a session and computes its KV cache, without an answer.
        sessions.extend_session(ExtendSessionRequest) -> ExtendSessionResponse;
        /// Writes the cached KV of a session to disk.
        sessions.save_session(SaveSessionRequest) -> SaveSessionResponse;
        /// Copies a session, or its first turns, under a new name.
        sessions.fork_session(ForkSessionRequest) -> Session, via session;
        /// Cuts a session back to an earlier point.
        sessions.truncate_session(TruncateSessionRequest) -> Session, via session;
        /// Deletes a session and cancels a turn that runs in it.
        sessions.delete_session(DeleteSessionRequest) -> DeleteSessionResponse;
        /// Describes the daemon and its models.
        server.capabilities(CapabilitiesRequest) -> CapabilitiesResponse;
        /// Returns the daemon's counters and gauges.
        server.get_stats(GetStatsRequest) -> GetStatsResponse;
    }

    /// Runs one request and streams its output. Dropping the stream cancels the call.
    ///
    /// # Errors
    /// The request was refused; later failures come out of the stream.
    pub async fn stream_generate(
        &self,
        request: impl IntoRequest<GenerateRequest>,
    ) -> Result<GenerateStream> {
        let (request, call) = self.prepare(request);
        let answer = call.answer(self.inference().stream_generate(request)).await?;
        let call = call.accepted(answer.metadata());
        Ok(GenerateStream::new(answer.into_inner(), call))
    }

    /// Loads a model and streams its progress.
    ///
    /// # Errors
    /// The request was refused; later failures come out of the stream.
    pub async fn load_model(&self, request: impl IntoRequest<LoadModelRequest>) -> Result<LoadStream> {
        let (request, call) = self.prepare(request);
        let answer = call.answer(self.models().load_model(request)).await?;
        let call = call.accepted(answer.metadata());
        Ok(LoadStream::new(answer.into_inner(), call))
    }

    /// Sends a session as one file, in chunks; [`ExportStream::collect_file`] puts them together.
    ///
    /// # Errors
    /// The request was refused; later failures come out of the stream.
    pub async fn export_session(
        &self,
        request: impl IntoRequest<ExportSessionRequest>,
    ) -> Result<ExportStream> {
        let (request, call) = self.prepare(request);
        let answer = call.answer(self.sessions().export_session(request)).await?;
        let call = call.accepted(answer.metadata());
        Ok(ExportStream::new(answer.into_inner(), call))
    }

    /// Makes a session out of a file, which comes in chunks of at most a few hundred KiB. A file whose chunks
    /// end too early is refused.
    ///
    /// # Errors
    /// The call failed; [`Error::reason`] tells why.
    pub async fn import_session(
        &self,
        start: impl IntoRequest<ImportStart>,
        file: impl Stream<Item = Vec<u8>> + Send + 'static,
    ) -> Result<Session> {
        let (request, call) = self.prepare(start);
        let (metadata, extensions, start) = request.into_parts();
        let part = |part| ImportSessionRequest { part: Some(part) };
        let chunks = file.filter(|bytes| !bytes.is_empty()).map(move |bytes| part(Part::Chunk(bytes)));
        let parts = tokio_stream::once(part(Part::Start(start))).chain(chunks);
        let request = Request::from_parts(metadata, extensions, parts);
        let response = call.answer(self.sessions().import_session(request)).await?.into_inner();
        let request_id = call.request_id;
        response.session.ok_or(Error::Incomplete { missing: "session", request_id })
    }

    /// [`Client::import_session`] of a file that is read as it is sent, on the thread of the connection.
    ///
    /// # Errors
    /// As [`Client::import_session`].
    pub async fn import_session_file(
        &self,
        start: impl IntoRequest<ImportStart>,
        chunks: impl IntoIterator<Item = Vec<u8>, IntoIter: Send + 'static>,
    ) -> Result<Session> {
        self.import_session(start, tokio_stream::iter(chunks)).await
    }

    /// Tells what becomes of the caller's sessions, until the stream is dropped or the daemon ends.
    ///
    /// # Errors
    /// The request was refused; later failures come out of the stream.
    pub async fn watch_sessions(
        &self,
        request: impl IntoRequest<WatchSessionsRequest>,
    ) -> Result<WatchStream> {
        let (request, call) = self.prepare(request);
        let answer = call.answer(self.sessions().watch_sessions(request)).await?;
        let call = call.accepted(answer.metadata());
        Ok(WatchStream::new(answer.into_inner(), call))
    }

    /// Lists all models, reading every page.
    ///
    /// # Errors
    /// As [`Client::list_models`].
    pub async fn list_all_models(&self, resident_only: bool) -> Result<Vec<ModelInfo>> {
        let mut request = ListModelsRequest { resident_only, ..ListModelsRequest::default() };
        let deadline = self.timeout.map(|timeout| Instant::now() + timeout);
        let mut models = Vec::new();
        loop {
            let page = self.list_models(within(deadline, request.clone())).await?;
            models.extend(page.models);
            if page.next_page_token.is_empty() {
                return Ok(models);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Lists all sessions of the caller, reading every page.
    ///
    /// # Errors
    /// As [`Client::list_sessions`].
    pub async fn list_all_sessions(&self) -> Result<Vec<Session>> {
        self.list_all_sessions_of(ListSessionsRequest::default()).await
    }

    /// Lists all sessions of the caller that `request` asks for, reading every page.
    ///
    /// # Errors
    /// As [`Client::list_sessions`].
    pub async fn list_all_sessions_of(&self, mut request: ListSessionsRequest) -> Result<Vec<Session>> {
        let deadline = self.timeout.map(|timeout| Instant::now() + timeout);
        let mut sessions = Vec::new();
        loop {
            let page = self.list_sessions(within(deadline, request.clone())).await?;
            sessions.extend(page.sessions);
            if page.next_page_token.is_empty() {
                return Ok(sessions);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Returns all messages of a session, oldest first, reading every page.
    ///
    /// # Errors
    /// As [`Client::get_session`].
    pub async fn session_messages(&self, name: &str) -> Result<Vec<Message>> {
        let mut request =
            GetSessionRequest { name: name.to_owned(), include_messages: true, ..Default::default() };
        let deadline = self.timeout.map(|timeout| Instant::now() + timeout);
        let mut messages = Vec::new();
        loop {
            let page = self.get_session(within(deadline, request.clone())).await?;
            messages.extend(page.messages);
            if page.next_message_page_token.is_empty() {
                return Ok(messages);
            }
            request.message_page_token = page.next_message_page_token;
        }
    }

    /// Adds the connection's metadata, its timeout and a request id, unless the caller set their own.
    fn prepare<T>(&self, request: impl IntoRequest<T>) -> (Request<T>, Call) {
        let mut request = request.into_request();
        for name in ["authorization", "x-mlxd-client"] {
            if let Some(value) = self.metadata.get(name)
                && !request.metadata().contains_key(name)
            {
                request.metadata_mut().insert(name, value.clone());
            }
        }
        if let Some(timeout) = self.timeout
            && !request.metadata().contains_key(TIMEOUT_HEADER)
        {
            request.set_timeout(timeout);
        }
        let call = Call::new(request.metadata_mut(), self.address.clone());
        (request, call)
    }

    fn inference(&self) -> InferenceServiceClient<Channel> {
        InferenceServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    fn sessions(&self) -> SessionServiceClient<Channel> {
        SessionServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    fn server(&self) -> ServerServiceClient<Channel> {
        ServerServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }
}

/// Wraps a message in a request that ends with the deadline.
fn within<T>(deadline: Option<Instant>, message: T) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(deadline) = deadline {
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
    }
    request
}

fn header(option: &'static str, text: &str) -> Result<MetadataValue<Ascii>> {
    text.parse()
        .map_err(|_| Error::InvalidOption { option, why: "has characters that a header cannot carry".into() })
}
