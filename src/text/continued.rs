//! A conversation whose last message, the assistant's, is not at its end: the model goes on with it. The
//! template is given the message with a word at its end that no text has, and what it writes is cut there.
//! So it does not matter what templates trim from a message or write after it, nor where else it stands. It
//! is what transformers does for `continue_final_message` (`chat_template_utils.py`), which searched for the
//! message itself before.

use serde_json::Value;

use super::{ChatTemplate, Conversation, Rendered, TextError};

/// A word that no template has and none changes. It ends in more of [`TAIL`] than any other of its kind in
/// the texts.
const STEM: &str = "qjxzv";
const TAIL: &str = "w";

/// What ends a message's reasoning where it is part of the content.
const REASONING_END: &str = "</think>";

impl ChatTemplate {
    /// Returns the text of a conversation up to the end of its last message's content, of at most `bytes_max`
    /// bytes.
    ///
    /// # Errors
    /// As of [`Self::render`]; or the template does not write the end of that message as it is.
    pub fn render_continued(
        &self,
        conversation: &Conversation<'_>,
        bytes_max: usize,
    ) -> Result<Rendered, TextError> {
        let Conversation { messages, tools, arguments, .. } = *conversation;
        let all = messages.iter().chain(tools).chain(arguments.values());
        let word = absent_word(&all.map(Value::to_string).collect::<String>());
        let mut messages = messages.to_vec();
        let Some(last) = messages.last_mut() else { return Err(TextError::NotContinued) };
        let content = last["content"].as_str().unwrap_or_default().to_owned();
        last["content"] = [content.as_str(), word.as_str()].concat().into();
        let open = Conversation { messages: &messages, add_generation_prompt: false, ..*conversation };
        let Rendered { mut text, mark } = self.render(&open, bytes_max.saturating_add(word.len()))?;
        let end = text.find(&word).filter(|end| text.rfind(&word) == Some(*end));
        let end =
            end.filter(|end| ends_as_written(&text[..*end], &content)).ok_or(TextError::NotContinued)?;
        text.truncate(end);
        Ok(Rendered { text, mark })
    }
}

/// Returns whether a text ends with a content as it is, but for space before it; or with what follows its
/// reasoning, if that has ended: templates write it in their own way, or leave it out.
fn ends_as_written(text: &str, content: &str) -> bool {
    let answer = content.rsplit_once(REASONING_END).map(|(_, answer)| answer.trim_start());
    let ends_with_answer = |answer: &str| match answer {
        "" => text.trim_end().ends_with(REASONING_END),
        answer => text.ends_with(answer),
    };
    text.ends_with(content.trim_start()) || answer.is_some_and(ends_with_answer)
}

/// Returns a word that `text` does not contain.
#[must_use]
pub fn absent_word(text: &str) -> String {
    let tails = text.split(STEM).skip(1).map(|after| after.len() - after.trim_start_matches(TAIL).len());
    let longest = tails.max().unwrap_or(0);
    [STEM, &TAIL.repeat(longest + 1)].concat()
}
