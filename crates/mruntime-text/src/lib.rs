//! Text for `mruntime`: tokenizer, streaming detokeniser and chat templates.
//!
//! All of it works on bytes and strings that the caller has read: nothing here opens a file.
#![forbid(unsafe_code)]

mod config;
mod error;
mod stream;
mod template;
#[cfg(test)]
mod testing;
mod tojson;
mod tokenizer;

pub use config::{SpecialTokenNames, find_chat_template};
pub use error::TextError;
pub use stream::StreamDecoder;
pub use template::ChatTemplate;
pub use tokenizer::{SpecialTokens, Tokenizer};
