//! The crate's one error type.

/// What can go wrong with a tokenizer, a chat template or their files. `Display` is one line.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A section of the model file cannot be read or is damaged.
    #[error(transparent)]
    Model(#[from] mruntime::Error),
    /// The model has no tokenizer.
    #[error("there is no tokenizer: the model has no tokenizer.json, so it can be run on token ids only")]
    NoTokenizer,
    /// The prepacked tokenizer cannot be used.
    #[error(transparent)]
    Prepacked(#[from] mrt_format::FormatError),
    /// The tokenizer is not prepacked, and this program is built without what reads tokenizer.json.
    #[error(
        "the tokenizer is not prepacked: build this program with the feature \"json\" (files of an old mr-convert may need only converting again)"
    )]
    NotPrepacked,
    /// tokenizer.json cannot be used.
    #[error("tokenizer.json: {0}")]
    Tokenizer(String),
    /// tokenizer.json has a part that a prepacked tokenizer cannot express.
    #[error("tokenizer.json cannot be prepacked: {0}")]
    CannotPrepack(String),
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
