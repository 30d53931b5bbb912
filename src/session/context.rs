//! The tokens and the text of a chat turn: what a new turn runs on, and what it leaves behind. Tokens are
//! shared; each turn allocates its context once, and the session's new tokens once more at its commit.

use std::sync::Arc;

use super::state::TurnStart;

/// Returns the end of a chat turn's text that has to be tokenized and appended to the session's tokens, so
/// that these stay as they are. `rendered` is the chat template's text of old and new messages; if it does
/// not start with the text that the session holds, there is no such end: all of it is tokenized anew, and
/// cached KV is reused as far as the tokens are the same.
#[must_use]
pub fn chat_rest<'a>(start: &TurnStart, rendered: &'a str) -> Option<&'a str> {
    rendered.strip_prefix(start.text.as_deref()?)
}

/// Returns two runs of tokens as one, in one allocation.
#[must_use]
pub fn joined(old: &[u32], new: &[u32]) -> Arc<[u32]> {
    [old, new].concat().into()
}

/// Returns the text a session holds after a chat turn: the next rendering starts with it if the template
/// repeats the answer as it was. `ending` is the text of the token that ended the answer; empty for none.
#[must_use]
pub fn chat_text(rendered: &str, output: &str, ending: &str) -> Arc<str> {
    [rendered, output, ending].concat().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::History;

    fn start(text: Option<&str>) -> TurnStart {
        TurnStart {
            model: "m".into(),
            text: text.map(Into::into),
            tokens: [1000].into(),
            messages: Vec::new(),
            is_whole: true,
            history: History::Auto,
            cache_salt: "".into(),
            pinned: false,
            tokenizer: None,
            known: "".into(),
            answer: None,
        }
    }

    #[test]
    fn only_the_rest_is_tokenized_when_the_text_goes_on() {
        assert_eq!(chat_rest(&start(Some("ab")), "abc"), Some("c"));
        assert_eq!(chat_rest(&start(Some("ab")), "ab"), Some(""));
    }

    #[test]
    fn a_text_that_differs_or_is_unknown_is_tokenized_anew() {
        assert_eq!(chat_rest(&start(Some("ab")), "aXc"), None);
        assert_eq!(chat_rest(&start(None), "abc"), None);
    }

    #[test]
    fn the_next_rendering_starts_with_the_text_left_behind() {
        let text = chat_text("<u>hi</u><a>", "hello", "</a>");
        assert!("<u>hi</u><a>hello</a><u>more</u><a>".starts_with(&*text));
    }
}
