//! Grammars that make a model call a tool, in the Lark of llguidance.
//!
//! A marker that is a special token of the tokenizer is named by its id, since text cannot be it. Arguments
//! that are JSON follow the tool's schema by `%json`. Between tags, and in Gemma's form, each argument
//! follows its own schema (`bare`); in Python's it is JSON.

use serde_json::{Map, Value, json};

use super::Tool;
use super::bare::{Bare, TEXT_BEFORE_TOKEN, Tail};
use super::calls::is_name;
use super::format::Format;
use super::reasoning::{Reasoning, Start};

/// Longest grammar, in bytes.
const GRAMMAR_BYTES_MAX: usize = 8 << 20;

/// Why there is no grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoGrammar {
    /// Nothing may be called.
    #[error("there are no tools to call")]
    Empty,
    /// A function's name that the parser would not read.
    #[error("the tool call format {format} cannot write the name {name:?}")]
    Name {
        /// The format's name.
        format: &'static str,
        /// The function's.
        name: String,
    },
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
    /// The grammar would be too long.
    #[error("the grammar of the tools is longer than {bytes_max} bytes")]
    TooLarge {
        /// How long it may be.
        bytes_max: usize,
    },
}

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
        let (before, after) = shape.call.split_once("ARGUMENTS").unwrap_or((shape.call, ""));
        let (before_name, after_name) = before.split_once("NAME").unwrap_or((before, ""));
        let mut calls = Vec::new();
        for tool in tools {
            if !is_name(&tool.name) || tool.name.contains('\\') {
                return Err(NoGrammar::Name { format: self.name(), name: tool.name.clone() });
            }
            let arguments = writer.arguments(tool)?;
            let before = [writer.literal(before_name), quoted(&tool.name), writer.literal(after_name)];
            calls.push(
                writer.rule(&[&before.join(" "), &arguments, &writer.literal(after)].map(String::as_str))?,
            );
        }
        let call = calls.join(" | ");
        let [open, between, close] = shape.around.map(|text| writer.literal(text));
        let several = parallel && !self.one_call_only();
        let more = if several { format!("({between} call)*") } else { String::new() };
        let Writer { rules, .. } = writer;
        Ok(format!("start: {open} call {more} {close}\ncall: {call}\n{rules}"))
    }

    /// Returns the grammar of a whole output that calls, where reasoning is a part of the format itself, as
    /// in Harmony; of what follows reasoning elsewhere. The output begins in `start`.
    ///
    /// # Errors
    /// As [`Self::call_grammar`].
    pub fn output_grammar(
        self,
        tools: &[Tool],
        parallel: bool,
        special: &dyn Fn(&str) -> Option<u32>,
        start: Start,
    ) -> Result<String, NoGrammar> {
        let calls = self.call_grammar(tools, parallel, special)?;
        // Only a special token ends a text.
        if !self.reasons_itself() || special("<|end|>").is_none() {
            return Ok(calls);
        }
        let writer = Writer { format: self, special, rules: String::new(), count: 0 };
        let open = writer.literal(Reasoning::Harmony.opening());
        let close = writer.literal(Reasoning::Harmony.closing_before_call());
        let thought = match start {
            Start::Text => format!("({open} {TEXT_BEFORE_TOKEN} {close})?"),
            Start::Reasoning => format!("{TEXT_BEFORE_TOKEN} {close}"),
        };
        Ok(format!("start: {thought} calls\n{}", calls.replacen("start:", "calls:", 1)))
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

/// Writes the rules of a grammar.
struct Writer<'a> {
    format: Format,
    special: Special<'a>,
    rules: String,
    count: usize,
}

impl Writer<'_> {
    /// Adds a rule and returns its name.
    fn rule(&mut self, body: &[&str]) -> Result<String, NoGrammar> {
        let name = format!("r{}", self.count);
        self.count += 1;
        self.rules += &format!("{name}: {}\n", body.join(" "));
        if self.rules.len() > GRAMMAR_BYTES_MAX {
            return Err(NoGrammar::TooLarge { bytes_max: GRAMMAR_BYTES_MAX });
        }
        Ok(name)
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
            parts.extend((!plain.is_empty()).then(|| quoted(&plain)));
            plain.clear();
            parts.push(format!("<[{id}]>"));
            rest = &rest[length..];
        }
        parts.extend((!plain.is_empty()).then(|| quoted(&plain)));
        parts.join(" ")
    }

    /// Returns the rule of a tool's arguments.
    fn arguments(&mut self, tool: &Tool) -> Result<String, NoGrammar> {
        if let Some(pairs) = self.format.pairs() {
            return self.pairs(tool, pairs);
        }
        let mut schema = tool.parameters.as_object().cloned().unwrap_or_default();
        schema.entry("type").or_insert_with(|| json!("object"));
        let arguments = self.rule(&["%json", &Value::Object(schema).to_string()])?;
        if self.format != Format::KimiK2 {
            return Ok(arguments);
        }
        // The call's number stands between its name and its arguments.
        let marker = self.literal("<|tool_call_argument_begin|>");
        self.rule(&["/[0-9]{1,4}/", &marker, &arguments])
    }

    /// Returns the rule of arguments that are written one by one: those of the schema in its order, then
    /// those that it requires without a word about them.
    fn pairs(&mut self, tool: &Tool, pairs: [&'static str; 4]) -> Result<String, NoGrammar> {
        let (empty, silent) = (Map::new(), json!({}));
        let [before, within, behind, between] = pairs;
        let properties = tool.parameters["properties"].as_object().unwrap_or(&empty);
        let required = tool.parameters["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let required: std::collections::BTreeSet<&str> = required.collect();
        let known = properties.iter().map(|(key, property)| (key.as_str(), property));
        let unknown =
            required.iter().filter(|key| !properties.contains_key(**key)).map(|key| (*key, &silent));
        let (mut needed, mut optional) = (Vec::new(), Vec::new());
        for (key, property) in known.chain(unknown) {
            let refuse = |reason| NoGrammar::Argument {
                format: self.format.name(),
                tool: tool.name.clone(),
                argument: key.to_owned(),
                reason,
            };
            let bare = Bare { format: self.format, root: &tool.parameters, property };
            let own = self.literal(self.format.quote().unwrap_or_default());
            let after = self.literal(behind);
            let ended_by_token = own.starts_with("<[") || after.starts_with("<[");
            let tail = Tail { behind, after, own, ended_by_token };
            let value = bare.name(key).and_then(|()| bare.value(&tail)).map_err(refuse)?;
            let name = self.literal(&format!("{before}{key}{within}"));
            let pair = self.rule(&[&name, &value])?;
            if required.contains(key) { needed.push(pair) } else { optional.push(pair) }
        }
        let between = self.literal(between);
        self.joined(&needed, &optional, &between)
    }

    /// Joins pairs of which some may be left out, in their order; as long as there are pairs, not their
    /// square.
    fn joined(&mut self, needed: &[String], optional: &[String], between: &str) -> Result<String, NoGrammar> {
        let mut rest = quoted("");
        if needed.is_empty() {
            // `first` begins with this pair or a later one; `rest` is what may follow a pair.
            let mut first = quoted("");
            for pair in optional.iter().rev() {
                first = self.rule(&[pair, &rest, "|", &first])?;
                rest = self.rule(&["(", between, pair, ")?", &rest])?;
            }
            return Ok(first);
        }
        for pair in optional.iter().rev() {
            rest = self.rule(&["(", between, pair, ")?", &rest])?;
        }
        let needed = needed.join(&format!(" {between} "));
        self.rule(&[&needed, &rest])
    }
}

/// Writes a text as Lark does.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
