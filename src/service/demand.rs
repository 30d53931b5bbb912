//! What an answer is held to, and where in the output that begins: calls, where the caller demands one, or
//! the form that a request names. Where the model reasons first, it begins behind that.

use std::sync::Arc;

use super::answer::Plan;
use super::caller::Caller;
use super::chat::{Chat, TOOL_CHOICE, ToolChoice};
use super::format::ResponseFormat;
use super::{Service, blocking};
use crate::engine::{Barred, Constraint, Reading, Starts};
use crate::error::Error;
use crate::grammar::{Grammar, Source};
use crate::hub::ModelAssets;
use crate::output::{Format, NoGrammar, Reasoning, Start, Tool};

/// Path of the tools that the grammar of calls is made of.
const TOOLS: &str = "chat.tools";

/// Calls that an answer has to make.
pub(super) struct Demand {
    format: Format,
    tools: Vec<Tool>,
    parallel: bool,
}

impl Demand {
    /// Returns the calls that a chat demands, if it does.
    ///
    /// # Errors
    /// It is not known how the model writes them.
    pub(super) fn of(chat: &Chat, plan: &Plan) -> Result<Option<Self>, Error> {
        let tools = match &chat.tool_choice {
            Some(ToolChoice::Required) => plan.tools.to_vec(),
            Some(ToolChoice::Function(name)) => {
                plan.tools.iter().filter(|tool| tool.name == *name).cloned().collect()
            }
            Some(ToolChoice::Auto | ToolChoice::None) | None => return Ok(None),
        };
        let refuse = |why| Err(Error::field(TOOL_CHOICE, why));
        let Some(format) = plan.syntax.format else {
            return refuse(
                "it is not known how the model writes calls; tool_format PROMPTED is for any model",
            );
        };
        if plan.syntax.reasoning == Some(Reasoning::Harmony) && !format.reasons_itself() {
            return refuse("a model that reasons in Harmony can be made to call in Harmony only");
        }
        Ok(Some(Self { format, tools, parallel: !plan.one_call }))
    }

    /// Returns the grammar of the calls, or of the whole output where that is one with its reasoning.
    ///
    /// # Errors
    /// The format has none for these tools.
    pub(super) async fn source(self, start: Start, assets: &Arc<ModelAssets>) -> Result<Source, Error> {
        let assets = Arc::clone(assets);
        blocking(move || {
            let Self { format, tools, parallel } = self;
            let tokenizer = &assets.tokenizer;
            let is_special = |id: &u32| tokenizer.is_control(*id) || assets.eos_token_ids.contains(id);
            let special = |marker: &str| {
                tokenizer.token_id(marker).filter(|id| *id < assets.vocabulary_size && is_special(id))
            };
            let grammar = format.output_grammar(&tools, parallel, &special, start);
            grammar.map(Source::Lark).map_err(|why| match why {
                NoGrammar::Empty | NoGrammar::Name { .. } | NoGrammar::Argument { .. } => {
                    Error::field(TOOLS, why.to_string())
                }
                NoGrammar::TooLarge { .. } => Error::field(TOOL_CHOICE, why.to_string()),
            })
        })
        .await
    }

    /// Returns whether its grammar is that of the whole output.
    pub(super) fn is_whole(&self) -> bool {
        self.format.reasons_itself()
    }
}

impl Service {
    /// Returns what the outputs of a prompt are held to: the calls that it demands, or a form.
    ///
    /// # Errors
    /// The grammar is refused.
    pub(super) async fn held_to(
        &self,
        caller: &Caller,
        assets: &Arc<ModelAssets>,
        (demanded, format): (Option<Source>, Option<ResponseFormat>),
        thinks_first: Option<ThinksFirst>,
    ) -> Result<Option<Constraint>, Error> {
        let demanded = demanded.map(|source| (TOOLS, source));
        let named = demanded.or_else(|| format.map(|format| (format.field(), format.into_source())));
        let Some(named) = named else { return Ok(None) };
        let grammar = self.grammar(caller, assets, named).await?;
        let starts = match thinks_first {
            Some(first) => first.starts(&grammar).await?,
            None => Starts::Immediately,
        };
        Ok(Some(Constraint { grammar, starts }))
    }
}

/// Reasoning that comes before an answer.
#[derive(Debug)]
pub(super) struct ThinksFirst {
    /// The tokens that begin it; none if it is under way.
    opening: Vec<u32>,
    /// The tokens that end an output.
    ends: Vec<u32>,
    /// The marker that closes it.
    close: &'static str,
}

impl ThinksFirst {
    /// Returns where a grammar starts then.
    async fn starts(self, grammar: &Arc<Grammar>) -> Result<Starts, Error> {
        let grammar = Arc::clone(grammar);
        blocking(move || {
            let Self { opening, ends, close } = self;
            let barred = Barred { ends, closing: grammar.ending_within(close) };
            Ok(Starts::AfterReasoning { opening: opening.into(), barred: Arc::new(barred) })
        })
        .await
    }
}

/// What is known of an output's reasoning before it.
pub(super) struct Lead {
    /// How the model marks it.
    way: Option<Reasoning>,
    /// Whether the model may begin it by itself.
    may_open: bool,
}

impl Lead {
    pub(super) fn of(chat: &Chat, plan: &Plan) -> Self {
        let may_open = chat.reasoning.enabled != Some(false) && !chat.continue_final_message;
        Self { way: plan.syntax.reasoning, may_open }
    }

    /// Returns the reasoning before an answer that is read so, behind a prompt that ends with `end`.
    pub(super) fn thinks_first(
        &self,
        reading: Option<&Reading>,
        end: &str,
        assets: &ModelAssets,
    ) -> Option<ThinksFirst> {
        let (reading, way) = (reading?, self.way?);
        let first = |opening| {
            // Those of Harmony are tokens of their own.
            let close = if way == Reasoning::Harmony { "" } else { way.close() };
            Some(ThinksFirst { opening, ends: assets.eos_token_ids.clone(), close })
        };
        if !reading.parser.speaks() {
            return first(Vec::new());
        }
        if !self.may_open || end.trim_end().ends_with(way.closing().trim()) {
            return None;
        }
        // What the tokenizer cannot write, or the model, does not come.
        let opening = assets.tokenizer.encode_more(way.opening().trim_end()).ok()?;
        let can_be_drawn = |ids: &[u32]| !ids.is_empty() && ids.iter().all(|id| *id < assets.vocabulary_size);
        if can_be_drawn(&opening) { first(opening) } else { None }
    }
}
