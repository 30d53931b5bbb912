//! Models: loads take two steps; `owner/huge` never fits.

use std::pin::Pin;

use mlxd_client::v1::{
    GetModelRequest, GetModelResponse, ListModelsRequest, ListModelsResponse, LoadModelRequest,
    LoadModelResponse, LoadPhase, LoadProgress, LoadValidated, ModelLoaded, ModelState, UnloadModelRequest,
    UnloadModelResponse, load_model_response::Event,
};
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status};

use super::services::model_service_server::ModelService;
use super::{Fake, refusal};

#[tonic::async_trait]
impl ModelService for Fake {
    type LoadModelStream = Pin<Box<dyn Stream<Item = Result<LoadModelResponse, Status>> + Send>>;

    async fn load_model(
        &self,
        request: Request<LoadModelRequest>,
    ) -> Result<Response<Self::LoadModelStream>, Status> {
        let request = self.note("LoadModel", request);
        let (needed, available) = ("64000000000", "8000000000");
        if request.model == "owner/huge" && !request.validate_only {
            return Err(refusal(
                Code::ResourceExhausted,
                "MEMORY_BUDGET",
                &format!("the model owner/huge needs {needed} bytes; {available} are free"),
                &[("needed_bytes", needed), ("available_bytes", available)],
            ));
        }
        let events = if request.validate_only {
            let fits = request.model != "owner/huge";
            let needed_bytes = if fits { 538_060_032 } else { 64_000_000_000 };
            vec![Event::Validated(LoadValidated {
                fits,
                needed_bytes,
                available_bytes: 8_000_000_000,
                ..LoadValidated::default()
            })]
        } else {
            let mut info = self.model(&request.model)?;
            info.state = ModelState::Resident.into();
            info.computes_in = "float32".into();
            info.weight_bytes = info.file_bytes * 2;
            self.state().models.insert(info.name.clone(), info.clone());
            let progress = |phase: LoadPhase, done_bytes| {
                Event::Progress(LoadProgress {
                    phase: phase.into(),
                    done_bytes,
                    total_bytes: info.file_bytes,
                })
            };
            vec![
                progress(LoadPhase::Downloading, info.file_bytes / 4),
                progress(LoadPhase::Downloading, info.file_bytes),
                progress(LoadPhase::Loading, info.file_bytes / 2),
                progress(LoadPhase::Loading, info.file_bytes),
                progress(LoadPhase::Warming, info.file_bytes),
                Event::Loaded(ModelLoaded { model: Some(info) }),
            ]
        };
        let messages = events.into_iter().map(|event| Ok(LoadModelResponse { event: Some(event) }));
        Ok(Response::new(Box::pin(tokio_stream::iter(messages.collect::<Vec<_>>()))))
    }

    async fn unload_model(
        &self,
        request: Request<UnloadModelRequest>,
    ) -> Result<Response<UnloadModelResponse>, Status> {
        let name = self.note("UnloadModel", request).model;
        let info = self.model(&name)?;
        if info.state() != ModelState::Resident {
            let message = format!("the model {name} is not loaded");
            return Err(refusal(Code::FailedPrecondition, "MODEL_NOT_LOADED", &message, &[]));
        }
        if let Some(info) = self.state().models.get_mut(&name) {
            info.state = ModelState::Available.into();
        }
        Ok(Response::new(UnloadModelResponse { freed_bytes: info.weight_bytes + info.kv_slab_bytes }))
    }

    async fn get_model(
        &self,
        request: Request<GetModelRequest>,
    ) -> Result<Response<GetModelResponse>, Status> {
        let name = self.note("GetModel", request).model;
        // Unlike a daemon: an answer without its model.
        let model = if name == "nothing" { None } else { Some(self.model(&name)?) };
        Ok(Response::new(GetModelResponse { model }))
    }

    async fn list_models(
        &self,
        request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let request = self.note_page("ListModels", request).await;
        let state = self.state();
        let models = state.models.values();
        // One model a page, so that clients must read several.
        let mut rest = models
            .filter(|info| !request.resident_only || info.state() == ModelState::Resident)
            .filter(|info| info.name > request.page_token)
            .cloned();
        let models: Vec<_> = rest.by_ref().take(1).collect();
        let more = rest.next().is_some();
        let last = models.last().filter(|_| more).map(|info| info.name.clone());
        let (next_page_token, problems) = (last.unwrap_or_default(), state.problems.clone());
        Ok(Response::new(ListModelsResponse { models, next_page_token, problems }))
    }
}
