//! Sends the requests of one level and times the answers. The driver alone owns the samples; dropping it
//! cancels all running calls.

use std::sync::Arc;
use std::time::Duration;

use mlxd::clock::{Clock as _, Moment, SystemClock};
use mlxd_client::v1::{
    GenerateRequest, OutputOptions, SamplingOptions, StoppingOptions, TokenIds, generate_request,
    stream_generate_response::Event,
};
use mlxd_client::{Client, Error};
use tokio::task::JoinSet;

use super::plan::{Load, Plan, Workload};
use super::row::{Done, Piece, Sample};
use crate::cli::format::seconds;

/// Pause of a client between a failed request and its next one.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Size of a level.
#[derive(Clone, Copy, Debug)]
pub(super) enum Amount {
    /// Number of requests.
    Requests(u64),
    /// Time during which requests start; the level ends when they have ended.
    For(Duration),
}

/// Client of one model of one daemon.
#[derive(Clone)]
pub(super) struct Driver {
    pub(super) client: Client,
    pub(super) model: String,
    pub(super) workload: Arc<Workload>,
    pub(super) clock: Arc<SystemClock>,
}

impl Driver {
    /// Runs a level, adding each sample to `samples` as its request ends. Each `level` has prompts of its
    /// own.
    pub(super) async fn run(&self, level: u64, load: Load, amount: Amount, samples: &mut Vec<Sample>) {
        match load {
            Load::Closed(at_once) => self.closed(level, at_once, amount, samples).await,
            Load::Open(rate) => self.open(level, rate, amount, samples).await,
        }
    }

    async fn closed(&self, level: u64, at_once: u32, amount: Amount, samples: &mut Vec<Sample>) {
        let start = self.clock.now();
        let mut running = JoinSet::new();
        let mut next = 0;
        loop {
            let more = match amount {
                Amount::Requests(count) => next < count,
                Amount::For(length) => self.clock.now() - start < length,
            };
            if more && running.len() < at_once as usize {
                self.spawn(&mut running, level, next);
                next += 1;
            } else if let Some(sample) = running.join_next().await {
                // A task ends only by returning its sample: none is aborted meanwhile.
                let failed = sample.as_ref().is_ok_and(|sample| sample.outcome.is_err());
                samples.extend(sample);
                if failed {
                    // Avoids a busy loop against a server that refuses immediately.
                    tokio::time::sleep(AFTER_FAILURE).await;
                }
            } else {
                return;
            }
        }
    }

    async fn open(&self, level: u64, rate: f64, amount: Amount, samples: &mut Vec<Sample>) {
        let start = self.clock.now();
        let mut running = JoinSet::new();
        for (number, at) in (0..).zip(self.workload.arrivals(level, rate)) {
            let over = match amount {
                Amount::Requests(count) => number >= count,
                Amount::For(length) => at >= length,
            };
            if over {
                break;
            }
            tokio::time::sleep(start.after(at) - self.clock.now()).await;
            self.spawn(&mut running, level, number);
            while let Some(sample) = running.try_join_next() {
                samples.extend(sample);
            }
        }
        while let Some(sample) = running.join_next().await {
            samples.extend(sample);
        }
    }

    fn spawn(&self, running: &mut JoinSet<Sample>, level: u64, number: u64) {
        let plan = self.workload.request(level, number);
        let driver = self.clone();
        running.spawn(async move { driver.ask(plan).await });
    }

    async fn ask(&self, plan: Plan) -> Sample {
        let long = plan.long;
        let request = request(&self.model, plan);
        let mut sample =
            Sample { long, start: self.clock.now(), pieces: Vec::new(), outcome: Err(String::new()) };
        sample.outcome = self.listen(request, &mut sample.pieces).await.map_err(|error| reason(&error));
        sample
    }

    async fn listen(&self, request: GenerateRequest, pieces: &mut Vec<Piece>) -> Result<Done, Error> {
        let mut stream = self.client.stream_generate(request).await?;
        let mut done = Done::default();
        while let Some(event) = stream.next_event().await? {
            match event {
                Event::Delta(delta) => {
                    let tokens = u32::try_from(delta.token_ids.len()).unwrap_or(u32::MAX);
                    if tokens > 0 {
                        pieces.push(Piece { at: self.now(), tokens });
                    }
                }
                Event::Finished(end) => {
                    let usage = end.usage.unwrap_or_default();
                    let queue = seconds(end.timings.unwrap_or_default().queue_time.as_ref());
                    done = Done {
                        prompt_tokens: usage.prompt_tokens,
                        cached_tokens: usage.cached_tokens,
                        queue: Duration::try_from_secs_f64(queue).unwrap_or_default(),
                    };
                }
                Event::Started(_) | Event::Progress(_) | Event::ChoiceFinished(_) => {}
            }
        }
        Ok(done)
    }

    fn now(&self) -> Moment {
        self.clock.now()
    }
}

/// Builds a greedy request that ignores end-of-text tokens, so that the answer has the planned length.
fn request(model: &str, plan: Plan) -> GenerateRequest {
    GenerateRequest {
        model: model.to_owned(),
        input: Some(generate_request::Input::TokenIds(TokenIds { ids: plan.prompt })),
        sampling: Some(SamplingOptions { temperature: Some(0.0), ..SamplingOptions::default() }),
        stopping: Some(StoppingOptions {
            max_tokens: Some(plan.output_tokens),
            ignore_eos: true,
            ..StoppingOptions::default()
        }),
        output: Some(OutputOptions { return_token_ids: true, ..OutputOptions::default() }),
        ..GenerateRequest::default()
    }
}

/// Returns the daemon's reason, else the status code of a transport failure.
fn reason(error: &Error) -> String {
    match error {
        Error::Call(call) if !call.reason_name.is_empty() => call.reason_name.clone(),
        Error::Call(call) => format!("{:?}", call.code),
        Error::Connect { .. } | Error::Disconnected { .. } => "DISCONNECTED".into(),
        _ => "INCOMPLETE".into(),
    }
}
