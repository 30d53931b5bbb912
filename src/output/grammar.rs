//! Grammars that make a model call a tool, in the Lark of llguidance.
//!
//! A marker that is a special token of the tokenizer is named by its id, since text cannot be it. Arguments
//! that are JSON follow the tool's schema by `%json`; between tags, and in Python's and Gemma's forms, each
//! argument is checked by its own schema, where a text excludes only what would end it.

use serde_json::{Map, Value, json};

use super::Tool;
use super::format::Format;
use super::literal::{FUNCTION_GEMMA, GEMMA4};

/// Why there is no grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoGrammar {
    /// Nothing may be called.
    #[error("there are no tools to call")]
    Empty,
    /// An argument's schema that the format cannot be held to.
    #[error("the tool call format {format} has no grammar for argument {argument} of {tool}: {reason}")]
    Argument {
        /// The format's name.
        format: &'static str,
        /// The function.
        tool: String,
        /// The argument.
        argument: String,
        /// What the format lacks.
        reason: &'static str,
    },
}

/// A text in which the tag that ends a value cannot begin.
const TEXT_BEFORE_TAG: &str = r"([^<]|<+[^<\/])*";
/// Any text: the special token behind it ends it.
const TEXT_BEFORE_TOKEN: &str = r"/(.|\n)*/";
/// A text that the quote behind it ends, where that is text as well.
const TEXT_BEFORE_QUOTE: &str = r"/[^<]*/";

/// Looks up the id of a marker that is a special token.
type Special<'a> = &'a dyn Fn(&str) -> Option<u32>;

impl Format {
    /// Returns the grammar of one call, or of one or more if `parallel`, of these tools. `special` returns
    /// the id of a marker that is a special token of the tokenizer. The grammar begins where reasoning has
    /// ended.
    ///
    /// # Errors
    /// [`NoGrammar`], if there are no tools or the format has no grammar for an argument.
    pub fn call_grammar(
        self,
        tools: &[Tool],
        parallel: bool,
        special: &dyn Fn(&str) -> Option<u32>,
    ) -> Result<String, NoGrammar> {
        if tools.is_empty() {
            return Err(NoGrammar::Empty);
        }
        let mut writer = Writer { format: self, special, rules: String::new(), count: 0 };
        let shape = self.shape(special);
        let mut calls = Vec::new();
        for tool in tools {
            let call = shape.call.replace("NAME", &tool.name);
            let (before, after) = call.split_once("ARGUMENTS").unwrap_or((call.as_str(), ""));
            let arguments = writer.arguments(tool)?;
            let (before, after) = (writer.literal(before), writer.literal(after));
            calls.push(writer.rule(&format!("{before} {arguments} {after}")));
        }
        let call = calls.join(" | ");
        let [open, between, close] = shape.around.map(|text| writer.literal(text));
        let several = parallel && !self.one_call_only();
        let more = if several { format!("({between} call)*") } else { String::new() };
        let Writer { rules, .. } = writer;
        Ok(format!("start: {open} call {more} {close}\ncall: {call}\n{rules}"))
    }
}

