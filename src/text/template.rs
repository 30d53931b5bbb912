//! Hugging Face chat templates: a conversation in, the prompt's text out.
//!
//! Templates are Jinja2 written against transformers' `apply_chat_template` (`jinja`). A render has a budget,
//! which bounds its time and memory whatever the template and the conversation. What a template would leave
//! out is refused (`probe`), and what people write is kept apart from its markup (`marks`).

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use minijinja::Environment;
use minijinja::value::Value as Jinja;
use serde_json::{Map, Value, json};
use time::{OffsetDateTime, UtcOffset};

use super::apart::{SOURCE_BYTES_MAX, apart};
use super::choice::{DEFAULT, Source, TOOL_USE, chosen, sources};
use super::marks::{Marked, Marks, Texts};
use super::probe::{Fate, Places, Roles, Traits};
use super::refusal::refuse;
use super::{Rendered, TextError, TextFiles, Tokenizer, jinja, probe, python, source, tojson};

/// Limit of instructions in a render. Real templates take some hundreds for a message; this is about a second
/// of work and at most 1 GB.
const FUEL: u64 = 16_000_000;
/// The same for each render that finds out what a template does.
const PROBE_FUEL: u64 = 200_000;
/// Limit of what such a render writes, in bytes: some templates write pages of instructions.
const PROBE_BYTES_MAX: usize = 1 << 20;

/// Variables that every render sets.
const FIXED: [&str; 4] = ["messages", "tools", "add_generation_prompt", "strftime_now"];
/// Limit of names in the refusal of an argument that the templates do not read.
const VARIABLES_NAMED: usize = 20;
/// Keys of a message's reasoning; the first one present counts (transformers).
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// The variable by which most makers let reasoning be turned on and off.
pub const ENABLE_THINKING: &str = "enable_thinking";
/// Those of all: Qwen, GLM, Gemma; Granite, DeepSeek, Kimi.
const THINKING_SWITCHES: [&str; 2] = [ENABLE_THINKING, "thinking"];
/// The variable of how much is to be reasoned (gpt-oss).
pub const EFFORT: &str = "reasoning_effort";

/// A model's chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    writer: Writer,
    /// Names that the templates read.
    names: BTreeSet<String>,
    /// Those of variables that a caller may set, for people.
    variables: String,
    traits: Traits,
    /// The argument that turns reasoning on and off.
    thinking_switch: Option<&'static str>,
    /// Whether it reads the reasoning of an assistant's message, whatever it writes of it.
    reads_reasoning: bool,
    /// The templates as they are in the model's files, joined.
    source: String,
    marks: Marks,
    end_of_turn: Option<u32>,
}

/// The means to write a conversation as it is given.
#[derive(Debug)]
struct Writer {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
}

/// The input of a template.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// The messages as transformers passes them: `role`, `content`, `tool_calls` with arguments as objects.
    pub messages: &'a [Value],
    /// Tool definitions as JSON schemas.
    pub tools: &'a [Value],
    /// Further variables, which the template reads.
    pub arguments: &'a Map<String, Value>,
    /// Whether the text ends with the beginning of the model's answer.
    pub add_generation_prompt: bool,
    /// The time that `strftime_now` formats, in local time.
    pub now: SystemTime,
    /// Whether what looks like a control token in the texts of people and tools is one.
    pub control_tokens: bool,
}

impl ChatTemplate {
    /// Makes a model's template: `chat_template.jinja`, else the `chat_template` of
    /// `tokenizer_config.json` (a text, or a list of named ones), else that of `chat_template.json`.
    ///
    /// # Errors
    /// The model has no template or an empty one, several of which none is the main one, or one that is not
    /// Jinja.
    pub fn new(files: &TextFiles, tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let (file, sources) = sources(files)?;
        let sources = chosen(file, sources)?;
        let names: BTreeSet<String> =
            sources.iter().flat_map(|(_, source)| source::names(source)).map(str::to_owned).collect();
        let source = sources.iter().map(|(_, source)| source.as_str()).collect::<Vec<_>>().join("\n");
        let environment = apart(|| parsed(sources))
            .map_err(|error| TextError::Invalid { file, why: format!("the chat template: {error}") })?;
        let special_tokens =
            tokenizer.special_tokens().map(|(name, text)| (name.to_owned(), text.to_owned())).collect();
        let mut writer = Writer { environment, special_tokens };
        let arguments = Map::new();
        let now = SystemTime::UNIX_EPOCH;
        let traits = Traits::new(&|messages, tools, parts| {
            let (add_generation_prompt, control_tokens) = (false, false);
            let arguments = &arguments;
            let conversation =
                Conversation { messages, tools, arguments, add_generation_prompt, now, control_tokens };
            writer.write(&conversation, Form { parts, json_arguments: false }, PROBE_BYTES_MAX).ok()
        });
        let switches = |name: &&str| writer.writes_with(name, true) != writer.writes_with(name, false);
        let thinking_switch =
            THINKING_SWITCHES.into_iter().find(|name| names.contains(*name) && switches(name));
        writer.environment.set_fuel(Some(FUEL));
        let variables = apart(|| Ok(writer.variables()))?;
        let marks = Marks::new(tokenizer.control_tokens().map(|(text, _)| text))?;
        let after = traits.after_answer.trim_start();
        let ends = tokenizer.control_tokens().filter(|(text, _)| after.starts_with(text.as_str()));
        let end_of_turn = ends.max_by_key(|(text, _)| text.len()).map(|(_, id)| id);
        let reads_reasoning = traits.reasoning == Fate::Written || source.contains(REASONING[0]);
        Ok(Self(Arc::new(Inner {
            writer,
            names,
            variables,
            traits,
            thinking_switch,
            reads_reasoning,
            source,
            marks,
            end_of_turn,
        })))
    }

