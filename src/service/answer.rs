//! What a model's answer is beside text: how its output is read, the message that it becomes in its session,
//! and how messages with reasoning are given to the chat template.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::chat::{Chat, ReasoningOptions};
use crate::count::common_start;
use crate::engine::{Reading, ReasoningBudget};
use crate::error::Error;
use crate::hub::ModelForms;
use crate::output::{
    Collected, Format, Parser, Piece, Reasoning, Start, Syntax, Tool, prompted_instructions,
};
use crate::session::{AnswerForms, Message, Part, Role, ToolCall};
use crate::text::{ChatTemplate, EFFORT, Tokenizer};

/// Bytes at a prompt's end that say whether reasoning has begun there.
const PROMPT_END_BYTES: usize = 1024;

/// Returns how the output of a chat is read.
///
/// # Errors
/// Reasoning is bounded, or calls are, whose form is not known.
pub(super) fn plan(forms: ModelForms, chat: &Chat, tokenizer: &Tokenizer) -> Result<Plan, Error> {
    let ModelForms { tools, reasoning } = forms;
    let offered = chat.offered_tools();
    let format = if prompts(forms, chat) { Some(Format::Prompted) } else { tools };
    let format = format.filter(|_| !offered.is_empty());
    let budget = match (chat.reasoning.budget_tokens, reasoning) {
        (None, _) => None,
        (Some(_), None) => {
            let why = "it is not known how the model marks its reasoning";
            return Err(Error::field("reasoning.budget_tokens", why));
        }
        (Some(tokens), Some(form)) => {
            let closing = if chat.demands_calls() { form.closing_before_call() } else { form.closing() };
            let closing = tokenizer.encode_more(closing);
            let closing =
                closing.map_err(|error| Error::field("reasoning.budget_tokens", error.to_string()))?;
            Some(ReasoningBudget { tokens, closing: closing.into() })
        }
    };
    let one_call = chat.parallel_tool_calls == Some(false);
    if one_call && format.is_none() && !offered.is_empty() {
        let why = "it is not known how the model writes calls; tool_format PROMPTED is for any model";
        return Err(Error::field("chat.parallel_tool_calls", why));
    }
    let last = chat.messages.last().filter(|_| chat.continue_final_message);
    let continued = last.map(Message::joined_text);
    Ok(Plan { syntax: Syntax { format, reasoning }, tools: described(offered), one_call, budget, continued })
}

/// Returns whether the tools of a chat, calls and results are written as text.
pub(super) fn prompts(forms: ModelForms, chat: &Chat) -> bool {
    chat.prompts_tools || forms.tools == Some(Format::Prompted)
}

/// Returns the text that tells a model of the tools that it is offered; empty for none.
pub(super) fn instructions(chat: &Chat) -> String {
    match chat.offered_tools() {
        [] => String::new(),
        offered => prompted_instructions(&described(offered), chat.parallel_tool_calls != Some(false)),
    }
}

fn described(tools: &[super::chat::Tool]) -> Arc<[Tool]> {
    let described = tools.iter().map(|tool| Tool {
        name: tool.name.clone(),
        description: tool.description.clone(),
        parameters: Value::Object(tool.parameters.clone()),
    });
    described.collect()
}

/// How the output of a chat is read, before its prompt is known.
pub(super) struct Plan {
    pub(super) syntax: Syntax,
    pub(super) tools: Arc<[Tool]>,
    pub(super) one_call: bool,
    pub(super) budget: Option<ReasoningBudget>,
    /// The model's own words that it goes on with.
    pub(super) continued: Option<String>,
}

/// Returns how an output is read after a prompt, None if all of it is text; and what its session is told of
/// that.
pub(super) fn reading(plan: Plan, prompt: &str) -> (Option<Box<Reading>>, AnswerForms) {
    let Plan { syntax, tools, one_call, budget, continued } = plan;
    if syntax == Syntax::default() {
        return (None, AnswerForms::default());
    }
    let end = &prompt[prompt.floor_char_boundary(prompt.len().saturating_sub(PROMPT_END_BYTES))..];
    let start = syntax.reasoning.map_or(Start::Text, |reasoning| reasoning.start_after(end));
    let forms = AnswerForms {
        tools: syntax.format.map(|format| format.name().into()),
        reasoning: syntax.reasoning.map(|reasoning| reasoning.name().into()),
        begins_reasoning: start == Start::Reasoning,
    };
    let parser = match &continued {
        Some(words) => Parser::continuing(syntax, tools, words),
        None => Parser::new(syntax, tools, start),
    };
    let calls = syntax.format.is_some();
    (Some(Box::new(Reading { parser, calls, one_call, budget })), forms)
}

