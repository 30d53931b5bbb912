//! Our own form of calls, for models whose chat templates ignore tools: the instructions that teach it.

use serde_json::json;

use super::Tool;

/// Returns the system text that tells a model which tools it has and how to call them.
#[must_use]
pub fn prompted_instructions(tools: &[Tool], parallel: bool) -> String {
    let mut text = "You can call tools. These are the tools, one JSON object a line:\n<tools>\n".to_owned();
    for Tool { name, description, parameters } in tools {
        let mut function = json!({ "name": name });
        if !description.is_empty() {
            function["description"] = description.as_str().into();
        }
        if !parameters.is_null() {
            function["parameters"] = parameters.clone();
        }
        text += &function.to_string();
        text.push('\n');
    }
    text += "</tools>\nTo call a tool, answer with its name and its arguments in this form and nothing else:\n\
             <tool_call>\n{\"name\": \"NAME\", \"arguments\": {\"ARGUMENT\": VALUE}}\n</tool_call>\n";
    text += if parallel { "To call several tools, repeat the form. " } else { "Call one tool at a time. " };
    text += "The result comes in the next message. If you need no tool, answer without this form.";
    text
}
