//! Options of `generate`, `chat` and `run` about what a model does beside text: tools, and reasoning.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use mlxd_client::v1::{
    GenerateRequest, ReasoningOptions, ToolChoice, ToolChoiceMode, ToolDefinition, ToolFormat,
    generate_request::Input,
};
use serde_json::Value;

use super::failure::{Failure, Result, read_text};

/// Options about tools and reasoning.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Tools and reasoning")]
pub(crate) struct AskingArgs {
    /// Offer the tools in a JSON file: one, or a list, as OpenAI writes them; may be repeated. Calls are
    /// printed as JSON, one on a line
    #[arg(long = "tool", alias = "tools", value_name = "FILE")]
    tools: Vec<PathBuf>,
    /// Describe the tools in a text, for chat templates that write none
    #[arg(long)]
    prompt_tools: bool,
    /// Whether the answer calls tools: auto, none, required, or the name of the one to call
    #[arg(long, value_name = "CHOICE")]
    tool_choice: Option<String>,
    /// Turn reasoning on or off, where the chat template has a switch for it
    #[arg(long, value_enum, value_name = "WHETHER")]
    thinking: Option<Thinking>,
    /// Most tokens of reasoning, after which the model answers
    #[arg(long, value_name = "N")]
    reasoning_budget: Option<u32>,
    /// How much to reason, in the chat template's words
    #[arg(long, value_name = "HOW")]
    reasoning_effort: Option<String>,
}

/// Whether a model reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Thinking {
    /// It reasons before it answers
    On,
    /// It answers at once
    Off,
}

impl AskingArgs {
    /// Copies the options into `request`, which is a chat.
    pub(crate) fn apply(&self, request: &mut GenerateRequest) -> Result<()> {
        let Self { tools, prompt_tools, tool_choice, thinking, reasoning_budget, reasoning_effort } = self;
        let reasoning = ReasoningOptions {
            enabled: thinking.map(|thinking| thinking == Thinking::On),
            budget_tokens: *reasoning_budget,
            effort: reasoning_effort.clone().unwrap_or_default(),
        };
        let has_reasoning = reasoning != ReasoningOptions::default();
        let Some(Input::Chat(chat)) = &mut request.input else {
            if has_reasoning || *prompt_tools || tool_choice.is_some() || !tools.is_empty() {
                let why = "options about tools and reasoning need the chat template: omit --raw";
                return Err(Failure::Usage(why.into()));
            }
            return Ok(());
        };
        request.reasoning = has_reasoning.then_some(reasoning);
        if *prompt_tools {
            chat.set_tool_format(ToolFormat::Prompted);
        }
        chat.tool_choice = tool_choice.as_deref().map(choice);
        for file in tools {
            chat.tools.extend(definitions(file, &read_text(file)?)?);
        }
        Ok(())
    }
}

/// Returns the choice that a word says.
fn choice(word: &str) -> ToolChoice {
    match word {
        "auto" => ToolChoice::mode(ToolChoiceMode::Auto),
        "none" => ToolChoice::mode(ToolChoiceMode::None),
        "required" => ToolChoice::mode(ToolChoiceMode::Required),
        name => ToolChoice::function(name),
    }
}

/// Returns the tools in a file.
fn definitions(file: &Path, text: &str) -> Result<Vec<ToolDefinition>> {
    let refuse = |why: &str| Failure::Usage(format!("{}: {why}", file.display()));
    let tools = match serde_json::from_str(text).map_err(|error| refuse(&error.to_string()))? {
        Value::Array(tools) => tools,
        tool => vec![tool],
    };
    let definition = |tool: &Value| {
        let function = tool.get("function").unwrap_or(tool);
        let text = |name: &str| function.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let parameters = function.get("parameters").filter(|parameters| !parameters.is_null());
        ToolDefinition {
            name: text("name"),
            description: text("description"),
            parameters_json: parameters.map(ToString::to_string).unwrap_or_default(),
        }
    };
    let tools: Vec<ToolDefinition> = tools.iter().map(definition).collect();
    if tools.iter().any(|tool| tool.name.is_empty()) {
        return Err(refuse("a tool has no name"));
    }
    Ok(tools)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_one_tool_or_a_list_of_them() {
        let bare = r#"{"name": "f", "parameters": {"type": "object"}}"#;
        let wrapped = format!(r#"[{{"type": "function", "function": {bare}}}, {bare}]"#);
        let read = |text: &str| definitions(Path::new("t.json"), text);
        assert_eq!(read(&wrapped).unwrap(), [read(bare).unwrap(), read(bare).unwrap()].concat());
        assert_eq!(read(bare).unwrap()[0].parameters_json, r#"{"type":"object"}"#);
        for wrong in ["{}", "[1]", "{", r#"{"function": {"name": ""}}"#] {
            assert!(
                matches!(read(wrong), Err(Failure::Usage(why)) if why.starts_with("t.json: ")),
                "{wrong}"
            );
        }
    }

    #[test]
    fn a_raw_prompt_takes_no_tools() {
        let mut raw = GenerateRequest::prompt("a");
        assert!(AskingArgs::default().apply(&mut raw).is_ok());
        let asking = AskingArgs { thinking: Some(Thinking::Off), ..AskingArgs::default() };
        assert!(matches!(asking.apply(&mut raw), Err(Failure::Usage(_))));
        let mut chat = GenerateRequest::chat("a");
        asking.apply(&mut chat).unwrap();
        assert_eq!(chat.reasoning.unwrap().enabled, Some(false));
    }
}