/// Returns what remains of an answer, which is written in these forms, once its output is cut to `text`: it
/// says nothing that the answer did not, and its whole calls are as they were. The tools that those were read
/// by are not known any more, but their names.
pub(super) fn shortened(answer: &Message, forms: &AnswerForms, text: &str) -> Message {
    let AnswerForms { tools, reasoning, begins_reasoning } = forms;
    // A form that is unknown was stored by another version.
    let syntax = Syntax {
        format: tools.as_deref().and_then(Format::from_name),
        reasoning: reasoning.as_deref().and_then(Reasoning::from_name),
    };
    if syntax == Syntax::default() {
        return Message::text(Role::Assistant, text);
    }
    let start = if *begins_reasoning { Start::Reasoning } else { Start::Text };
    let tool = |call: &ToolCall| Tool {
        name: call.name.clone(),
        description: String::new(),
        parameters: Value::Null,
    };
    let mut parser = Parser::new(syntax, answer.tool_calls().map(tool).collect(), start);
    let mut pieces = parser.push(text);
    pieces.extend(parser.finish(true));
    let mut said = Collected::default();
    for piece in &pieces {
        said.add(piece);
        if matches!(piece, Piece::CallEnd { .. }) {
            // White space before a call is dropped from an output too.
            said.text.truncate(said.text.trim_end().len());
        }
    }
    let calls = answer.tool_calls().take(said.calls.len()).cloned().map(Part::ToolCall).collect();
    message(
        same_start(said.reasoning, &answer.reasoning()),
        same_start(said.text, &answer.joined_text()),
        calls,
    )
}

/// Returns a text up to where it begins to differ from another.
fn same_start(mut text: String, other: &str) -> String {
    let same = common_start(text.as_bytes(), other.as_bytes());
    text.truncate(text.floor_char_boundary(same));
    text
}

/// Returns an answer's message.
fn message(reasoning: String, text: String, calls: Vec<Part>) -> Message {
    let mut parts = Vec::with_capacity(calls.len() + 2);
    if !reasoning.is_empty() {
        parts.push(Part::Reasoning(reasoning));
    }
    if !text.is_empty() || (parts.is_empty() && calls.is_empty()) {
        parts.push(Part::Text(text));
    }
    parts.extend(calls);
    Message { role: Role::Assistant, name: String::new(), parts }
}

/// An answer as far as it has come, for its session.
#[derive(Default)]
pub(super) struct Answer(Collected);

impl Answer {
    pub(super) fn add(&mut self, piece: &Piece) {
        self.0.add(piece);
    }

    pub(super) fn add_text(&mut self, text: &str) {
        self.0.text.push_str(text);
    }

    pub(super) fn add_reasoning(&mut self, text: &str) {
        self.0.reasoning.push_str(text);
    }

    /// Returns the message that it is; `ids` are those of its calls, in order.
    pub(super) fn into_message(self, ids: Vec<String>) -> Message {
        let Self(collected) = self;
        let calls = collected.calls.iter().zip(ids).map(|(call, id)| {
            let arguments = serde_json::from_str::<Map<String, Value>>(&call.arguments).unwrap_or_default();
            Part::ToolCall(ToolCall { id, name: call.name.clone(), arguments })
        });
        let calls: Vec<Part> = calls.collect();
        let Collected { text, reasoning, .. } = collected;
        message(reasoning, text, calls)
    }
}

/// Returns messages as a template reads them; the first `held` are a session's. Where it does not read
/// reasoning, that stands before the text, in the model's own marks, as the model wrote it.
pub(super) fn template_values<'a>(
    messages: impl Iterator<Item = &'a Message>,
    held: usize,
    template: Option<&ChatTemplate>,
    forms: ModelForms,
) -> Result<Vec<Value>, Error> {
    let keeps = template.is_none_or(ChatTemplate::reads_reasoning);
    let joins = template.is_some_and(ChatTemplate::joins_reasoning);
    let value = |(index, message): (usize, &Message)| {
        let mut value = message.to_template_value();
        if keeps {
            if joins && value.get("tool_calls").is_some() {
                join_reasoning(&mut value);
            }
            return Ok(value);
        }
        let Some(Value::String(reasoning)) =
            value.as_object_mut().and_then(|fields| fields.remove("reasoning"))
        else {
            return Ok(value);
        };
        match forms.reasoning {
            Some(form) => {
                let content = value["content"].as_str().unwrap_or_default();
                value["content"] = [form.opening(), &reasoning, form.closing(), content].concat().into();
            }
            None if index >= held => {
                let why = "neither the model nor its chat template has a place for it";
                return Err(Error::field(format!("chat.messages[{}].reasoning", index - held), why));
            }
            // The model wrote it before its forms were turned off.
            None => {}
        }
        Ok(value)
    };
    messages.enumerate().map(value).collect()
}

/// Puts the text of a message behind its reasoning, if it has both.
fn join_reasoning(value: &mut Value) {
    let text = |name: &str| value[name].as_str().filter(|text| !text.is_empty());
    if let (Some(reasoning), Some(content)) = (text("reasoning"), text("content")) {
        let joined = [reasoning, "\n\n", content].concat();
        (value["reasoning"], value["content"]) = (joined.into(), "".into());
    }
}

/// Adds to the template's arguments what a request says about reasoning.
pub(super) fn switch(
    arguments: &mut Map<String, Value>,
    reasoning: &ReasoningOptions,
    template: &ChatTemplate,
) -> Result<(), Error> {
    let ReasoningOptions { enabled, effort, budget_tokens: _ } = reasoning;
    let mut set = |field: &str, name: Option<&str>, value: Value| {
        let path = format!("reasoning.{field}");
        let Some(name) = name else {
            return Err(Error::field(path, "the model's chat template has no switch for it"));
        };
        match arguments.insert(name.to_owned(), value) {
            None => Ok(()),
            Some(_) => Err(Error::field(path, format!("chat.template_arguments sets {name} too"))),
        }
    };
    if let Some(enabled) = *enabled {
        set("enabled", template.thinking_switch(), enabled.into())?;
    }
    if !effort.is_empty() {
        set("effort", template.reads_effort().then_some(EFFORT), effort.as_str().into())?;
    }
    Ok(())
}
