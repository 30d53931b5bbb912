//! What a template does with each part of a conversation, found by rendering short ones: many templates leave
//! out what they do not know, without a word.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

/// The text whose way through a template is followed: a word that no template has.
const WORD: &str = "qjxzvw";
/// The name of the tool of the probes.
const TOOL: &str = "qjxztool";
/// The id of its call: some templates want nine letters and digits.
const CALL: &str = "qjxzcall0";

/// Variables by which makers let a template keep past reasoning, and the value that does (Qwen and Kimi; GLM;
/// Nemotron).
const REASONING_SWITCHES: [(&str, bool); 3] =
    [("preserve_thinking", true), ("clear_thinking", false), ("truncate_history_thinking", false)];

/// The fate of a part of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// The template writes it.
    Written,
    /// The template leaves it out.
    Skipped,
    /// The template fails on it.
    Refused,
}

/// What a template does.
#[derive(Debug)]
pub(super) struct Traits {
    /// Whether contents are lists of parts; a text by itself would be left out.
    pub(super) parts: bool,
    /// Messages of conversations without tools.
    pub(super) roles: Roles,
    /// Those of conversations with tools, for which a model may have a template of its own.
    pub(super) roles_with_tools: Roles,
    /// The definitions of tools.
    pub(super) tools: Fate,
    /// The same where a system message comes first.
    pub(super) tools_with_system: Fate,
    /// The same where a developer message comes first.
    pub(super) tools_with_developer: Fate,
    /// The reasoning of an assistant's message: of the last one, or of one that calls a tool.
    pub(super) reasoning: Fate,
    /// Whether it fails on reasoning beside a text in a message that calls a tool, and not without the text.
    pub(super) joins_reasoning: bool,
    /// What follows the model's answer, up to the end.
    pub(super) after_answer: String,
}

/// The fates of messages.
#[derive(Debug)]
pub(super) struct Roles {
    pub(super) system: Places,
    pub(super) developer: Places,
    /// The result of a tool call.
    pub(super) tool: Fate,
}

/// The fates of a role's messages by their places.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    /// The conversation's first message.
    pub(super) first: Fate,
    /// One that comes later.
    pub(super) late: Fate,
}

/// Renders messages with tools; the last argument says whether contents are lists of parts.
pub(super) type Render<'a> = &'a dyn Fn(&[Value], &[Value], bool) -> Option<String>;

impl Traits {
    /// Finds them out.
    pub(super) fn new(render: Render<'_>) -> Self {
        let user = || message("user", "Hello.");
        let asked = [message("user", WORD)];
        let parts = fate(render(&asked, &[], false), WORD) == Fate::Skipped
            && fate(render(&asked, &[], true), WORD) == Fate::Written;
        let tools = |messages: &[Value]| fate(render(messages, &[tool()], parts), TOOL);
        let reasons = |messages: &[Value], tools: &[Value]| fate(render(messages, tools, parts), WORD);
        let reasoning = match reasons(&[user(), reasoned("Hello.", &[])], &[]) {
            Fate::Written => Fate::Written,
            _ => reasons(&[user(), reasoned("", &[call()]), result("b")], &[tool()]),
        };
        let calls = |text: &str| reasons(&[user(), reasoned(text, &[call()]), result("b")], &[tool()]);
        let joins_reasoning = calls("Hello.") == Fate::Refused && calls("") != Fate::Refused;
        let answered = render(&[user(), message("assistant", WORD)], &[], parts).unwrap_or_default();
        Self {
            parts,
            roles: Roles::new(&|messages| fate(render(messages, &[], parts), WORD)),
            roles_with_tools: Roles::new(&|messages| fate(render(messages, &[tool()], parts), WORD)),
            tools: tools(&[user()]),
            tools_with_system: tools(&[message("system", "Be brief."), user()]),
            tools_with_developer: tools(&[message("developer", "Be brief."), user()]),
            reasoning,
            joins_reasoning,
            after_answer: answered.rsplit_once(WORD).map_or_else(String::new, |(_, after)| after.to_owned()),
        }
    }
}

impl Roles {
    fn new(of: &dyn Fn(&[Value]) -> Fate) -> Self {
        Self {
            system: Places::new("system", of),
            developer: Places::new("developer", of),
            tool: of(&called()),
        }
    }
}

impl Places {
    fn new(role: &str, of: &dyn Fn(&[Value]) -> Fate) -> Self {
        let user = || message("user", "Hello.");
        let first = of(&[message(role, WORD), user()]);
        let opening = (first == Fate::Written).then(|| message(role, "Be brief."));
        let late = [user(), message("assistant", "Hello."), message(role, WORD), user()];
        Self { first, late: of(&opening.into_iter().chain(late).collect::<Vec<_>>()) }
    }

    /// Returns the fate of the message at this index.
    pub(super) fn at(self, index: usize) -> Fate {
        if index == 0 { self.first } else { self.late }
    }
}

fn fate(rendered: Option<String>, word: &str) -> Fate {
    match rendered {
        None => Fate::Refused,
        Some(text) if text.contains(word) => Fate::Written,
        Some(_) => Fate::Skipped,
    }
}

/// Returns the variable, of those that a template reads, by which it keeps past reasoning, and its value for
/// that.
pub(super) fn reasoning_switch(names: &BTreeSet<String>) -> Option<(&'static str, bool)> {
    REASONING_SWITCHES.into_iter().find(|(name, _)| names.contains(*name))
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

fn tool() -> Value {
    let parameters = json!({ "type": "object", "properties": { "a": { "type": "string", "description": "A." } },
        "required": ["a"] });
    let function = json!({ "name": TOOL, "description": "A tool.", "parameters": parameters });
    json!({ "type": "function", "function": function })
}

/// A conversation with the result of a call at its end.
fn called() -> Vec<Value> {
    vec![
        message("user", "Hello."),
        json!({ "role": "assistant", "content": "", "tool_calls": [call()] }),
        result(WORD),
    ]
}

fn call() -> Value {
    let arguments = Map::from_iter([("a".to_owned(), "b".into())]);
    json!({ "id": CALL, "type": "function", "function": { "name": TOOL, "arguments": arguments } })
}

fn result(content: &str) -> Value {
    json!({ "role": "tool", "content": content, "name": TOOL, "tool_call_id": CALL })
}

/// An assistant's message with the word as its reasoning.
fn reasoned(content: &str, calls: &[Value]) -> Value {
    let mut message = json!({ "role": "assistant", "content": content, "reasoning": WORD });
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    message
}