    /// Returns the text of the prompt, of at most `bytes_max` bytes. A developer message becomes a system
    /// message where the template knows only those. Arguments of tool calls are objects, as transformers
    /// passes them; a template that fails on them gets their JSON.
    ///
    /// # Errors
    /// The template would leave a message, the tools or an argument out, refused the conversation
    /// (`raise_exception`), failed on it, wrote more, or used up its budget.
    pub fn render(&self, conversation: &Conversation<'_>, bytes_max: usize) -> Result<Rendered, TextError> {
        let inner = &*self.0;
        let messages = inner.known_roles(conversation);
        inner.check(&Conversation { messages: &messages, ..*conversation })?;
        let Conversation { tools, arguments, .. } = *conversation;
        let texts = Texts { messages: &messages, tools, arguments };
        let marked = if conversation.control_tokens { texts.unmarked() } else { inner.marks.apply(texts)? };
        let Marked { messages, tools, arguments, mark } = marked;
        let conversation =
            Conversation { messages: &messages, tools: &tools, arguments: &arguments, ..*conversation };
        let form = Form { parts: inner.traits.parts, json_arguments: false };
        let has_calls = messages.iter().any(|message| message.get("tool_calls").is_some());
        let text = match inner.writer.write(&conversation, form, bytes_max) {
            Err(TextError::Render(why)) if has_calls => {
                let form = Form { json_arguments: true, ..form };
                let second = inner.writer.write(&conversation, form, bytes_max);
                second.map_err(|_| TextError::Render(why))?
            }
            written => written?,
        };
        Ok(Rendered { text, mark })
    }

    /// Returns whether the template writes tools, in conversations with a system message or in those without.
    #[must_use]
    pub fn writes_tools(&self) -> bool {
        let Traits { tools, tools_with_system, .. } = self.0.traits;
        tools == Fate::Written || tools_with_system == Fate::Written
    }

    /// Returns whether the template writes a system message.
    #[must_use]
    pub fn writes_system(&self) -> bool {
        self.0.traits.roles.system.first == Fate::Written
    }

    /// Returns whether the template reads the reasoning of an assistant's message, whatever it writes of
    /// it.
    #[must_use]
    pub fn reads_reasoning(&self) -> bool {
        self.0.reads_reasoning
    }

    /// Returns whether the template refuses a message with a call, reasoning and a text, but not one with a
    /// call and reasoning. Then the text can only stand in the reasoning.
    #[must_use]
    pub fn joins_reasoning(&self) -> bool {
        self.0.traits.joins_reasoning
    }

    /// Returns the argument that turns reasoning on and off in what the template writes.
    #[must_use]
    pub fn thinking_switch(&self) -> Option<&'static str> {
        self.0.thinking_switch
    }

    /// Returns whether the template reads how much is to be reasoned.
    #[must_use]
    pub fn reads_effort(&self) -> bool {
        self.0.names.contains(EFFORT)
    }

    /// Returns the templates as they are in the model's files.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.0.source
    }

    /// Returns the argument with which the template keeps past reasoning, and its value for that.
    #[must_use]
    pub fn reasoning_switch(&self) -> Option<(&'static str, bool)> {
        probe::reasoning_switch(&self.0.names)
    }

    /// Returns the control token that the template writes after the model's answer.
    #[must_use]
    pub fn end_of_turn(&self) -> Option<u32> {
        self.0.end_of_turn
    }
}

impl Inner {
    fn roles(&self, tools: &[Value]) -> &Roles {
        if tools.is_empty() { &self.traits.roles } else { &self.traits.roles_with_tools }
    }

