//! Hugging Face chat templates: a conversation in, the prompt's text out.
//!
//! Templates are Jinja2 written against transformers' `apply_chat_template`: its whitespace options,
//! functions and variables are set up here, Python's ways of printing in `python` and `json`. A render
//! has a budget, which bounds its time and memory whatever the template and the conversation.

use std::error::Error as _;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value as Jinja, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind};
use regex::{Captures, Regex};
use serde_json::{Map, Value};
use time::{OffsetDateTime, UtcOffset};

use super::{TextError, TextFiles, Tokenizer, python, tojson};

/// Limit of instructions in a render; 64 bytes of text count as one (minijinja's fuel). Real templates
/// take some hundreds for a message; this is about a second of work and at most 1 GB.
const FUEL: u64 = 16_000_000;

/// The name of a model's only template, or of its main one where it has several.
const DEFAULT: &str = "default";
/// Keys of a message's reasoning; the first one present counts (transformers).
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// The template for conversations with tools, where a model has a separate one.
const TOOL_USE: &str = "tool_use";

/// A model's chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
    uses_tools: bool,
}

/// The input of a template.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// The messages as transformers passes them: `role`, `content`, `tool_calls` with arguments as objects.
    pub messages: &'a [Value],
    /// Tool definitions as JSON schemas.
    pub tools: &'a [Value],
    /// Further variables. They cannot replace those of the other fields.
    pub arguments: &'a Map<String, Value>,
    /// Whether the text ends with the beginning of the model's answer.
    pub add_generation_prompt: bool,
    /// The time that `strftime_now` formats, in local time.
    pub now: SystemTime,
}

impl ChatTemplate {
    /// Makes a model's template: `chat_template.jinja`, else the `chat_template` of
    /// `tokenizer_config.json` (a text, or a list of named ones), else that of `chat_template.json`.
    /// `None` if the model has none.
    ///
    /// # Errors
    /// A `chat_template` is neither a text nor a list, or the template is not Jinja.
    pub fn new(files: &TextFiles, tokenizer: &Tokenizer) -> Result<Option<Self>, TextError> {
        let Some((file, sources)) = sources(files)? else { return Ok(None) };
        let mut environment = environment();
        let mut uses_tools = false;
        let mut has_default = false;
        for (name, source) in sources {
            if name != DEFAULT && name != TOOL_USE {
                continue;
            }
            has_default |= name == DEFAULT;
            uses_tools |= name == TOOL_USE || source.contains("tools");
            environment.add_template_owned(name, without_generation_tags(&source)).map_err(|error| {
                TextError::Invalid { file, why: format!("the chat template: {}", explain(&error)) }
            })?;
        }
        if !has_default {
            return Err(TextError::Invalid { file, why: "no chat template named default".to_owned() });
        }
        let special_tokens =
            tokenizer.special_tokens().map(|(name, text)| (name.to_owned(), text.to_owned())).collect();
        Ok(Some(Self(Arc::new(Inner { environment, special_tokens, uses_tools }))))
    }

    /// Returns the text of the prompt, of at most `bytes_max` bytes.
    ///
    /// # Errors
    /// The template refused the conversation (`raise_exception`), failed on it, wrote more, or used up its
    /// budget.
    pub fn render(&self, conversation: &Conversation<'_>, bytes_max: usize) -> Result<String, TextError> {
        let Conversation { messages, tools, arguments, add_generation_prompt, now } = *conversation;
        let tool_list: Jinja =
            if tools.is_empty() { Jinja::from(()) } else { tools.iter().map(python::from_json).collect() };
        let special =
            self.0.special_tokens.iter().map(|(name, text)| (name.clone(), Jinja::from(text.clone())));
        let further = arguments.iter().map(|(name, value)| (name.clone(), python::from_json(value)));
        let strftime_now = Jinja::from_function(move |format: &str| strftime(now, format));
        let fixed = [
            ("messages", messages.iter().map(message).collect()),
            ("tools", tool_list),
            ("add_generation_prompt", Jinja::from(add_generation_prompt)),
            ("strftime_now", strftime_now),
        ];
        let fixed = fixed.map(|(name, value)| (name.to_owned(), value));
        // The last of equal names counts.
        let documents = std::iter::once(("documents".to_owned(), Jinja::from(())));
        let context = Jinja::from_pairs(documents.chain(special).chain(further).chain(fixed));
        let template = (!tools.is_empty())
            .then(|| self.0.environment.get_template(TOOL_USE).ok())
            .flatten()
            .map_or_else(|| self.0.environment.get_template(DEFAULT), Ok);
        let mut out = Bounded { text: Vec::new(), bytes_max, is_full: false };
        let written = template.and_then(|template| template.render_captured_to(context, &mut out).map(drop));
        if out.is_full {
            return Err(TextError::TooLong { bytes_max });
        }
        written.map_err(|error| TextError::Render(explain(&error)))?;
        String::from_utf8(out.text).map_err(|error| TextError::Render(error.to_string()))
    }

