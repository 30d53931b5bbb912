//! The tokens and the text of a chat turn: what a new turn runs on, and what it leaves behind. Tokens are
//! shared; each turn allocates its context once, and the session's new tokens once more at its commit.

use std::sync::Arc;

use super::state::TurnStart;

/// Returns the tokens a chat turn runs on. `rendered` is the chat template's text of old and new messages. If
/// it starts with the text the session holds, only the rest is tokenized and appended, so that the session's
/// tokens stay as they are; else all of it is tokenized anew, and cached KV is reused as far as the tokens
/// are the same.
pub fn chat_context<E>(
    start: &TurnStart,
    rendered: &str,
    encode: impl FnOnce(&str) -> Result<Vec<u32>, E>,
) -> Result<Arc<[u32]>, E> {
    match start.text.as_deref().and_then(|text| rendered.strip_prefix(text)) {
        Some("") => Ok(Arc::clone(&start.tokens)),
        Some(rest) => Ok(joined(&start.tokens, &encode(rest)?)),
        None => encode(rendered).map(Arc::from),
    }
}

/// Returns two runs of tokens as one, in one allocation.
#[must_use]
pub fn joined(old: &[u32], new: &[u32]) -> Arc<[u32]> {
    old.iter().chain(new).copied().collect()
}

/// Returns the text a session holds after a chat turn: the next rendering starts with it if the template
/// repeats the answer as it was. `ending` is the text of the token that ended the answer; empty for none.
#[must_use]
pub fn chat_text(rendered: &str, output: &str, ending: &str) -> Arc<str> {
    [rendered, output, ending].concat().into()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// One token a byte.
    fn bytes(text: &str) -> Result<Vec<u32>, Infallible> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn start(text: Option<&str>, tokens: &[u32]) -> TurnStart {
        let (text, tokens) = (text.map(Into::into), tokens.into());
        TurnStart { model: "m".into(), text, tokens, messages: Vec::new() }
    }

    #[test]
    fn only_the_rest_is_tokenized_when_the_text_goes_on() {
        let start = start(Some("ab"), &[1000]);
        let Ok(tokens) = chat_context(&start, "abc", bytes);
        assert_eq!(*tokens, [1000, u32::from(b'c')]);
        let Ok(tokens) = chat_context(&start, "ab", bytes);
        assert!(Arc::ptr_eq(&tokens, &start.tokens));
    }

    #[test]
    fn a_text_that_differs_is_tokenized_anew() {
        let Ok(tokens) = chat_context(&start(Some("ab"), &[1000]), "aXc", bytes);
        assert_eq!(*tokens, *bytes("aXc").unwrap());
    }

    #[test]
    fn an_unknown_text_is_tokenized_anew() {
        let Ok(tokens) = chat_context(&start(None, &[7]), "abc", bytes);
        assert_eq!(*tokens, *bytes("abc").unwrap());
    }

    #[test]
    fn the_next_rendering_starts_with_the_text_left_behind() {
        let text = chat_text("<u>hi</u><a>", "hello", "</a>");
        assert!("<u>hi</u><a>hello</a><u>more</u><a>".starts_with(&*text));
    }
}
