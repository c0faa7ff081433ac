//! Text for `mruntime`: tokenizer, streaming detokeniser and chat templates.
//!
//! All of it works on bytes and strings that the caller has read: nothing here opens a file.
//!
//! ```no_run
//! # fn next_token() -> u32 { 0 }
//! use mruntime_text::{ChatTemplate, SpecialTokenNames, SpecialTokens, StreamDecoder, Tokenizer, find_chat_template};
//!
//! let config = std::fs::read("tokenizer_config.json")?;
//! let source = find_chat_template(None, Some(&config))?.ok_or("the model has no chat template")?;
//! let template = ChatTemplate::new(&source, &SpecialTokenNames::from_tokenizer_config(&config)?)?;
//! let prompt = template.render(&[serde_json::json!({"role": "user", "content": "Hi"})], None, true)?;
//!
//! let tokenizer = Tokenizer::from_section(std::fs::read("tokenizer")?)?; // or from_model(&model)
//! let ids = tokenizer.encode(&prompt, SpecialTokens::Parse)?;
//! let end = tokenizer.token_id("<|im_end|>").ok_or("the model has no <|im_end|>")?;
//! // ... give the ids to the model, then:
//! let mut decoder = StreamDecoder::new(&tokenizer, true);
//! loop {
//!     let id = next_token();
//!     if id == end {
//!         break;
//!     }
//!     print!("{}", decoder.push(id));
//! }
//! print!("{}", decoder.finish());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod bpe;
#[cfg(feature = "json")]
mod compile;
mod config;
mod error;
#[cfg(feature = "json")]
mod json;
mod namespace;
mod prepacked;
mod python;
mod split;
mod stream;
mod tags;
mod template;
#[cfg(test)]
mod testing;
mod tojson;
mod tokenizer;

#[cfg(feature = "json")]
pub use compile::prepack_tokenizer;
pub use config::{SpecialTokenNames, find_chat_template};
pub use error::TextError;
#[cfg(feature = "json")]
pub use json::silence_caught_panics;
pub use stream::StreamDecoder;
pub use template::ChatTemplate;
pub use tokenizer::{SpecialTokens, Tokenizer};
