//! `grpc.health.v1`: one entry for the daemon and one for each service; all show the engine's health.

use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::{Health as HealthService, HealthServer};
use tonic_health::server::HealthReporter;

use super::inference::Inference;
use super::model::Models;
use super::pb::{
    inference_service_server::InferenceServiceServer, model_service_server::ModelServiceServer,
    server_service_server::ServerServiceServer, session_service_server::SessionServiceServer,
};
use super::server::Server;
use super::session::Sessions;

/// The entries; "" is the daemon itself.
const SERVICES: [&str; 5] = [
    "",
    <InferenceServiceServer<Inference> as NamedService>::NAME,
    <ModelServiceServer<Models> as NamedService>::NAME,
    <SessionServiceServer<Sessions> as NamedService>::NAME,
    <ServerServiceServer<Server> as NamedService>::NAME,
];

/// Tells callers whether the daemon serves.
#[derive(Clone, Debug)]
pub struct Health(HealthReporter);

impl Health {
    pub(super) fn new() -> (Self, HealthServer<impl HealthService>) {
        let (reporter, service) = tonic_health::server::health_reporter();
        (Self(reporter), service)
    }

    /// Sets every entry.
    pub async fn set(&self, is_serving: bool) {
        let status = if is_serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in SERVICES {
            self.0.set_service_status(service, status).await;
        }
    }
}