/// How a format writes calls.
struct Shape {
    /// Before the first call, between two, and behind the last.
    around: [&'static str; 3],
    /// A call, with NAME and ARGUMENTS.
    call: &'static str,
}

impl Format {
    fn shape(self, special: Special<'_>) -> Shape {
        let shape = |around, call| Shape { around, call };
        let object = r#"{"name": "NAME", "arguments": ARGUMENTS}"#;
        match self {
            Self::Hermes | Self::Prompted => {
                shape(["<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"], object)
            }
            Self::Llama3Json => shape(["", "; ", ""], r#"{"name": "NAME", "parameters": ARGUMENTS}"#),
            Self::Nemotron => shape(["<TOOLCALL>[", ", ", "]</TOOLCALL>"], object),
            Self::Phi4 if special("<|tool_call|>").is_some() => {
                shape(["<|tool_call|>[", ", ", "]<|/tool_call|>"], object)
            }
            Self::Phi4 => shape(["functools[", ", ", "]"], object),
            Self::Mistral if special("[ARGS]").is_some() => {
                shape(["[TOOL_CALLS]", "[TOOL_CALLS]", ""], "NAME[ARGS]ARGUMENTS")
            }
            Self::Mistral => shape(["[TOOL_CALLS][", ", ", "]"], object),
            Self::DeepseekV3 => shape(
                ["<｜tool▁calls▁begin｜>", "\n", "<｜tool▁calls▁end｜>"],
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>",
            ),
            Self::DeepseekV31 => shape(
                ["<｜tool▁calls▁begin｜>", "", "<｜tool▁calls▁end｜>"],
                "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>",
            ),
            Self::KimiK2 => shape(
                ["<|tool_calls_section_begin|>", "", "<|tool_calls_section_end|>"],
                "<|tool_call_begin|>functions.NAME:ARGUMENTS<|tool_call_end|>",
            ),
            Self::Harmony => shape(
                ["<|channel|>commentary to=functions.", "", ""],
                "NAME <|constrain|>json<|message|>ARGUMENTS",
            ),
            Self::Qwen3Coder => shape(
                ["<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"],
                "<function=NAME>\nARGUMENTS</function>",
            ),
            Self::MinimaxM2 => shape(
                ["<minimax:tool_call>\n", "", "</minimax:tool_call>"],
                "<invoke name=\"NAME\">\nARGUMENTS</invoke>\n",
            ),
            Self::Glm4 => {
                shape(["<tool_call>", "</tool_call>\n<tool_call>", "</tool_call>"], "NAME\nARGUMENTS")
            }
            Self::Pythonic => shape(["<|tool_call_start|>[", ", ", "]<|tool_call_end|>"], "NAME(ARGUMENTS)"),
            Self::Gemma4 => {
                shape(["<|tool_call>", "<tool_call|><|tool_call>", "<tool_call|>"], "call:NAME{ARGUMENTS}")
            }
            Self::FunctionGemma => shape(
                ["<start_function_call>", "<end_function_call><start_function_call>", "<end_function_call>"],
                "call:NAME{ARGUMENTS}",
            ),
        }
    }

    /// Returns what stands before an argument's name, between it and the value, behind the value, and between
    /// two arguments; `None` if the arguments are one JSON object.
    fn pairs(self) -> Option<[&'static str; 4]> {
        match self {
            Self::Qwen3Coder => Some(["<parameter=", ">\n", "\n</parameter>\n", ""]),
            Self::MinimaxM2 => Some(["<parameter name=\"", "\">", "</parameter>\n", ""]),
            Self::Glm4 => Some(["<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n", ""]),
            Self::Pythonic => Some(["", "=", "", ", "]),
            Self::Gemma4 | Self::FunctionGemma => Some(["", ":", "", ","]),
            Self::Hermes
            | Self::Llama3Json
            | Self::Mistral
            | Self::DeepseekV3
            | Self::DeepseekV31
            | Self::KimiK2
            | Self::Phi4
            | Self::Harmony
            | Self::Nemotron
            | Self::Prompted => None,
        }
    }
}

impl Format {
    /// Returns the model's own quote.
    fn quote(self) -> Option<&'static str> {
        let form = if self == Self::Gemma4 { &GEMMA4 } else { &FUNCTION_GEMMA };
        matches!(self, Self::Gemma4 | Self::FunctionGemma).then_some(form.quote)
    }
}

/// Writes the rules of a grammar.
struct Writer<'a> {
    format: Format,
    special: Special<'a>,
    rules: String,
    count: usize,
}

