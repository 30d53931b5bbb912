//! What a template does with each part of a conversation, found by rendering short ones: many templates leave
//! out what they do not know, without a word.

use serde_json::{Map, Value, json};

/// The text whose way through a template is followed: a word that no template has.
const WORD: &str = "qjxzvw";
/// The name of the tool of the probes.
const TOOL: &str = "qjxztool";
/// The id of its call: some templates want nine letters and digits.
const CALL: &str = "qjxzcall0";

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
    /// A system message that comes first.
    pub(super) system: Fate,
    /// One that comes later.
    pub(super) late_system: Fate,
    /// A developer message that comes first.
    pub(super) developer: Fate,
    /// The result of a tool call.
    pub(super) tool: Fate,
    /// The definitions of tools.
    pub(super) tools: Fate,
    /// What follows the model's answer, up to the end.
    pub(super) after_answer: String,
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
        let with_tools = render;
        let render = |messages: &[Value], tools: &[Value]| render(messages, tools, parts);
        let of = |messages: &[Value]| fate(render(messages, &[]), WORD);
        let answer = || message("assistant", "Hello.");
        let late = [message("system", "Be brief."), user(), answer(), message("system", WORD), user()];
        let answered = render(&[user(), message("assistant", WORD)], &[]).unwrap_or_default();
        Self {
            parts,
            system: of(&[message("system", WORD), user()]),
            late_system: of(&late),
            developer: of(&[message("developer", WORD), user()]),
            tool: fate(render(&called(), &[tool()]), WORD),
            tools: tools(with_tools, parts),
            after_answer: answered.rsplit_once(WORD).map_or_else(String::new, |(_, after)| after.to_owned()),
        }
    }
}

/// Templates write tools before a system message, in it, or in the user's.
fn tools(render: Render<'_>, parts: bool) -> Fate {
    let user = message("user", "Hello.");
    let alone = fate(render(std::slice::from_ref(&user), &[tool()], parts), TOOL);
    let with_system = fate(render(&[message("system", "Be brief."), user], &[tool()], parts), TOOL);
    if alone == Fate::Written || with_system == Fate::Refused { alone } else { with_system }
}

fn fate(rendered: Option<String>, word: &str) -> Fate {
    match rendered {
        None => Fate::Refused,
        Some(text) if text.contains(word) => Fate::Written,
        Some(_) => Fate::Skipped,
    }
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
    let arguments = Map::from_iter([("a".to_owned(), "b".into())]);
    let call =
        json!({ "id": CALL, "type": "function", "function": { "name": TOOL, "arguments": arguments } });
    vec![
        message("user", "Hello."),
        json!({ "role": "assistant", "content": "", "tool_calls": [call] }),
        json!({ "role": "tool", "content": WORD, "name": TOOL, "tool_call_id": CALL }),
    ]
}
