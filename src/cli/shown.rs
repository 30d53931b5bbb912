//! An answer as `generate` and `chat` show it: its text on stdout; its tool calls there too, a JSON object on
//! a line for each; its reasoning, if it is streamed, dimmed, on stderr if that is a terminal.

use std::io;

use mlxd_client::v1::{GenerateChoice, GenerateDelta, GenerateResponse, ToolCall, ToolCallDelta};

use super::{json, out};

/// The sequences with which terminals begin and end dimmed text (ECMA-48, SGR 2 and 22).
const DIM: &str = "\x1b[2m";
const NOT_DIM: &str = "\x1b[22m";

/// What is shown so far. It ends an open last line when it is closed or dropped.
#[derive(Default)]
pub(crate) struct Shown {
    line: OpenLine,
    /// Whether reasoning was shown last.
    reasons: bool,
    /// The tool call that has begun.
    call: ToolCall,
}

impl Shown {
    /// Shows more of the answer.
    pub(crate) fn add(&mut self, delta: GenerateDelta) -> io::Result<()> {
        let GenerateDelta { text, reasoning, tool_calls, .. } = delta;
        self.add_reasoning(&reasoning)?;
        if !text.is_empty() {
            self.end_reasoning();
            self.line.write(&text)?;
        }
        tool_calls.into_iter().try_for_each(|part| self.add_call(part))
    }

    fn add_reasoning(&mut self, reasoning: &str) -> io::Result<()> {
        if reasoning.is_empty() || !out::notes_are_watched() {
            return Ok(());
        }
        self.line.close()?;
        self.reasons = true;
        out::note(&[DIM, reasoning, NOT_DIM].concat());
        Ok(())
    }

    fn end_reasoning(&mut self) {
        if std::mem::take(&mut self.reasons) {
            out::note("\n\n");
        }
    }

    fn add_call(&mut self, part: ToolCallDelta) -> io::Result<()> {
        let Some(call) = self.call.add(part) else { return Ok(()) };
        self.end_reasoning();
        self.line.close()?;
        json::print(&json::tool_call(&call))
    }

    /// Ends the last line.
    pub(crate) fn close(&mut self) -> io::Result<()> {
        self.end_reasoning();
        self.line.close()
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        // Cancelled or failed within a line: the next error or prompt must start a new one.
        _ = self.close();
    }
}

/// Writer to stdout that knows whether its last line is open.
#[derive(Default)]
struct OpenLine {
    open: bool,
}

impl OpenLine {
    fn write(&mut self, text: &str) -> io::Result<()> {
        let Some(last) = text.chars().last() else { return Ok(()) };
        self.open = last != '\n';
        out::data(text)
    }

    fn close(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.open) { out::data("\n") } else { Ok(()) }
    }
}

/// Formats the texts and tool calls of a whole answer: several each after a line with its number.
pub(crate) fn choices(response: &GenerateResponse) -> String {
    match response.choices.as_slice() {
        [] | [_] => said(&response.text, &response.tool_calls),
        choices => {
            let choice = |choice: &GenerateChoice| {
                format!("[{}]\n{}", choice.choice, said(&choice.text, &choice.tool_calls))
            };
            choices.iter().map(choice).collect()
        }
    }
}

/// Formats a text and the calls after it, a line for each.
fn said(text: &str, calls: &[ToolCall]) -> String {
    let text = if text.is_empty() && !calls.is_empty() { String::new() } else { format!("{text}\n") };
    calls.iter().fold(text, |before, call| format!("{before}{}\n", json::tool_call(call)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_text_and_a_line_for_each_call() {
        let calls = vec![ToolCall { id: "1".into(), name: "f".into(), arguments_json: "{}".into() }];
        let line = r#"{"id":"1","name":"f","arguments":{}}"#;
        let one = GenerateResponse { tool_calls: calls.clone(), ..GenerateResponse::default() };
        assert_eq!(choices(&one), format!("{line}\n"));
        let said = |choice: u32, text: &str, tool_calls| GenerateChoice {
            choice,
            text: text.into(),
            tool_calls,
            ..GenerateChoice::default()
        };
        let two = vec![said(0, "a", calls), said(1, "", vec![])];
        let two = GenerateResponse { choices: two, ..GenerateResponse::default() };
        assert_eq!(choices(&two), format!("[0]\na\n{line}\n[1]\n\n"));
    }
}
