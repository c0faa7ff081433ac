//! Turns a Hugging Face Qwen2 directory into one `.mrt` file that the runtime maps as it is.
//!
//! The program of the same name is this library with a command line.

#![forbid(unsafe_code)]

mod convert;
mod error;
mod report;
mod sections;

pub use convert::{Converted, convert};
pub use error::ConvertError;
pub use mr_cli::NewFile;
pub use report::{to_json, write_summary};
pub use sections::{TokenizerKind, sources};
