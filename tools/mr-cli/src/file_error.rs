//! The error of a file.

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};

/// What is wrong with a file, in one line that begins with its name.
#[derive(Debug)]
pub struct FileError {
    path: PathBuf,
    problem: String,
}

impl FileError {
    /// `problem` says what is wrong and what to do.
    pub fn new(path: &Path, problem: impl fmt::Display) -> Self {
        FileError { path: path.into(), problem: problem.to_string() }
    }

    /// What is wrong, without the file's name.
    pub fn problem(self) -> String {
        self.problem
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.problem)
    }
}

impl Error for FileError {}
