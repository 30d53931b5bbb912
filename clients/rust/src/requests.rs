//! Constructors of common requests. The messages are plain structs, so everything else is
//! `GenerateRequest { model: "…".into(), ..GenerateRequest::chat("…") }`.

use crate::v1::{
    ChatInput, ChoiceFormat, ContentPart, CountTokensRequest, ExtendSessionRequest, GenerateRequest,
    GenerateResponse, JsonObjectFormat, JsonSchemaFormat, Message, ResponseFormat, Role, ToolChoice,
    ToolChoiceMode, content_part, count_tokens_request, extend_session_request, generate_request,
    response_format, tool_choice,
};

impl GenerateRequest {
    /// Asks a chat model with a single user message.
    #[must_use]
    pub fn chat(text: impl Into<String>) -> Self {
        Self::messages([Message::user(text)])
    }

    /// Continues a conversation, oldest message first.
    #[must_use]
    pub fn messages(messages: impl IntoIterator<Item = Message>) -> Self {
        let chat = ChatInput { messages: messages.into_iter().collect(), ..ChatInput::default() };
        Self { input: Some(generate_request::Input::Chat(chat)), ..Self::default() }
    }

    /// Continues a conversation within its last message, which is the assistant's.
    #[must_use]
    pub fn continuing(messages: impl IntoIterator<Item = Message>) -> Self {
        let messages = messages.into_iter().collect();
        let chat = ChatInput { messages, continue_final_message: true, ..ChatInput::default() };
        Self { input: Some(generate_request::Input::Chat(chat)), ..Self::default() }
    }

    /// Continues raw text, without a chat template.
    #[must_use]
    pub fn prompt(text: impl Into<String>) -> Self {
        Self { input: Some(generate_request::Input::Prompt(text.into())), ..Self::default() }
    }
}

impl ResponseFormat {
    /// Any JSON object.
    #[must_use]
    pub fn json_object() -> Self {
        Self::of(response_format::Format::JsonObject(JsonObjectFormat {}))
    }

    /// JSON that obeys a JSON schema, which is JSON text.
    #[must_use]
    pub fn json_schema(schema: impl Into<String>) -> Self {
        Self::of(response_format::Format::JsonSchema(JsonSchemaFormat { schema: schema.into() }))
    }

    /// Text that a regular expression matches as a whole.
    #[must_use]
    pub fn regex(regex: impl Into<String>) -> Self {
        Self::of(response_format::Format::Regex(regex.into()))
    }

    /// Text of a Lark grammar.
    #[must_use]
    pub fn grammar(grammar: impl Into<String>) -> Self {
        Self::of(response_format::Format::Grammar(grammar.into()))
    }

    /// One of these texts.
    #[must_use]
    pub fn choice(texts: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let texts = texts.into_iter().map(Into::into).collect();
        Self::of(response_format::Format::Choice(ChoiceFormat { texts }))
    }

    fn of(format: response_format::Format) -> Self {
        Self { format: Some(format) }
    }
}

impl ToolChoice {
    /// A rule for all tools, such as [`ToolChoiceMode::Required`]: at least one call.
    #[must_use]
    pub fn mode(mode: ToolChoiceMode) -> Self {
        Self { choice: Some(tool_choice::Choice::Mode(mode.into())) }
    }

    /// The tool of this name has to be called.
    #[must_use]
    pub fn function(name: impl Into<String>) -> Self {
        Self { choice: Some(tool_choice::Choice::Function(name.into())) }
    }
}

impl ExtendSessionRequest {
    /// Adds messages to a session, oldest first.
    #[must_use]
    pub fn messages(session: impl Into<String>, messages: impl IntoIterator<Item = Message>) -> Self {
        let chat = ChatInput { messages: messages.into_iter().collect(), ..ChatInput::default() };
        let input = Some(extend_session_request::Input::Chat(chat));
        Self { name: session.into(), input, ..Self::default() }
    }

    /// Adds raw text to a session.
    #[must_use]
    pub fn prompt(session: impl Into<String>, text: impl Into<String>) -> Self {
        let input = Some(extend_session_request::Input::Prompt(text.into()));
        Self { name: session.into(), input, ..Self::default() }
    }
}

impl CountTokensRequest {
    /// Counts the tokens of raw text.
    #[must_use]
    pub fn prompt(text: impl Into<String>) -> Self {
        Self { input: Some(count_tokens_request::Input::Prompt(text.into())), ..Self::default() }
    }
}

impl GenerateResponse {
    /// Returns the answer as a message, with its reasoning and tool calls, for the next request.
    #[must_use]
    pub fn to_message(&self) -> Message {
        let (reasoning, tool_calls) = (self.reasoning.clone(), self.tool_calls.clone());
        Message { reasoning, tool_calls, ..Message::assistant(self.text.as_str()) }
    }
}

impl Message {
    /// A message of the user.
    #[must_use]
    pub fn user(text: impl Into<String>) -> Self {
        Self::of(Role::User, text)
    }

    /// A message with instructions to the model.
    #[must_use]
    pub fn system(text: impl Into<String>) -> Self {
        Self::of(Role::System, text)
    }

    /// A message of the model.
    #[must_use]
    pub fn assistant(text: impl Into<String>) -> Self {
        Self::of(Role::Assistant, text)
    }

    /// The result of the tool call with this id.
    #[must_use]
    pub fn tool(call_id: impl Into<String>, result: impl Into<String>) -> Self {
        Self { tool_call_id: call_id.into(), ..Self::of(Role::Tool, result) }
    }

    /// Returns the message's text: its parts, joined.
    #[must_use]
    pub fn text(&self) -> String {
        self.content
            .iter()
            .filter_map(|part| part.part.as_ref())
            .map(|content_part::Part::Text(text)| text.as_str())
            .collect()
    }

    fn of(role: Role, text: impl Into<String>) -> Self {
        let part = ContentPart { part: Some(content_part::Part::Text(text.into())) };
        Self { role: role.into(), content: vec![part], ..Self::default() }
    }
}
