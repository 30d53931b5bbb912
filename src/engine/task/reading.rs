//! What an output says: text, reasoning, tool calls. Stop strings are looked for in the text only.

use crate::engine::api::{Delta, Finish, Reading, ReasoningBudget};
use crate::output::{Parser, Piece};
use crate::text::StopMatcher;

/// White space held back, in bytes; more of it is text.
const SPACE_BYTES_MAX: usize = 1024;

/// The reader of one output.
#[derive(Debug)]
pub(super) struct Reader {
    /// None where all of it is text.
    parser: Option<Parser>,
    stops: StopMatcher,
    /// White space at the end of the text so far, while calls are read: before one it is none of the text.
    space: Option<String>,
    /// Number of tokens that were reasoning.
    pub(super) reasoning_tokens: u32,
    /// Number of calls that are whole.
    calls: u32,
    one_call: bool,
    budget: Option<ReasoningBudget>,
    /// Number of the budget's closing tokens that came, while they have to come.
    closed: Option<usize>,
}

impl Reader {
    pub(super) fn new(reading: Option<Box<Reading>>, stops: StopMatcher) -> Self {
        let (parser, calls, one_call, budget) = match reading.map(|reading| *reading) {
            None => (None, false, false, None),
            Some(Reading { parser, calls, one_call, budget }) => (Some(parser), calls, one_call, budget),
        };
        let space = calls.then(String::new);
        let mut reader =
            Self { parser, stops, space, reasoning_tokens: 0, calls: 0, one_call, budget, closed: None };
        reader.keep_budget();
        reader
    }

    /// Returns the token that has to come next, if one has to.
    pub(super) fn forced(&self) -> Option<u32> {
        self.budget.as_ref()?.closing.get(self.closed?).copied()
    }

    /// Returns whether the next token is the answer's.
    pub(super) fn speaks(&self) -> bool {
        self.forced().is_none() && self.parser.as_ref().is_none_or(Parser::speaks)
    }

    /// Returns how many bytes have come of what closes the reasoning.
    pub(super) fn closing_came(&self) -> usize {
        self.parser.as_ref().map_or(0, Parser::closing_came)
    }

    /// Begins to close reasoning that has had its tokens.
    fn keep_budget(&mut self) {
        let (Some(parser), Some(budget)) = (&self.parser, &self.budget) else { return };
        self.closed = match self.closed.map(|closed| closed + 1) {
            Some(closed) if closed < budget.closing.len() => Some(closed),
            _ => (parser.in_reasoning() && self.reasoning_tokens >= budget.tokens).then_some(0),
        };
    }

    /// Takes the text of a token, and adds what it says to `delta`. Returns how it ends the output.
    pub(super) fn push(&mut self, text: &str, delta: &mut Delta) -> Option<Finish> {
        let Some(parser) = &mut self.parser else { return self.push_text(text, delta) };
        let was_reasoning = parser.in_reasoning() || self.closed.is_some();
        let pieces = parser.push(text);
        self.reasoning_tokens += u32::from(was_reasoning || parser.in_reasoning());
        self.keep_budget();
        self.add(pieces, delta)
    }

    /// Takes the end of the text, and adds all that was held back; it may still have a stop string.
    /// `by_length` says that it was cut off.
    pub(super) fn finish(&mut self, text: &str, by_length: bool, delta: &mut Delta) -> Option<Finish> {
        let mut stop = match &mut self.parser {
            None => self.push_text(text, delta),
            Some(parser) => {
                let mut pieces = parser.push(text);
                if by_length && parser.in_call() {
                    // The call is left out, and what would have stood before it.
                    self.space.iter_mut().for_each(String::clear);
                }
                pieces.extend(parser.finish(by_length));
                self.add(pieces, delta)
            }
        };
        if stop.is_none()
            && let Some(space) = &mut self.space
        {
            let space = std::mem::take(space);
            stop = self.push_text(&space, delta);
        }
        if stop.is_none() {
            delta.text.push_str(&self.stops.finish());
            stop = (self.calls > 0 && !by_length).then_some(Finish::ToolCalls);
        }
        stop
    }

    /// Adds pieces up to a stop string, or to the end of the only call that there may be and of what is
    /// around it.
    fn add(&mut self, pieces: Vec<Piece>, delta: &mut Delta) -> Option<Finish> {
        for piece in pieces {
            if self.has_only_call() {
                if matches!(piece, Piece::CallBegin { .. }) {
                    return Some(Finish::ToolCalls);
                }
                continue;
            }
            match piece {
                Piece::Text(text) => {
                    let text = self.hold_space(text);
                    if let Some(stop) = self.push_text(&text, delta) {
                        return Some(stop);
                    }
                }
                Piece::Reasoning(text) => delta.reasoning.push_str(&text),
                Piece::CallArguments { index, fragment } => {
                    if let Some(Piece::CallArguments { index: last, fragment: before }) =
                        delta.calls.last_mut()
                        && *last == index
                    {
                        before.push_str(&fragment);
                    } else {
                        delta.calls.push(Piece::CallArguments { index, fragment });
                    }
                }
                Piece::CallEnd { .. } => {
                    self.calls += 1;
                    self.space.iter_mut().for_each(String::clear);
                    delta.calls.push(piece);
                    // What may have begun a stop string is text.
                    delta.text.push_str(&self.stops.part());
                }
                Piece::CallBegin { .. } | Piece::CallDropped { .. } => delta.calls.push(piece),
            }
        }
        let in_call = self.parser.as_ref().is_some_and(Parser::in_call);
        (self.has_only_call() && !in_call).then_some(Finish::ToolCalls)
    }

