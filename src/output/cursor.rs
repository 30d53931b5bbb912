//! What is left of a text that is read once, token by token, with white space between them.

/// The rest of a text.
pub(super) struct Cursor<'a> {
    pub(super) rest: &'a str,
}

impl<'a> Cursor<'a> {
    /// Skips white space, and the token if it comes next.
    pub(super) fn eat(&mut self, token: &str) -> bool {
        self.rest = self.rest.trim_start();
        let rest = self.rest.strip_prefix(token);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// Takes the text before a token, and the token.
    pub(super) fn until(&mut self, token: &str) -> Option<&'a str> {
        let (text, rest) = self.rest.split_once(token)?;
        self.rest = rest;
        Some(text)
    }

    /// Reads items with commas between them up to a closing token; one may follow the last.
    pub(super) fn items(&mut self, close: &str, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        while !self.eat(close) {
            item(self)?;
            if !self.eat(",") {
                return self.eat(close).then_some(());
            }
        }
        Some(())
    }
}
