//! The ways in which models mark what they think before they speak.

/// How a model marks its reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reasoning {
    /// `<think>…</think>`.
    Think,
    /// LongCat: `<longcat_think>…</longcat_think>`.
    Longcat,
    /// Mistral: `[THINK]…[/THINK]`.
    Mistral,
    /// Seed: `<seed:think>…</seed:think>`.
    Seed,
    /// Gemma 4: `<|channel>thought…<channel|>`.
    Channel,
    /// gpt-oss: the channel `analysis`.
    Harmony,
}

/// What the output begins in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// The model speaks, or says first what it does.
    #[default]
    Text,
    /// The prompt has opened the reasoning.
    Reasoning,
}

/// Harmony's tokens that are not ends of turns.
pub(super) const HARMONY_MARKERS: &[&str] =
    &["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"];

const HARMONY_OPEN: &str = "<|channel|>analysis<|message|>";

impl Reasoning {
    /// Every way.
    pub const ALL: &'static [Self] =
        &[Self::Think, Self::Longcat, Self::Mistral, Self::Seed, Self::Channel, Self::Harmony];

    /// Returns how the model of a chat template marks its reasoning; `None` if the template names none.
    #[must_use]
    pub fn of_template(source: &str) -> Option<Self> {
        // `<think>` last: the others may mention it.
        let ways = [Self::Channel, Self::Longcat, Self::Seed, Self::Mistral, Self::Think];
        if source.contains("<|channel|>") && source.contains("<|message|>") {
            return Some(Self::Harmony);
        }
        ways.into_iter().find(|way| source.contains(way.open()) || source.contains(way.close()))
    }

    /// Returns the way of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|way| way.name() == name)
    }

    /// Returns the name that configurations and clients use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Think => "think",
            Self::Longcat => "longcat",
            Self::Mistral => "mistral",
            Self::Seed => "seed",
            Self::Channel => "channel",
            Self::Harmony => "harmony",
        }
    }

    /// Returns the strings that the parser has to see even where they are special tokens, which are otherwise
    /// not text.
    #[must_use]
    pub const fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Think => &["<think>", "</think>"],
            Self::Longcat => &["<longcat_think>", "</longcat_think>"],
            Self::Mistral => &["[THINK]", "[/THINK]"],
            Self::Seed => &["<seed:think>", "</seed:think>"],
            Self::Channel => &["<|channel>", "<channel|>"],
            Self::Harmony => HARMONY_MARKERS,
        }
    }

    /// Returns the text that opens reasoning.
    #[must_use]
    pub const fn opening(self) -> &'static str {
        match self {
            Self::Think => "<think>\n",
            Self::Longcat => "<longcat_think>\n",
            Self::Mistral => "[THINK]",
            Self::Seed => "<seed:think>\n",
            Self::Channel => "<|channel>thought\n",
            Self::Harmony => HARMONY_OPEN,
        }
    }

    /// Returns the text that ends reasoning and leads to the answer.
    #[must_use]
    pub const fn closing(self) -> &'static str {
        match self {
            Self::Think => "\n</think>\n\n",
            Self::Longcat => "\n</longcat_think>\n",
            Self::Mistral => "[/THINK]",
            Self::Seed => "\n</seed:think>\n",
            Self::Channel => "\n<channel|>",
            Self::Harmony => "<|end|><|start|>assistant<|channel|>final<|message|>",
        }
    }

    /// Returns the text that ends reasoning and leads to a call.
    #[must_use]
    pub const fn closing_before_call(self) -> &'static str {
        match self {
            Self::Harmony => "<|end|><|start|>assistant",
            Self::Think | Self::Longcat | Self::Mistral | Self::Seed | Self::Channel => self.closing(),
        }
    }

    /// Returns what the end of a rendered prompt leaves open. Only what it ends with counts: a message may
    /// speak of the markers.
    #[must_use]
    pub fn start_after(self, prompt: &str) -> Start {
        if prompt.trim_end().ends_with(self.open()) { Start::Reasoning } else { Start::Text }
    }

    /// Returns the marker that opens reasoning in the text.
    pub(super) const fn open(self) -> &'static str {
        match self {
            Self::Think => "<think>",
            Self::Longcat => "<longcat_think>",
            Self::Mistral => "[THINK]",
            Self::Seed => "<seed:think>",
            Self::Channel => "<|channel>thought",
            Self::Harmony => HARMONY_OPEN,
        }
    }

    /// Returns the marker that closes it.
    #[must_use]
    pub const fn close(self) -> &'static str {
        match self {
            Self::Think => "</think>",
            Self::Longcat => "</longcat_think>",
            Self::Mistral => "[/THINK]",
            Self::Seed => "</seed:think>",
            Self::Channel => "<channel|>",
            Self::Harmony => "<|end|>",
        }
    }

    /// Whether its markers are tokens that no prose contains, so that they count anywhere in the text.
    pub(super) const fn anywhere(self) -> bool {
        matches!(self, Self::Channel)
    }
}