    /// Returns whether the only call that there may be has come.
    fn has_only_call(&self) -> bool {
        self.one_call && self.calls > 0
    }

    /// Returns what is text by now of what was held back and of what follows.
    fn hold_space(&mut self, text: String) -> String {
        let Some(space) = &mut self.space else { return text };
        let said = text.trim_end().len();
        if said == 0 && space.len() + text.len() <= SPACE_BYTES_MAX {
            space.push_str(&text);
            return String::new();
        }
        let end = if said == 0 { text.len() } else { said };
        let mut whole = std::mem::replace(space, text[end..].to_owned());
        whole.push_str(&text[..end]);
        whole
    }

    fn push_text(&mut self, text: &str, delta: &mut Delta) -> Option<Finish> {
        let step = self.stops.push(text);
        delta.text.push_str(&step.emit);
        step.matched.map(Finish::StopString)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{Format, Reasoning, Start, Syntax};

    fn reader(start: Start, stops: &[&str]) -> Reader {
        bounded(start, stops, false, None)
    }

    fn bounded(start: Start, stops: &[&str], one_call: bool, budget: Option<u32>) -> Reader {
        let syntax = Syntax { format: Some(Format::Hermes), reasoning: Some(Reasoning::Think) };
        let budget = budget.map(|tokens| ReasoningBudget { tokens, closing: [8, 9].into() });
        let reading =
            Reading { parser: Parser::new(syntax, [].into(), start), calls: true, one_call, budget };
        let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
        Reader::new(Some(Box::new(reading)), StopMatcher::new(stops))
    }

    /// Reads texts as tokens, up to an end.
    fn read(reader: &mut Reader, tokens: &[&str], by_length: bool) -> (Delta, Option<Finish>) {
        let mut delta = Delta::default();
        let mut tokens = tokens.iter();
        let stop = tokens.find_map(|token| reader.push(token, &mut delta));
        let end = stop.or_else(|| reader.finish("", by_length, &mut delta));
        (delta, end)
    }

    #[test]
    fn stop_strings_are_found_in_text_only() {
        let tokens = ["STOP", "</think>", "yes ", "ST", "OP", " no"];
        let (delta, end) = read(&mut reader(Start::Reasoning, &["STOP"]), &tokens, false);
        assert_eq!((&*delta.reasoning, &*delta.text, end), ("STOP", "yes ", Some(Finish::StopString(0))));
        let call = ["<tool_call>", r#"{"name": "STOP", "#, r#""arguments": {}}"#, "</tool_call>"];
        let (delta, end) = read(&mut reader(Start::Text, &["STOP"]), &call, false);
        assert_eq!((&*delta.text, end), ("", Some(Finish::ToolCalls)));
        // It is none that a call stands within.
        let within = ["ST", r#"<tool_call>{"name": "f", "arguments": {}}</tool_call>"#, "OP"];
        let (delta, end) = read(&mut reader(Start::Text, &["STOP"]), &within, false);
        assert_eq!((&*delta.text, end), ("STOP", Some(Finish::ToolCalls)));
        // What may begin a stop string is text in the end.
        let (delta, end) = read(&mut reader(Start::Text, &["STOP"]), &["yes ST"], false);
        assert_eq!((&*delta.text, end), ("yes ST", None));
    }

    #[test]
    fn white_space_before_a_call_is_none_of_the_text() {
        let call = r#"<tool_call>{"name": "f", "arguments": {}}</tool_call>"#;
        let (delta, _) = read(&mut reader(Start::Text, &[]), &["a", " \n", "b", "\n", "\n", call], false);
        assert_eq!(delta.text, "a \nb");
        let (delta, _) = read(&mut reader(Start::Text, &[]), &["a", "\n", "<tool_call>no"], false);
        assert_eq!(delta.text, "a\n<tool_call>no");
        let (delta, end) = read(&mut reader(Start::Text, &["\n\n"]), &["a", "\n", "\n"], false);
        assert_eq!((&*delta.text, end), ("a", Some(Finish::StopString(0))));
        let (delta, _) = read(&mut reader(Start::Text, &[]), &["a", "\n"], false);
        assert_eq!(delta.text, "a\n");
        // What is held back is bounded.
        let mut held = reader(Start::Text, &[]);
        let mut delta = Delta::default();
        held.push("a", &mut delta);
        (0..SPACE_BYTES_MAX * 3).for_each(|_| assert_eq!(held.push("\n", &mut delta), None));
        assert!(delta.text.len() > SPACE_BYTES_MAX * 2);
    }

    #[test]
    fn tokens_of_reasoning_are_counted() {
        let mut read_on = reader(Start::Text, &[]);
        read(&mut read_on, &["<think>", "a", "b", "</think>", "c", "d"], false);
        assert_eq!(read_on.reasoning_tokens, 4);
        let mut begun = reader(Start::Reasoning, &[]);
        read(&mut begun, &["a", "</think>", "c"], false);
        assert_eq!(begun.reasoning_tokens, 2);
    }

    #[test]
    fn parts_of_arguments_coalesce() {
        let call = ["<tool_call>", r#"{"name": "f", "arguments": {"a": "#, "1", "2", "}}", "</tool_call>"];
        let (delta, _) = read(&mut reader(Start::Text, &[]), &call, false);
        let fragment = r#"{"a": 12}"#.to_owned();
        let expected = [
            Piece::CallBegin { index: 0, id: None, name: "f".into() },
            Piece::CallArguments { index: 0, fragment },
            Piece::CallEnd { index: 0 },
        ];
        assert_eq!(delta.calls, expected);
    }

    #[test]
    fn reasoning_is_closed_once_it_has_had_its_tokens() {
        let mut delta = Delta::default();
        for start in [Start::Text, Start::Reasoning] {
            let mut reader = bounded(start, &[], false, Some(2));
            let opened = if start == Start::Text { "<think>" } else { "hm" };
            assert_eq!((reader.forced(), reader.push(opened, &mut delta)), (None, None));
            assert_eq!((reader.forced(), reader.push(" so", &mut delta)), (None, None));
            assert_eq!((reader.forced(), reader.push("</thi", &mut delta)), (Some(8), None));
            assert_eq!((reader.forced(), reader.push("nk>", &mut delta)), (Some(9), None));
            assert_eq!((reader.forced(), reader.push("yes", &mut delta)), (None, None));
            assert_eq!(reader.reasoning_tokens, 4);
        }
        assert_eq!(bounded(Start::Reasoning, &[], false, Some(0)).forced(), Some(8));
        assert_eq!(bounded(Start::Text, &[], false, Some(0)).forced(), None);
        let mut early = bounded(Start::Reasoning, &[], false, Some(3));
        early.push("</think>", &mut delta);
        early.push("a b c d", &mut delta);
        assert_eq!(early.forced(), None);
    }

    #[test]
    fn an_output_may_end_after_its_first_call() {
        let call = r#"<tool_call>{"name": "f", "arguments": {}}</tool_call>"#;
        let two = ["a", call, call];
        let (delta, end) = read(&mut bounded(Start::Text, &["ab"], true, None), &two, false);
        assert_eq!((&*delta.text, end), ("a", Some(Finish::ToolCalls)));
        let ends = |delta: &Delta| delta.calls.iter().filter(|p| matches!(p, Piece::CallEnd { .. })).count();
        assert_eq!(ends(&delta), 1);
        // Not before what closes the block, but before another call in it.
        let coder = {
            let syntax = Syntax { format: Some(Format::Qwen3Coder), reasoning: None };
            let parser = Parser::new(syntax, [].into(), Start::Text);
            let reading = Reading { parser, calls: true, one_call: true, budget: None };
            move || Reader::new(Some(Box::new(reading.clone())), StopMatcher::new([].into()))
        };
        let call = "<tool_call>\n<function=f>\n</function>";
        for (tokens, closed) in [
            ([call, "\n", "</tool_call>"], Some(2)),
            ([call, "\n<function=g>", ""], Some(1)),
            ([call, "", ""], None),
        ] {
            let (mut reader, mut delta) = (coder(), Delta::default());
            let at =
                tokens.iter().position(|token| reader.push(token, &mut delta) == Some(Finish::ToolCalls));
            assert_eq!((at, ends(&delta), &*delta.text), (closed, 1, ""), "{tokens:?}");
            if closed.is_none() {
                assert_eq!(reader.finish("", true, &mut delta), Some(Finish::ToolCalls));
            }
        }
        let (delta, _) = read(&mut reader(Start::Text, &[]), &two, false);
        assert_eq!(ends(&delta), 2);
    }

    #[test]
    fn a_call_that_was_cut_off_ends_nothing() {
        let call = ["<tool_call>", r#"{"name": "f", "argum"#];
        let (delta, end) = read(&mut reader(Start::Text, &[]), &call, true);
        assert_eq!((&*delta.text, end), ("", None));
        let cut = ["a", "\n", "<tool_call>", "{"];
        assert_eq!(read(&mut reader(Start::Text, &[]), &cut, true).0.text, "a");
    }
}
