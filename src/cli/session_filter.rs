//! Which of the caller's sessions a command is about.

use clap::Args;

/// Some of the caller's sessions.
#[derive(Args, Debug)]
pub(crate) struct WhichArgs {
    /// Only sessions of this model
    #[arg(short, long, value_name = "MODEL", default_value = "")]
    pub(crate) model: String,
    /// Only sessions with this label; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) label: Vec<(String, String)>,
    /// Only sessions whose name begins with this
    #[arg(long, value_name = "PREFIX", default_value = "")]
    pub(crate) prefix: String,
    /// Only pinned sessions
    #[arg(long)]
    pub(crate) pinned: bool,
}

/// Reads a label.
pub(crate) fn label(text: &str) -> std::result::Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("must be KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_a_key_and_a_value() {
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert_eq!(label("a="), Ok(("a".into(), String::new())));
        assert!(label("a").is_err());
    }
}