impl Writer<'_> {
    /// Adds a rule and returns its name.
    fn rule(&mut self, body: &str) -> String {
        let name = format!("r{}", self.count);
        self.count += 1;
        self.rules += &format!("{name}: {body}\n");
        name
    }

    /// Writes a text, its special tokens by their ids.
    fn literal(&self, text: &str) -> String {
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let mut markers = self.format.markers().iter().filter(|marker| rest.starts_with(**marker));
            let token = markers.find_map(|marker| Some((marker.len(), (self.special)(marker)?)));
            let Some((length, id)) = token else {
                plain.push(c);
                rest = &rest[c.len_utf8()..];
                continue;
            };
            parts.extend(quoted(&std::mem::take(&mut plain)));
            parts.push(format!("<[{id}]>"));
            rest = &rest[length..];
        }
        parts.extend(quoted(&plain));
        parts.join(" ")
    }

    /// Returns the rule of a tool's arguments.
    fn arguments(&mut self, tool: &Tool) -> Result<String, NoGrammar> {
        let mut schema = tool.parameters.as_object().cloned().unwrap_or_default();
        schema.entry("type").or_insert_with(|| json!("object"));
        let Some(pairs) = self.format.pairs() else {
            let json = format!("%json {}", Value::Object(schema));
            let arguments = self.rule(&json);
            if self.format != Format::KimiK2 {
                return Ok(arguments);
            }
            // The call's number stands between its name and its arguments.
            let marker = self.literal("<|tool_call_argument_begin|>");
            return Ok(self.rule(&format!("/[0-9]{{1,4}}/ {marker} {arguments}")));
        };
        let empty = Map::new();
        let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&empty);
        let required = schema.get("required").and_then(Value::as_array);
        let is_required = |key: &str| required.is_some_and(|keys| keys.iter().any(|name| name == key));
        let [before, within, behind, between] = pairs;
        let (mut needed, mut optional) = (Vec::new(), Vec::new());
        for (key, property) in properties {
            let argument = Argument { tool, key, property, schema: &schema };
            let value = self.value(&argument, behind)?;
            let name = self.literal(&format!("{before}{key}{within}"));
            let pair = self.rule(&format!("{name} {value}"));
            if is_required(key) { needed.push(pair) } else { optional.push(pair) }
        }
        let between = self.literal(between);
        Ok(self.rule(&joined(&needed, &optional, &between)))
    }

    /// Returns the value of an argument and what stands behind it.
    fn value(&self, argument: &Argument<'_>, behind: &str) -> Result<String, NoGrammar> {
        let Argument { tool: _, key, property, schema } = *argument;
        let names = key.chars().all(|c| c.is_alphanumeric() || c == '_');
        let bare = matches!(self.format, Format::Pythonic | Format::Gemma4 | Format::FunctionGemma);
        let odd = |c: char| c.is_whitespace() || c.is_control() || "<>\"'".contains(c);
        if bare && !names || key.is_empty() || key.contains(odd) {
            return Err(self.refuse(argument, "the format cannot write its name"));
        }
        let texts = words(property);
        let is_text = texts.is_some() || is_text(property);
        let own = self.format.quote();
        if own.is_some() && !is_text && !is_scalar(property) {
            return Err(self.refuse(argument, "only texts, numbers and booleans"));
        }
        let after = self.literal(behind);
        if self.format == Format::Pythonic || !is_text {
            return Ok(format!("%json {} {after}", with_definitions(property, schema)));
        }
        let quote = self.literal(own.unwrap_or_default());
        let ended_by_token = quote.starts_with("<[") || after.starts_with("<[");
        Ok(match texts {
            Some(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| Value::from(*text).to_string()).collect();
                format!("{quote} ({}) {quote} {after}", texts.join(" | "))
            }
            None if ended_by_token => format!("{quote} {TEXT_BEFORE_TOKEN} {quote} {after}"),
            None if own.is_some() => format!("{quote} {TEXT_BEFORE_QUOTE} {quote} {after}"),
            // One lexeme with its end: alone it would take the newline that the end begins with.
            None => {
                let end = behind.replace('\n', "\\n").replace('/', "\\/");
                format!("/{TEXT_BEFORE_TAG}{end}/")
            }
        })
    }

    fn refuse(&self, argument: &Argument<'_>, reason: &'static str) -> NoGrammar {
        NoGrammar::Argument {
            format: self.format.name(),
            tool: argument.tool.name.clone(),
            argument: argument.key.to_owned(),
            reason,
        }
    }
}

/// An argument of a function.
struct Argument<'a> {
    tool: &'a Tool,
    key: &'a str,
    property: &'a Value,
    /// The schema of all of them.
    schema: &'a Map<String, Value>,
}

/// Writes a text as Lark does; nothing for an empty one.
fn quoted(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| Value::from(text).to_string())
}

/// Joins pairs of which some may be left out, in their order.
fn joined(needed: &[String], optional: &[String], between: &str) -> String {
    let maybe = |pairs: &[String]| {
        let pairs: Vec<String> = pairs.iter().map(|pair| format!("({between} {pair})?")).collect();
        pairs.join(" ")
    };
    if !needed.is_empty() {
        return format!("{} {}", needed.join(&format!(" {between} ")), maybe(optional));
    }
    let begun =
        (0..optional.len()).map(|first| format!("{} {}", optional[first], maybe(&optional[first + 1..])));
    let begun: Vec<String> = begun.collect();
    if begun.is_empty() { "\"\"".to_owned() } else { format!("({})?", begun.join(" | ")) }
}

/// Returns the texts that an argument may be, if its schema lists them.
fn words(property: &Value) -> Option<Vec<&str>> {
    let list = property.get("enum")?.as_array()?;
    list.iter().map(Value::as_str).collect::<Option<Vec<_>>>().filter(|words| !words.is_empty())
}

/// Whether an argument may be any text.
fn is_text(property: &Value) -> bool {
    let names = |value: &Value| {
        value == "string" || value.as_array().is_some_and(|all| all.iter().any(|v| v == "string"))
    };
    let mut choices = ["anyOf", "oneOf"].iter().filter_map(|key| property[*key].as_array()).flatten();
    let says_nothing = ["type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "properties", "items"];
    names(&property["type"])
        || choices.any(|choice| names(&choice["type"]))
        || says_nothing.iter().all(|key| property.get(key).is_none())
}

/// Whether an argument is a number or a boolean.
fn is_scalar(property: &Value) -> bool {
    matches!(property["type"].as_str(), Some("integer" | "number" | "boolean"))
}

/// Returns an argument's schema with what it may refer to.
fn with_definitions(property: &Value, schema: &Map<String, Value>) -> Value {
    let mut property = property.clone();
    if let Some(members) = property.as_object_mut() {
        for key in ["$defs", "definitions"] {
            if let Some(definitions) = schema.get(key) {
                members.entry(key).or_insert_with(|| definitions.clone());
            }
        }
    }
    property
}
