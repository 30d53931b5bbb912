//! One connection to a daemon and a method for every RPC. A method takes the message itself, or a
//! [`tonic::Request`] around it for a deadline or further metadata.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher as _;
use std::path::Path;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{IntoRequest, Request, Response, Status};

use crate::address::{Address, default_address};
use crate::error::{Error, Result};
use crate::stream::{GenerateStream, LoadStream};
use crate::v1::inference_service_client::InferenceServiceClient;
use crate::v1::model_service_client::ModelServiceClient;
use crate::v1::server_service_client::ServerServiceClient;
use crate::v1::session_service_client::SessionServiceClient;
use crate::v1::{
    CapabilitiesRequest, CapabilitiesResponse, CountTokensRequest, CountTokensResponse, CreateSessionRequest,
    DeleteSessionRequest, DeleteSessionResponse, ForkSessionRequest, GenerateRequest, GenerateResponse,
    GetModelRequest, GetSessionRequest, GetSessionResponse, GetStatsRequest, GetStatsResponse,
    ListModelsRequest, ListModelsResponse, ListSessionsRequest, ListSessionsResponse, LoadModelRequest,
    Message, ModelInfo, ScoreRequest, ScoreResponse, Session, TruncateSessionRequest, UnloadModelRequest,
    UnloadModelResponse,
};

/// Largest message that this client accepts, in bytes. Scores of a long text are the largest messages:
/// 64 MiB hold 20 alternatives for each of about 150,000 tokens.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Time to wait for a connection; a socket of this machine answers at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A bearer token. It is not shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct BearerToken(String);

impl BearerToken {
    /// Wraps a token, as it is in the daemon's token file.
    #[must_use]
    pub fn new(token: impl Into<String>) -> Self {
        Self(token.into())
    }

    /// Reads a token file and trims the white space around the token.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn from_file(path: &Path) -> Result<Self> {
        let token = std::fs::read_to_string(path).map_err(|error| Error::InvalidOption {
            option: "token file",
            why: format!("{}: {error}", path.display()),
        })?;
        Ok(Self(token.trim().to_owned()))
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
}

/// A connection to a daemon. Clones share it; calls run concurrently.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    address: Address,
    metadata: MetadataMap,
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
                let (request, request_id) = self.prepare(request);
                let answer = self.$service().$method(request).await;
                let response = answer.map_err(|status| Error::from_status(&status, &request_id))?.into_inner();
                $(
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
        let ConnectOptions { address, token, client_name } = options;
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
            .map_err(|source| Error::Connect { address: address.to_string(), source })?;
        Ok(Self { channel, address, metadata })
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
        /// Copies a session under a new name.
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
        let (request, request_id) = self.prepare(request);
        let answer = self.inference().stream_generate(request).await;
        let (stream, request_id) = opened(answer, request_id)?;
        Ok(GenerateStream::new(stream, request_id))
    }

    /// Loads a model and streams its progress.
    ///
    /// # Errors
    /// The request was refused; later failures come out of the stream.
    pub async fn load_model(&self, request: impl IntoRequest<LoadModelRequest>) -> Result<LoadStream> {
        let (request, request_id) = self.prepare(request);
        let answer = self.models().load_model(request).await;
        let (stream, request_id) = opened(answer, request_id)?;
        Ok(LoadStream::new(stream, request_id))
    }

    /// Lists all models, reading every page.
    ///
    /// # Errors
    /// As [`Client::list_models`].
    pub async fn list_all_models(&self, resident_only: bool) -> Result<Vec<ModelInfo>> {
        let mut request = ListModelsRequest { resident_only, ..ListModelsRequest::default() };
        let mut models = Vec::new();
        loop {
            let page = self.list_models(request.clone()).await?;
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
        let mut request = ListSessionsRequest::default();
        let mut sessions = Vec::new();
        loop {
            let page = self.list_sessions(request.clone()).await?;
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
        let mut messages = Vec::new();
        loop {
            let page = self.get_session(request.clone()).await?;
            messages.extend(page.messages);
            if page.next_message_page_token.is_empty() {
                return Ok(messages);
            }
            request.message_page_token = page.next_message_page_token;
        }
    }

    /// Adds the connection's metadata and a request id, unless the caller set their own.
    fn prepare<T>(&self, request: impl IntoRequest<T>) -> (Request<T>, String) {
        let mut request = request.into_request();
        let metadata = request.metadata_mut();
        for name in ["authorization", "x-mlxd-client"] {
            if let Some(value) = self.metadata.get(name)
                && !metadata.contains_key(name)
            {
                metadata.insert(name, value.clone());
            }
        }
        if let Some(id) = metadata.get("x-request-id").and_then(|value| value.to_str().ok()) {
            let id = id.to_owned();
            return (request, id);
        }
        let (id, value) = next_request_id();
        metadata.insert("x-request-id", value);
        (request, id)
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

/// Returns the stream of an accepted call, and the daemon's request id for it.
fn opened<S>(answer: Result<Response<S>, Status>, sent_id: String) -> Result<(S, String)> {
    let response = answer.map_err(|status| Error::from_status(&status, &sent_id))?;
    let answered_id = response.metadata().get("x-request-id").and_then(|value| value.to_str().ok());
    let request_id = answered_id.map_or(sent_id, str::to_owned);
    Ok((response.into_inner(), request_id))
}

fn header(option: &'static str, text: &str) -> Result<MetadataValue<Ascii>> {
    text.parse()
        .map_err(|_| Error::InvalidOption { option, why: "has characters that a header cannot carry".into() })
}

/// Returns an id that is unique on this machine with near certainty: 64 random bits for the process
/// and a counter.
fn next_request_id() -> (String, MetadataValue<Ascii>) {
    static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(std::process::id()));
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let id = format!("{:016x}-{count}", *PROCESS);
    // Hexadecimal digits are always a valid header; the fallback is a number, which is valid by type.
    let value = id.parse().unwrap_or_else(|_| MetadataValue::from(count));
    (id, value)
}
