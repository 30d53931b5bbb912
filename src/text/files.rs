//! The files of a model that the text modules are made from, already read and within size limits.

use serde_json::Value;

/// Contents by file; `None` where a model has no such file.
#[derive(Clone, Debug, Default)]
pub struct TextFiles {
    /// `tokenizer.json`.
    pub tokenizer: Option<Vec<u8>>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Value>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<Value>,
    /// `chat_template.jinja`.
    pub chat_template: Option<String>,
    /// `additional_chat_templates/tool_use.jinja`.
    pub tool_use_template: Option<String>,
    /// `chat_template.json`.
    pub chat_template_json: Option<Value>,
    /// What is wrong with one of the last three; chat needs them, raw prompts do not.
    pub template_fault: Option<String>,
}