    /// Replaces the role developer where the template knows only system messages.
    fn known_roles<'a>(&self, conversation: &Conversation<'a>) -> Cow<'a, [Value]> {
        let Conversation { messages, tools, .. } = *conversation;
        let Roles { system, developer, .. } = self.roles(tools);
        let replaces = |index: usize, message: &Value| {
            message["role"] == "developer"
                && developer.at(index) != Fate::Written
                && system.at(index) == Fate::Written
        };
        if !messages.iter().enumerate().any(|(index, message)| replaces(index, message)) {
            return messages.into();
        }
        let mut messages = messages.to_vec();
        for (index, message) in messages.iter_mut().enumerate() {
            if replaces(index, message) {
                message["role"] = "system".into();
            }
        }
        messages.into()
    }

    /// Refuses what the template would leave out.
    fn check(&self, conversation: &Conversation<'_>) -> Result<(), TextError> {
        let Conversation { messages, tools, arguments, .. } = *conversation;
        for name in arguments.keys() {
            if FIXED.contains(&name.as_str()) {
                return Err(TextError::FixedArgument(name.clone()));
            }
            if !self.names.contains(name) {
                return Err(TextError::Argument { name: name.clone(), variables: self.variables.clone() });
            }
        }
        self.check_tools(conversation)?;
        let Roles { system, developer, tool } = *self.roles(tools);
        for (index, message) in messages.iter().enumerate() {
            let role = message["role"].as_str().unwrap_or_default();
            let places = match role {
                "system" => system,
                "developer" => developer,
                "tool" => Places { first: tool, late: tool },
                _ => continue,
            };
            if places.at(index) == Fate::Skipped {
                // A developer message may become a system message.
                let late = places.first == Fate::Written
                    || (role == "developer" && index > 0 && system.first == Fate::Written);
                return Err(TextError::Role { index, role: role.to_owned(), late });
            }
        }
        Ok(())
    }

    /// Refuses tools that the template would leave out: some write them only with a system message, or only
    /// without.
    fn check_tools(&self, conversation: &Conversation<'_>) -> Result<(), TextError> {
        let Traits { tools, tools_with_system, tools_with_developer, .. } = self.traits;
        let role = conversation.messages.first().and_then(|message| message["role"].as_str());
        let fate = match role {
            Some("system") => tools_with_system,
            Some("developer") => tools_with_developer,
            _ => tools,
        };
        if conversation.tools.is_empty() || fate != Fate::Skipped {
            return Ok(());
        }
        let is_written = [tools, tools_with_system, tools_with_developer].contains(&Fate::Written);
        Err(TextError::Tools { first: role.filter(|_| is_written).map(str::to_owned) })
    }
}

/// How messages are passed to a template.
#[derive(Clone, Copy)]
struct Form {
    /// Contents are lists of parts.
    parts: bool,
    /// Arguments of tool calls are JSON, not objects.
    json_arguments: bool,
}

impl Writer {
    /// Returns a prompt with an argument on or off.
    fn writes_with(&self, name: &str, on: bool) -> Option<String> {
        let messages = [json!({ "role": "user", "content": "Hello." })];
        let arguments = Map::from_iter([(name.to_owned(), on.into())]);
        let (add_generation_prompt, now) = (true, SystemTime::UNIX_EPOCH);
        let conversation = Conversation {
            messages: &messages,
            tools: &[],
            arguments: &arguments,
            add_generation_prompt,
            now,
            control_tokens: false,
        };
        self.write(&conversation, Form { parts: false, json_arguments: false }, PROBE_BYTES_MAX).ok()
    }

    /// Returns the names of the variables that a caller may set, up to a limit.
    fn variables(&self) -> String {
        let templates = self.environment.templates().map(|(_, template)| template);
        let mut names: BTreeSet<String> =
            templates.flat_map(|template| template.undeclared_variables(false)).collect();
        let set = self.environment.globals().map(|(name, _)| name);
        let set = set.chain(self.special_tokens.iter().map(|(name, _)| name.as_str()));
        for name in set.chain(FIXED) {
            names.remove(name);
        }
        let more = names.len().saturating_sub(VARIABLES_NAMED);
        let listed = names.into_iter().take(VARIABLES_NAMED).collect::<Vec<_>>().join(", ");
        match more {
            _ if listed.is_empty() => "none".to_owned(),
            0 => listed,
            more => format!("{listed} and {more} more"),
        }
    }

    fn write(
        &self,
        conversation: &Conversation<'_>,
        form: Form,
        bytes_max: usize,
    ) -> Result<String, TextError> {
        apart(|| self.write_here(conversation, form, bytes_max))
    }

