//! All gRPC services together: those of the contract, health and reflection.

use std::sync::Arc;

use tonic::service::Routes;

use super::inference::Inference;
use super::model::Models;
use super::pb::{
    self, inference_service_server::InferenceServiceServer, model_service_server::ModelServiceServer,
    server_service_server::ServerServiceServer, session_service_server::SessionServiceServer,
};
use super::server::Server;
use super::session::Sessions;

pub use super::health::Health;
use crate::limits::Limits;
use crate::service::Service;

/// Limit of a question about the contract: a name.
const REFLECTION_BYTES_MAX: usize = 64 << 10;

/// Returns the services of the contract, health and reflection.
///
/// # Errors
/// The descriptor set of the build is damaged.
pub fn routes(service: &Arc<Service>) -> Result<(Routes, Health), tonic_reflection::server::Error> {
    let Limits { message_bytes_max, answer_bytes_max, .. } = *service.limits();
    macro_rules! sized {
        ($server:ident, $calls:expr) => {
            $server::new($calls)
                .max_decoding_message_size(message_bytes_max)
                .max_encoding_message_size(answer_bytes_max)
        };
    }
    let (health, health_service) = Health::new();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let routes = Routes::new(sized!(InferenceServiceServer, Inference(Arc::clone(service))))
        .add_service(sized!(ModelServiceServer, Models(Arc::clone(service))))
        .add_service(sized!(SessionServiceServer, Sessions(Arc::clone(service))))
        .add_service(sized!(ServerServiceServer, Server(Arc::clone(service))))
        .add_service(health_service)
        .add_service(reflection().build_v1()?.max_decoding_message_size(REFLECTION_BYTES_MAX))
        .add_service(reflection().build_v1alpha()?.max_decoding_message_size(REFLECTION_BYTES_MAX))
        .prepare();
    Ok((routes, health))
}
