//! What can stop a conversion, each in one line.

use std::path::PathBuf;

use mr_cli::{FileError, INTERRUPTED};
use mrt_format::FormatError;
use mruntime::hf::HfError;
use mruntime_text::TextError;

/// Why there is no new file. What was at the target before is still there.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The model directory cannot be read or is not a Qwen2 model that the runtime knows.
    #[error(transparent)]
    Model(#[from] HfError),
    /// The chat template cannot be found where it should be.
    #[error("{}: {error}", dir.display())]
    Template {
        /// The model directory.
        dir: PathBuf,
        /// What is wrong with the file that holds it.
        error: TextError,
    },
    /// The file's contents exceed the format's limits.
    #[error("this model does not fit into a .mrt file: {0}")]
    Format(#[from] FormatError),
    /// The pool has no such number of threads.
    #[error(transparent)]
    Runtime(#[from] mruntime::Error),
    /// A file to be written cannot be written.
    #[error(transparent)]
    Target(#[from] FileError),
    /// The user has interrupted the conversion.
    #[error("{INTERRUPTED}")]
    Interrupted,
}