    fn write_here(
        &self,
        conversation: &Conversation<'_>,
        form: Form,
        bytes_max: usize,
    ) -> Result<String, TextError> {
        let Conversation { messages, tools, arguments, add_generation_prompt, now, .. } = *conversation;
        let failed = |error: minijinja::Error| TextError::Render(jinja::explain(&error));
        let tool_list: Jinja =
            if tools.is_empty() { Jinja::from(()) } else { tools.iter().map(python::from_json).collect() };
        let messages = messages.iter().map(|message| form.message(message));
        let messages: Jinja = messages.collect::<Result<Vec<_>, _>>().map_err(failed)?.into();
        let special =
            self.special_tokens.iter().map(|(name, text)| (name.clone(), Jinja::from(text.clone())));
        let further = arguments.iter().map(|(name, value)| (name.clone(), python::from_json(value)));
        let strftime_now = Jinja::from_function(move |format: &str| strftime(now, format));
        let fixed = [messages, tool_list, Jinja::from(add_generation_prompt), strftime_now];
        let fixed = FIXED.map(str::to_owned).into_iter().zip(fixed);
        // The last of equal names counts.
        let documents = std::iter::once(("documents".to_owned(), Jinja::from(())));
        let context = Jinja::from_pairs(documents.chain(special).chain(further).chain(fixed));
        let template = (!tools.is_empty())
            .then(|| self.environment.get_template(TOOL_USE).ok())
            .flatten()
            .map_or_else(|| self.environment.get_template(DEFAULT), Ok);
        let mut out = Bounded { text: Vec::new(), bytes_max, is_full: false };
        let written = template.and_then(|template| template.render_captured_to(context, &mut out).map(drop));
        if out.is_full {
            return Err(TextError::TooLong { bytes_max });
        }
        written.map_err(failed)?;
        String::from_utf8(out.text).map_err(|error| TextError::Render(error.to_string()))
    }
}

/// Takes a render's output up to a limit.
struct Bounded {
    text: Vec<u8>,
    bytes_max: usize,
    is_full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.is_full |= bytes.len() > self.bytes_max - self.text.len();
        if self.is_full {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Form {
    /// Returns a message as transformers 5 passes it: without its null fields, which many templates would
    /// print, and with its reasoning under each key that templates use for it.
    fn message(self, message: &Value) -> Result<Jinja, minijinja::Error> {
        let Value::Object(fields) = message else { return Ok(python::from_json(message)) };
        let present = |name: &str| fields.get(name).is_some_and(|value| !value.is_null());
        let reasoning =
            REASONING.iter().find(|name| present(name)).map(|name| python::from_json(&fields[*name]));
        let thinking = reasoning.clone().filter(|_| !present("thinking")).map(|text| ("thinking", text));
        let mut pairs = Vec::with_capacity(fields.len() + 2);
        for (name, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
            let value = match name.as_str() {
                "content" if self.parts && value.is_string() => {
                    let part = [("type", Jinja::from("text")), ("text", python::from_json(value))];
                    vec![Jinja::from_pairs(part)].into()
                }
                "tool_calls" if self.json_arguments => tool_calls(value)?,
                _ => python::from_json(value),
            };
            pairs.push((name.as_str(), value));
        }
        Ok(Jinja::from_pairs(
            pairs.into_iter().chain(thinking).chain(reasoning.map(|text| ("reasoning_content", text))),
        ))
    }
}

/// Returns tool calls with their arguments as JSON.
fn tool_calls(calls: &Value) -> Result<Jinja, minijinja::Error> {
    let mut calls = calls.clone();
    for call in calls.as_array_mut().into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments") {
            *arguments = tojson::json(&python::from_json(arguments))?.into();
        }
    }
    Ok(python::from_json(&calls))
}

/// Returns an environment with these templates.
fn parsed(sources: Vec<Source>) -> Result<Environment<'static>, TextError> {
    let mut environment = jinja::environment(PROBE_FUEL);
    for (name, source) in sources {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(TextError::Render(format!("it has more than {SOURCE_BYTES_MAX} bytes")));
        }
        let added = environment.add_template_owned(name, jinja::translate(&source));
        added.map_err(|error| TextError::Render(jinja::explain(&error)))?;
    }
    Ok(environment)
}

/// Formats the time in the machine's zone, in the notation of C.
fn strftime(now: SystemTime, format: &str) -> Result<String, minijinja::Error> {
    let failed = |error: String| refuse(&format!("strftime_now: {error}"));
    let utc = OffsetDateTime::from(now);
    let local = utc.to_offset(UtcOffset::local_offset_at(utc).unwrap_or(UtcOffset::UTC));
    let items = time::format_description::parse_strftime_borrowed(format)
        .map_err(|error| failed(error.to_string()))?;
    local.format(&items).map_err(|error| failed(error.to_string()))
}
