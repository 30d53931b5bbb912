//! The formats in which models write calls of tools: their names, how a chat template tells which one it is,
//! and what opens a block of calls.

use super::headed::{DEEPSEEK_V3, DEEPSEEK_V3_1, Headed, KIMI_K2};
use super::listed::Listed;
use super::literal::{FUNCTION_GEMMA, GEMMA4, Literal, PYTHONIC};
use super::reader::Reader;
use super::tagged::{GLM4, MINIMAX_M2, QWEN3_CODER, Tagged};

/// How a model writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Hermes, Qwen 2.5 and 3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.
    Hermes,
    /// Qwen3-Coder, Qwen 3.5, Nemotron 3:
    /// `<tool_call><function=f><parameter=a>…</parameter></function></tool_call>`.
    Qwen3Coder,
    /// Llama 3: `{"name": …, "parameters": {…}}` at the beginning or behind `<|python_tag|>`.
    Llama3Json,
    /// Mistral: `[TOOL_CALLS][{…}]` or `[TOOL_CALLS]f[ARGS]{…}`.
    Mistral,
    /// LFM2: `<|tool_call_start|>[f(a=1)]<|tool_call_end|>`.
    Pythonic,
    /// GLM 4.5 to 4.7: `<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>`.
    Glm4,
    /// DeepSeek V3 and R1: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>f`, then the arguments as a block of code.
    DeepseekV3,
    /// DeepSeek V3.1: `<｜tool▁call▁begin｜>f<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`.
    DeepseekV31,
    /// Kimi K2: `<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{…}<|tool_call_end|>`.
    KimiK2,
    /// MiniMax M2: `<minimax:tool_call><invoke name="f"><parameter name="a">…</parameter></invoke>…`.
    MinimaxM2,
    /// Gemma 4: `<|tool_call>call:f{a:<|"|>…<|"|>}<tool_call|>`.
    Gemma4,
    /// FunctionGemma: `<start_function_call>call:f{a:<escape>…<escape>}<end_function_call>`.
    FunctionGemma,
    /// Phi-4-mini: `functools[{…}]` or `<|tool_call|>[{…}]<|/tool_call|>`.
    Phi4,
    /// gpt-oss: a message on the channel `commentary` to `functions.f`.
    Harmony,
    /// Nemotron: `<TOOLCALL>[{…}]</TOOLCALL>`.
    Nemotron,
    /// Any model that is told to: our own instructions, Hermes' form.
    Prompted,
}

/// What stands in a chat template whose model writes this format; the first line that fits is it. mlx-lm's
/// `_infer_tool_parser` has this order for those that it knows.
const SIGNS: &[(&[&str], Format)] = &[
    (&["<minimax:tool_call>"], Format::MinimaxM2),
    (&["<|tool_call>", "<tool_call|>"], Format::Gemma4),
    (&["<start_function_call>"], Format::FunctionGemma),
    (&["<arg_key>"], Format::Glm4),
    (&["<|tool_list_start|>"], Format::Pythonic),
    (&["<|tool_call_start|>"], Format::Pythonic),
    (&["<tool_call>\\n<function="], Format::Qwen3Coder),
    (&["<tool_call>\n<function="], Format::Qwen3Coder),
    (&["<|tool_calls_section_begin|>"], Format::KimiK2),
    (&["[TOOL_CALLS]"], Format::Mistral),
    (&["<|channel|>", "functions."], Format::Harmony),
    (&["<｜tool▁sep｜>", "```json"], Format::DeepseekV3),
    (&["<｜tool▁sep｜>"], Format::DeepseekV31),
    (&["<TOOLCALL>"], Format::Nemotron),
    (&["functools["], Format::Phi4),
    (&["<|tool|>", "<|/tool|>"], Format::Phi4),
    (&["<tool_call>"], Format::Hermes),
    (&["<|python_tag|>"], Format::Llama3Json),
    (&["<|start_header_id|>", "\"parameters\""], Format::Llama3Json),
];

