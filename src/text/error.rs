//! Failures of the text modules. Each variant names the file or the input at fault.

/// Why a tokenizer, a template or a text cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file is missing or damaged.
    #[error("{file}: {why}")]
    Invalid {
        /// The file's name.
        file: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A file needs something that is not implemented.
    #[error("{file}: {what} is not supported")]
    Unsupported {
        /// The file's name.
        file: &'static str,
        /// What it needs.
        what: String,
    },
    /// A text cannot be tokenized.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
    /// A conversation becomes too long a text.
    #[error("more than {bytes_max} bytes")]
    TooLong {
        /// The limit.
        bytes_max: usize,
    },
    /// The model's files have no chat template.
    #[error("the model's files have none")]
    NoTemplate,
    /// The chat template refused the conversation, or failed on it.
    #[error("{0}")]
    Render(String),
    /// The chat template does not write the end of the message that is to be continued as it is.
    #[error("the model's chat template does not write the last message as it is")]
    NotContinued,
    /// The chat template would leave a message out.
    #[error("the model's chat template leaves out messages of role {role}{}", if *.late { " after the first" } else { "" })]
    Role {
        /// The message's index.
        index: usize,
        /// Its role.
        role: String,
        /// Whether it would be written as the first message.
        late: bool,
    },
    /// The chat template would leave the tools out.
    #[error("the model's chat template writes no tools{}", first.as_ref().map_or_else(String::new, |role| {
        format!(" where the first message is of role {role}")
    }))]
    Tools {
        /// The first message's role, if the tools would be written after one of another.
        first: Option<String>,
    },
    /// The chat template does not read an argument.
    #[error("the model's chat template has no variable {name}; it reads {variables}")]
    Argument {
        /// Its name.
        name: String,
        /// Variables that the template reads.
        variables: String,
    },
    /// An argument has the name of a variable that is not the caller's to set.
    #[error("{0} is set by the daemon")]
    FixedArgument(
        /// Its name.
        String,
    ),
}