    /// Returns whether the template uses tools.
    #[must_use]
    pub fn uses_tools(&self) -> bool {
        self.0.uses_tools
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

/// A template's name and its text.
type Source = (String, String);

/// Returns a model's templates and the name of the file that has them.
fn sources(files: &TextFiles) -> Result<Option<(&'static str, Vec<Source>)>, TextError> {
    if let Some(source) = &files.chat_template {
        let default = (DEFAULT.to_owned(), source.clone());
        let tool_use = files.tool_use_template.clone().map(|source| (TOOL_USE.to_owned(), source));
        return Ok(Some(("chat_template.jinja", std::iter::once(default).chain(tool_use).collect())));
    }
    let configs = [
        ("tokenizer_config.json", &files.tokenizer_config),
        ("chat_template.json", &files.chat_template_json),
    ];
    for (file, config) in configs {
        match config.as_ref().and_then(|config| config.get("chat_template")) {
            None | Some(Value::Null) => {}
            Some(Value::String(source)) => {
                return Ok(Some((file, vec![(DEFAULT.to_owned(), source.clone())])));
            }
            Some(Value::Array(list)) => return Ok(Some((file, list.iter().filter_map(named).collect()))),
            Some(Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
                let why = "chat_template is neither a text nor a list".to_owned();
                return Err(TextError::Invalid { file, why });
            }
        }
    }
    Ok(None)
}

/// Returns a message as transformers 5 passes it: without its null fields, which many templates would print,
/// and with its reasoning under each key that templates use for it.
fn message(message: &Value) -> Jinja {
    let Value::Object(fields) = message else { return python::from_json(message) };
    let present = |name: &str| fields.get(name).is_some_and(|value| !value.is_null());
    let reasoning = REASONING.iter().find(|name| present(name)).map(|name| python::from_json(&fields[*name]));
    let thinking = reasoning.clone().filter(|_| !present("thinking")).map(|text| ("thinking", text));
    let fields = fields.iter().filter(|(_, value)| !value.is_null());
    let fields = fields.map(|(name, value)| (name.as_str(), python::from_json(value)));
    Jinja::from_pairs(fields.chain(thinking).chain(reasoning.map(|text| ("reasoning_content", text))))
}

fn named(entry: &Value) -> Option<Source> {
    Some((entry.get("name")?.as_str()?.to_owned(), entry.get("template")?.as_str()?.to_owned()))
}

/// Returns the environment of transformers' `_compile_jinja_template`.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap_or_default(),
    );
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, _, value| match value.as_str() {
        Some(text) => Ok(out.write_str(text)?),
        None => Ok(out.write_str(&python::str(value)?)?),
    });
    environment.add_filter("tojson", tojson::tojson);
    environment.add_filter("string", python::str);
    // As in Jinja2, a value with a length and items is a sequence (slices of lists are iterables here), and
    // none is not iterable.
    environment.add_test("sequence", |value: &Jinja| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        matches!(value.kind(), Seq | Iterable | Map | String | Undefined)
    });
    environment.add_test("iterable", |value: &Jinja| !value.is_none() && value.try_iter().is_ok());
    environment.add_function("raise_exception", |message: &Jinja| -> Result<Jinja, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, python::str(message)?))
    });
    environment
}

/// Formats the time in the machine's zone, in the notation of C.
fn strftime(now: SystemTime, format: &str) -> Result<String, minijinja::Error> {
    let refuse =
        |error: String| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
    let utc = OffsetDateTime::from(now);
    let local = utc.to_offset(UtcOffset::local_offset_at(utc).unwrap_or(UtcOffset::UTC));
    let items = time::format_description::parse_strftime_borrowed(format)
        .map_err(|error| refuse(error.to_string()))?;
    local.format(&items).map_err(|error| refuse(error.to_string()))
}

/// Replaces `{% generation %}` blocks, which mark a model's own text for training, by conditions that always
/// hold: both print their contents.
fn without_generation_tags(source: &str) -> String {
    let Ok(tag) = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}") else { return source.to_owned() };
    let condition = |tag: &Captures<'_>| {
        let statement = if tag.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {statement} {}%}}", &tag[1], &tag[3])
    };
    tag.replace_all(source, condition).into_owned()
}

/// Returns the words of an error's innermost cause, with its line if it has one.
fn explain(error: &minijinja::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source().and_then(|inner| inner.downcast_ref()) {
        cause = inner;
    }
    if cause.kind() == ErrorKind::OutOfFuel {
        return "it takes too much work".to_owned();
    }
    let words = cause.detail().map_or_else(|| cause.kind().to_string(), str::to_owned);
    match cause.line() {
        Some(line) => format!("{words} (line {line})"),
        None => words,
    }
}