impl Format {
    /// Every format.
    pub const ALL: &'static [Self] = &[
        Self::Hermes,
        Self::Qwen3Coder,
        Self::Llama3Json,
        Self::Mistral,
        Self::Pythonic,
        Self::Glm4,
        Self::DeepseekV3,
        Self::DeepseekV31,
        Self::KimiK2,
        Self::MinimaxM2,
        Self::Gemma4,
        Self::FunctionGemma,
        Self::Phi4,
        Self::Harmony,
        Self::Nemotron,
        Self::Prompted,
    ];

    /// Returns the format of a chat template's model; `None` if the template writes no calls that we know.
    #[must_use]
    pub fn of_template(source: &str) -> Option<Self> {
        let fits = |signs: &[&str]| signs.iter().all(|sign| source.contains(sign));
        SIGNS.iter().find(|(signs, _)| fits(signs)).map(|(_, format)| *format)
    }

    /// Returns the format of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|format| format.name() == name)
    }

    /// Returns the name that configurations and clients use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::Qwen3Coder => "qwen3_coder",
            Self::Llama3Json => "llama3_json",
            Self::Mistral => "mistral",
            Self::Pythonic => "pythonic",
            Self::Glm4 => "glm4",
            Self::DeepseekV3 => "deepseek_v3",
            Self::DeepseekV31 => "deepseek_v3_1",
            Self::KimiK2 => "kimi_k2",
            Self::MinimaxM2 => "minimax_m2",
            Self::Gemma4 => "gemma4",
            Self::FunctionGemma => "function_gemma",
            Self::Phi4 => "phi4",
            Self::Harmony => "harmony",
            Self::Nemotron => "nemotron",
            Self::Prompted => "prompted",
        }
    }

    /// Returns the strings that the parser has to see even where they are special tokens, which are otherwise
    /// not text.
    #[must_use]
    pub const fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes | Self::Prompted | Self::Qwen3Coder => &["<tool_call>", "</tool_call>"],
            Self::Llama3Json => &["<|python_tag|>"],
            Self::Mistral => &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
            Self::Pythonic => &["<|tool_call_start|>", "<|tool_call_end|>"],
            Self::Glm4 => {
                &["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
            }
            Self::DeepseekV3 | Self::DeepseekV31 => &[
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁calls▁end｜>",
                "<｜tool▁call▁begin｜>",
                "<｜tool▁call▁end｜>",
                "<｜tool▁sep｜>",
            ],
            Self::KimiK2 => &[
                "<|tool_calls_section_begin|>",
                "<|tool_calls_section_end|>",
                "<|tool_call_begin|>",
                "<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
            ],
            Self::MinimaxM2 => &["<minimax:tool_call>", "</minimax:tool_call>"],
            Self::Gemma4 => &["<|tool_call>", "<tool_call|>", "<|\"|>"],
            Self::FunctionGemma => &["<start_function_call>", "<end_function_call>", "<escape>"],
            Self::Phi4 => &["<|tool_call|>", "<|/tool_call|>"],
            Self::Harmony => super::reasoning::HARMONY_MARKERS,
            Self::Nemotron => &["<TOOLCALL>", "</TOOLCALL>"],
        }
    }

    /// Returns an id for a call to which the model gave none, in the form that its template expects:
    /// `ordinal` counts the calls of the conversation, `random` tells calls apart elsewhere.
    #[must_use]
    pub fn call_id(self, name: &str, ordinal: u64, random: u128) -> String {
        match self {
            Self::Mistral => {
                let characters = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
                let mut rest = random;
                let mut id = String::new();
                for _ in 0..9 {
                    let digit = usize::try_from(rest % 62).unwrap_or_default();
                    id.push(char::from(characters[digit]));
                    rest /= 62;
                }
                id
            }
            Self::KimiK2 => format!("functions.{name}:{ordinal}"),
            Self::Hermes
            | Self::Qwen3Coder
            | Self::Llama3Json
            | Self::Pythonic
            | Self::Glm4
            | Self::DeepseekV3
            | Self::DeepseekV31
            | Self::MinimaxM2
            | Self::Gemma4
            | Self::FunctionGemma
            | Self::Phi4
            | Self::Harmony
            | Self::Nemotron
            | Self::Prompted => format!("call_{:024x}", random & ((1 << 96) - 1)),
        }
    }

    /// Whether the format writes one call in an answer.
    #[must_use]
    pub const fn one_call_only(self) -> bool {
        matches!(self, Self::Harmony)
    }

    /// Whether its own messages hold the reasoning too.
    #[must_use]
    pub const fn reasons_itself(self) -> bool {
        matches!(self, Self::Harmony)
    }

    /// Returns what opens a block of calls in the text.
    pub(super) const fn openers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes | Self::Prompted | Self::Glm4 => &["<tool_call>"],
            // Some of these models leave out the outer tag.
            Self::Qwen3Coder => &["<tool_call>", "<function="],
            Self::Llama3Json => &["<|python_tag|>"],
            Self::Mistral => &["[TOOL_CALLS]"],
            Self::Pythonic => &["<|tool_call_start|>"],
            Self::DeepseekV3 | Self::DeepseekV31 => &["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"],
            Self::KimiK2 => &["<|tool_calls_section_begin|>", "<|tool_call_begin|>"],
            Self::MinimaxM2 => &["<minimax:tool_call>"],
            Self::Gemma4 => &["<|tool_call>"],
            Self::FunctionGemma => &["<start_function_call>"],
            Self::Phi4 => &["<|tool_call|>", "functools["],
            Self::Harmony => &[],
            Self::Nemotron => &["<TOOLCALL>"],
        }
    }

    /// Returns the reader of a block, by the index of what opened it; none for a format without openers.
    pub(super) fn reader(self, opener: usize) -> Option<Reader> {
        let inner = opener > 0;
        Some(match self {
            Self::Hermes | Self::Prompted => Reader::Listed(Listed::new("</tool_call>", false)),
            Self::Llama3Json => Reader::Listed(Listed::new("", true)),
            Self::Phi4 if inner => Reader::Listed(Listed::new("", false)),
            Self::Phi4 => Reader::Listed(Listed::new("<|/tool_call|>", false)),
            Self::Nemotron => Reader::Listed(Listed::new("</TOOLCALL>", false)),
            Self::Mistral => Reader::Mistral,
            Self::Qwen3Coder => Reader::Tagged(Tagged::new(&QWEN3_CODER, inner)),
            Self::MinimaxM2 => Reader::Tagged(Tagged::new(&MINIMAX_M2, false)),
            Self::Glm4 => Reader::Tagged(Tagged::new(&GLM4, true)),
            Self::DeepseekV3 => Reader::Headed(Headed::new(&DEEPSEEK_V3, inner)),
            Self::DeepseekV31 => Reader::Headed(Headed::new(&DEEPSEEK_V3_1, inner)),
            Self::KimiK2 => Reader::Headed(Headed::new(&KIMI_K2, inner)),
            Self::Pythonic => Reader::Literal(Literal::new(&PYTHONIC)),
            Self::Gemma4 => Reader::Literal(Literal::new(&GEMMA4)),
            Self::FunctionGemma => Reader::Literal(Literal::new(&FUNCTION_GEMMA)),
            Self::Harmony => return None,
        })
    }

    /// Whether what was read of a block, without a call's name, may be prose or an answer in JSON as well.
    pub(super) fn may_be_prose(self, raw: &str) -> bool {
        match self {
            Self::Llama3Json => raw.starts_with('{'),
            Self::Phi4 => raw.starts_with("functools") && !raw.contains('{'),
            Self::Hermes
            | Self::Qwen3Coder
            | Self::Mistral
            | Self::Pythonic
            | Self::Glm4
            | Self::DeepseekV3
            | Self::DeepseekV31
            | Self::KimiK2
            | Self::MinimaxM2
            | Self::Gemma4
            | Self::FunctionGemma
            | Self::Harmony
            | Self::Nemotron
            | Self::Prompted => false,
        }
    }
}
