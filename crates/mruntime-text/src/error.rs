//! The crate's one error type.

/// What can go wrong with a tokenizer, a chat template or their files. `Display` is one line.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// tokenizer.json cannot be used.
    #[error("tokenizer.json: {0}")]
    Tokenizer(String),
    /// A text could not be turned into tokens.
    #[error("cannot tokenize the text: {0}")]
    Encode(String),
    /// tokenizer_config.json (or chat_template.jinja) cannot be used.
    #[error("{file}: {message}")]
    Config {
        /// The file's name.
        file: &'static str,
        /// What is wrong in it.
        message: String,
    },
    /// The chat template is not valid Jinja, or failed on these messages.
    #[error("chat template{}: {message}", line.map(|line| format!(", line {line}")).unwrap_or_default())]
    Template {
        /// Line of the template's source, from 1, where it is known.
        line: Option<usize>,
        /// What is wrong there; the template's own words if it called `raise_exception`.
        message: String,
    },
}
