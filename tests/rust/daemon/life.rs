//! A daemon's life: start, health, reflection, drain, death.

use mlxd::daemon::{self, DaemonError};
use mlxd_client::v1::inference_service_client::InferenceServiceClient;
use mlxd_client::v1::server_service_client::ServerServiceClient;
use mlxd_client::v1::{ErrorReason, GetStatsRequest, stream_generate_response::Event};
use tokio_stream::StreamExt;
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1alpha;
use tonic_types::StatusExt;

use crate::daemon::fake::{ANSWER, Fake};
use crate::daemon::harness::{Daemon, MODEL, config, prompt, unstopped};

impl Daemon {
    pub async fn raw(&self) -> ServerServiceClient<Channel> {
        ServerServiceClient::new(self.channel().await)
    }

    /// Calls any method with any bytes; the code and reason it ends with.
    pub async fn call(&self, method: &'static str, body: Vec<u8>) -> (Code, String) {
        let mut grpc = tonic::client::Grpc::new(self.channel().await);
        grpc.ready().await.unwrap();
        let request = tonic::Request::new(body);
        let path = http::uri::PathAndQuery::from_static(method);
        let status = grpc.unary(request, path, RawCodec).await.map(|_| ()).unwrap_err();
        let reason = status.get_error_details().error_info().unwrap().reason.clone();
        (status.code(), reason)
    }

    async fn health(&self, service: &str) -> Result<ServingStatus, tonic::Status> {
        let request = HealthCheckRequest { service: service.into() };
        let answer = HealthClient::new(self.channel().await).check(request).await?;
        Ok(answer.into_inner().status())
    }
}

/// Sends bytes as they are.
#[derive(Clone, Copy, Default)]
struct RawCodec;

impl tonic::codec::Codec for RawCodec {
    type Encode = Vec<u8>;
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl tonic::codec::Encoder for RawCodec {
    type Item = Vec<u8>;
    type Error = tonic::Status;

    fn encode(&mut self, item: Vec<u8>, out: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), tonic::Status> {
        bytes::BufMut::put_slice(out, &item);
        Ok(())
    }
}

impl tonic::codec::Decoder for RawCodec {
    type Item = ();
    type Error = tonic::Status;

    fn decode(&mut self, _: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<()>, tonic::Status> {
        Ok(Some(()))
    }
}

#[tokio::test]
async fn health_has_an_entry_for_the_daemon_and_each_service() {
    let daemon = Daemon::start().await;
    for service in ["", "Inference", "Model", "Session", "Server"] {
        let name = if service.is_empty() { String::new() } else { format!("mlxd.v1.{service}Service") };
        assert_eq!(daemon.health(&name).await.unwrap(), ServingStatus::Serving);
    }
    let unknown = daemon.health("no.such").await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    assert!(unknown.get_error_details().error_info().is_some());
}

#[tokio::test]
async fn reflection_lists_the_services_in_both_versions() {
    let daemon = Daemon::start().await;
    let expected = ["InferenceService", "ModelService", "ServerService", "SessionService"];
    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut client = ServerReflectionClient::new(daemon.channel().await);
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    for service in expected {
        assert!(names.contains(&format!("mlxd.v1.{service}").as_str()), "{names:?}");
    }
    let request = v1alpha::ServerReflectionRequest {
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
            "mlxd.v1.InferenceService".into(),
        )),
        ..Default::default()
    };
    let channel = daemon.channel().await;
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response.unwrap();
    assert!(matches!(
        answer,
        v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(_)
    ));
}

#[tokio::test]
async fn a_drain_lets_streams_finish_and_refuses_new_calls() {
    let mut daemon = Daemon::with(|config| config.drain = std::time::Duration::from_secs(600)).await;
    let mut open = InferenceServiceClient::new(daemon.channel().await);
    let channel = daemon.channel().await;
    let mut health = HealthClient::new(channel);
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let hanging = daemon.client.stream_generate(prompt("hang")).await.unwrap();
    daemon.engine.wait_running(1).await;
    daemon.stop();
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    let request: mlxd_client::v1::GenerateRequest = prompt("a");
    let refused = open.generate(request).await.unwrap_err();
    let details = refused.get_error_details();
    assert_eq!(
        (refused.code(), details.error_info().unwrap().reason.as_str()),
        (Code::Unavailable, "DRAINING")
    );
    assert!(details.retry_info().is_some());
    drop((hanging, watch));
    let socket = daemon.bound.socket.clone();
    daemon.ended().await.unwrap();
    assert!(!socket.exists());
}

