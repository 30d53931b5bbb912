//! What an answer is held to, and where in the output that begins: calls, where the caller demands one, or
//! the form that a request names. Where the model reasons first, it begins behind that.

use std::sync::Arc;

use super::answer::Plan;
use super::caller::Caller;
use super::chat::{Chat, TOOL_CHOICE, ToolChoice};
use super::format::ResponseFormat;
use super::generation::Context;
use super::{Service, blocking};
use crate::engine::{Constraint, Reading, Starts};
use crate::error::Error;
use crate::grammar::Source;
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
        (context, format): (&mut Context, Option<ResponseFormat>),
        outputs: u32,
    ) -> Result<Vec<Constraint>, Error> {
        let demanded = context.demanded.take().map(|source| (TOOLS, source));
        match demanded.or_else(|| format.map(|format| (format.field(), format.into_source()))) {
            Some(named) => self.constraints(caller, assets, named, (context.starts.clone(), outputs)).await,
            None => Ok(Vec::new()),
        }
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

    /// Returns where the answer begins in an output that is read so, behind a prompt that ends with `end`.
    pub(super) fn starts(&self, reading: Option<&Reading>, end: &str, assets: &ModelAssets) -> Starts {
        let Some(reading) = reading else { return Starts::Immediately };
        let ends = || assets.eos_token_ids.clone().into();
        if !reading.parser.speaks() {
            return Starts::AfterReasoning { opening: Arc::default(), ends: ends() };
        }
        let is_over = |way: &Reasoning| end.trim_end().ends_with(way.closing().trim());
        let way = self.way.filter(|way| self.may_open && !is_over(way));
        // What the tokenizer cannot write, the model cannot either.
        let opening = way.and_then(|way| assets.tokenizer.encode_more(way.opening().trim_end()).ok());
        match opening.filter(|opening| !opening.is_empty()) {
            Some(opening) => Starts::AfterReasoning { opening: opening.into(), ends: ends() },
            None => Starts::Immediately,
        }
    }
}
