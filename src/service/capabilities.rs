//! What the daemon and its models can do, and what the daemon counts.

use std::sync::Arc;
use std::time::Duration;

use super::Service;
use super::caller::Caller;
use super::fields::model_name;
use super::kv::SnapshotStats;
use super::models::{ModelInfo, hide};
use super::saves::SaveStats;
use crate::engine::{Counters, DeviceInfo, EngineStats};
use crate::error::Error;
use crate::hub::ModelAssets;
use crate::ids::ModelName;
use crate::output::{Format, Reasoning};
use crate::session::SessionTotals;
use crate::text::{ChatTemplate, ENABLE_THINKING};

/// Models that one call may ask about.
const MODELS_MAX: u32 = 100;

/// Something a server or model can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it; the contract describes each")]
pub enum Feature {
    Streaming,
    Chat,
    Tools,
    Logprobs,
    Score,
    Sessions,
    Seed,
    SystemPrompt,
    Thinking,
    StructuredOutput,
    Reasoning,
    ToolCalls,
}

impl Feature {
    /// Everything this daemon implements.
    pub const ALL: [Self; 12] = [
        Self::Streaming,
        Self::Chat,
        Self::Tools,
        Self::Logprobs,
        Self::Score,
        Self::Sessions,
        Self::Seed,
        Self::SystemPrompt,
        Self::Thinking,
        Self::StructuredOutput,
        Self::Reasoning,
        Self::ToolCalls,
    ];
}

/// A model's capabilities.
#[derive(Debug)]
pub struct ModelCapabilities {
    /// Its facts.
    pub info: ModelInfo,
    /// Its template, end tokens and default sampling values.
    pub assets: Arc<ModelAssets>,
    /// Its features.
    pub features: Vec<Feature>,
    /// What it writes beside text.
    pub forms: FormNames,
    /// Tokens a request gets if it does not say.
    pub max_tokens: u32,
}

/// How a model writes what is not text, and how that is turned on; empty where it is not known.
#[derive(Clone, Copy, Debug, Default)]
pub struct FormNames {
    /// The form of its tool calls.
    pub tools: &'static str,
    /// That of its reasoning.
    pub reasoning: &'static str,
    /// The template's argument that turns reasoning on and off.
    pub reasoning_switch: &'static str,
    /// Whether the template reads how much is to be reasoned.
    pub reasoning_effort: bool,
}

/// The daemon's counts.
#[derive(Debug)]
pub struct Stats {
    /// Time since the daemon's start.
    pub uptime: Duration,
    /// Sessions that the caller may know of.
    pub sessions: SessionTotals,
    /// What of them is on disk.
    pub saves: SaveStats,
    /// What of their KV caches is on disk.
    pub snapshots: SnapshotStats,
    /// Resident bytes of the process as Linux counts them; 0 elsewhere.
    pub process_resident_bytes: u64,
    /// The engine's counts.
    pub engine: EngineStats,
}

impl Service {
    /// Returns what the engine runs on.
    #[must_use]
    pub fn device(&self) -> &DeviceInfo {
        self.engine.device()
    }

    /// Returns what the named models can do, or the resident ones if none is named, and the byte budget for
    /// all of them.
    ///
    /// # Errors
    /// A name is refused, or a model's files cannot be used.
    pub async fn capabilities(
        &self,
        caller: &Caller,
        models: &[String],
    ) -> Result<(Vec<ModelCapabilities>, u64), Error> {
        if models.len() > MODELS_MAX as usize {
            return Err(Error::field("models", format!("at most {MODELS_MAX} entries")));
        }
        let EngineStats { budget_bytes, models: resident, .. } = self.engine.stats().await?;
        let names: Vec<ModelName> = if models.is_empty() {
            resident.into_iter().map(|resident| resident.model).collect()
        } else {
            let named = models.iter().enumerate();
            let named = named.map(|(index, name)| model_name(&format!("models[{index}]"), name));
            named.collect::<Result<_, _>>()?
        };
        let mut models = Vec::with_capacity(names.len());
        for name in names {
            let assets = self.models.assets(&name).await?;
            let mut info = [self.models.describe(&name).await?];
            self.count_sessions(caller, &mut info);
            let [info] = info;
            models.push(self.model_capabilities(assets, info));
        }
        Ok((models, budget_bytes))
    }

    fn model_capabilities(&self, assets: Arc<ModelAssets>, info: ModelInfo) -> ModelCapabilities {
        let template = assets.chat_template.as_ref().ok();
        let has = |feature: &Feature| match feature {
            Feature::Chat => template.is_some(),
            Feature::Tools => template.is_some_and(ChatTemplate::writes_tools),
            Feature::SystemPrompt => template.is_some_and(ChatTemplate::writes_system),
            Feature::Thinking => {
                template.is_some_and(|template| template.thinking_switch() == Some(ENABLE_THINKING))
            }
            Feature::Reasoning => assets.forms.reasoning.is_some(),
            Feature::ToolCalls => assets.forms.tools.is_some(),
            Feature::Streaming
            | Feature::Logprobs
            | Feature::Score
            | Feature::Sessions
            | Feature::Seed
            | Feature::StructuredOutput => true,
        };
        let features = Feature::ALL.into_iter().filter(has).collect();
        // The shortest input has one token.
        let max_tokens =
            self.limits.max_tokens_default.min(assets.files.facts.context_length.saturating_sub(1));
        let forms = FormNames {
            tools: assets.forms.tools.map_or("", Format::name),
            reasoning: assets.forms.reasoning.map_or("", Reasoning::name),
            reasoning_switch: template.and_then(ChatTemplate::thinking_switch).unwrap_or_default(),
            reasoning_effort: template.is_some_and(ChatTemplate::reads_effort),
        };
        ModelCapabilities { info, features, forms, max_tokens, assets }
    }

    /// Returns what the daemon counts.
    ///
    /// # Errors
    /// The engine is dead.
    pub async fn stats(&self, caller: &Caller) -> Result<Stats, Error> {
        let (engine, is_owner) = (self.engine.stats().await?, caller.is_owner());
        Ok(Stats {
            engine: if is_owner { engine } else { for_others(engine) },
            uptime: self.clock.now() - self.started,
            sessions: self.sessions.totals(caller.counted()),
            saves: self.saves.stats(is_owner),
            snapshots: self.snapshots.stats(is_owner),
            process_resident_bytes: if is_owner { process_resident_bytes() } else { 0 },
        })
    }
}

/// Leaves of the engine's counts what says how busy it is. What is cached and how much was computed would
/// tell of others' sessions and prompts.
fn for_others(stats: EngineStats) -> EngineStats {
    let EngineStats { counters, budget_bytes, memory: _, snapshot_bytes: _, mut models } = stats;
    models.iter_mut().for_each(hide);
    let counters = Counters {
        prefill_tokens_total: 0,
        cached_tokens_total: 0,
        decode_tokens_total: 0,
        steps_total: 0,
        snapshots_dropped_total: 0,
        ..counters
    };
    EngineStats { counters, budget_bytes, models, ..EngineStats::default() }
}

fn process_resident_bytes() -> u64 {
    let Ok(pages) = std::fs::read_to_string("/proc/self/statm") else { return 0 };
    let resident = pages.split_whitespace().nth(1).and_then(|count| count.parse::<u64>().ok());
    resident.unwrap_or(0) * rustix::param::page_size() as u64
}