#[tokio::test]
async fn what_was_generated_before_the_drain_still_arrives() {
    let mut daemon = Daemon::start().await;
    daemon.client.generate(prompt("a")).await.unwrap();
    let mut stream = daemon.client.stream_generate(prompt("a")).await.unwrap();
    daemon.stop();
    let mut text = String::new();
    let mut finished = 0;
    while let Some(event) = stream.next_event().await.unwrap() {
        match event {
            Event::Delta(delta) => text += &delta.text,
            Event::Finished(_) => finished += 1,
            Event::Started(_) | Event::Progress(_) | Event::ChoiceFinished(_) => {}
        }
    }
    assert_eq!((text.as_str(), finished), (ANSWER, 1));
    daemon.ended().await.unwrap();
}

#[tokio::test]
async fn when_the_engine_dies_every_call_ends_and_the_daemon_fails() {
    let daemon = Daemon::start().await;
    let mut stream = daemon.client.stream_generate(prompt("hang")).await.unwrap();
    let client = daemon.client.clone();
    let unary = tokio::spawn(async move { client.generate(prompt("hang")).await });
    daemon.engine.wait_running(2).await;
    let mut health = HealthClient::new(daemon.channel().await);
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
    daemon.engine.kill();
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_eq!(daemon.health("mlxd.v1.InferenceService").await.unwrap(), ServingStatus::NotServing);
    let streamed = loop {
        if let Err(error) = stream.next_event().await {
            break error;
        }
    };
    let whole = unary.await.unwrap().unwrap_err();
    let new = daemon.client.get_stats(GetStatsRequest {}).await.unwrap_err();
    for error in [streamed, whole, new] {
        let call = error.call().unwrap();
        assert_eq!((call.code, call.reason), (Code::Unavailable, ErrorReason::EngineDead));
    }
    drop((stream, watch));
    assert!(matches!(daemon.ended().await, Err(DaemonError::EngineDied)));
}

#[tokio::test]
async fn health_tells_of_an_engine_that_hangs_and_of_one_that_goes_on() {
    let daemon = Daemon::with(|config| config.engine_stall = std::time::Duration::from_millis(1)).await;
    let mut health = HealthClient::new(daemon.channel().await);
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let mut next = async || watch.next().await.unwrap().unwrap().status();
    assert_eq!(next().await, ServingStatus::Serving);
    daemon.engine.pulse.begin();
    assert_eq!(next().await, ServingStatus::NotServing);
    daemon.engine.pulse.wait();
    assert_eq!(next().await, ServingStatus::Serving);
}

#[tokio::test]
async fn a_live_daemons_socket_is_not_taken_over() {
    let daemon = Daemon::start().await;
    let (_fake, handle) = Fake::start(config(&daemon.folder).engine);
    let clock = std::sync::Arc::new(mlxd::clock::SystemClock::new());
    let second =
        daemon::serve(handle, &config(&daemon.folder), clock, unstopped(), |_| panic!("ready")).await;
    assert!(matches!(second, Err(DaemonError::Locked { .. })));
    daemon.client.generate(prompt("a")).await.unwrap();
}

#[tokio::test]
async fn a_configured_model_is_loaded_at_the_start_or_the_start_fails() {
    let daemon = Daemon::with(|config| config.models = vec![MODEL.into()]).await;
    assert_eq!(daemon.engine.loads(), 1);
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&folder);
    config.models = vec!["nobody".into()];
    let (_fake, handle) = Fake::start(config.engine);
    let clock = std::sync::Arc::new(mlxd::clock::SystemClock::new());
    let failed = daemon::serve(handle, &config, clock, unstopped(), |_| panic!("ready")).await;
    assert!(matches!(failed, Err(DaemonError::Preload { .. })));
}

#[tokio::test]
async fn a_token_file_that_others_can_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "secret").unwrap();
    std::fs::set_permissions(&token, PermissionsExt::from_mode(0o644)).unwrap();
    let mut config = config(&folder);
    config.token_file = Some(token);
    let (_fake, handle) = Fake::start(config.engine);
    let clock = std::sync::Arc::new(mlxd::clock::SystemClock::new());
    let failed = daemon::serve(handle, &config, clock, unstopped(), |_| panic!("ready")).await;
    assert!(matches!(failed, Err(DaemonError::Token { .. })));
}
