//! The daemon itself.

use mlxd_client::v1::{
    CapabilitiesRequest, CapabilitiesResponse, EffectiveSampling, GetStatsRequest, GetStatsResponse,
    MemoryStats, ModelCapabilities, ServerCapabilities,
};
use tonic::{Request, Response, Status};

use super::Fake;
use super::services::server_service_server::ServerService;

#[tonic::async_trait]
impl ServerService for Fake {
    async fn capabilities(
        &self,
        request: Request<CapabilitiesRequest>,
    ) -> Result<Response<CapabilitiesResponse>, Status> {
        let request = self.note("Capabilities", request);
        let server = ServerCapabilities {
            version: "0.1.0".into(),
            mlx_version: "0.0.0".into(),
            device: "none".into(),
            ..ServerCapabilities::default()
        };
        let sampling =
            EffectiveSampling { temperature: self.state().temperature, ..EffectiveSampling::default() };
        let describe = |name: &String| {
            let model = Some(self.model(name)?);
            Ok(ModelCapabilities { model, default_sampling: Some(sampling), ..ModelCapabilities::default() })
        };
        let models = request.models.iter().map(describe).collect::<Result<_, Status>>()?;
        Ok(Response::new(CapabilitiesResponse { server: Some(server), models }))
    }

    async fn get_stats(
        &self,
        request: Request<GetStatsRequest>,
    ) -> Result<Response<GetStatsResponse>, Status> {
        self.note("GetStats", request);
        let memory = MemoryStats {
            budget_bytes: 8_000_000_000,
            weight_bytes: 538_060_032,
            kv_slab_bytes: 48 << 20,
            kv_idle_bytes: 12 << 20,
            process_resident_bytes: 700_000_000,
            ..MemoryStats::default()
        };
        Ok(Response::new(GetStatsResponse {
            uptime: Some(prost_types::Duration { seconds: 3_725, nanos: 0 }),
            requests_total: 12,
            decode_tokens_total: 3456,
            memory: Some(memory),
            sessions: 0,
            ..GetStatsResponse::default()
        }))
    }
}
