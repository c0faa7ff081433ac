//! A `.mrt` file that is read, not mapped: a file on failing storage gives an error and ends no program.

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use mrt_format::{HEADER_BYTES, Prologue, prologue_bytes};

/// An open file with its validated prologue.
pub struct MrtFile {
    pub path: PathBuf,
    pub prologue: Prologue,
    file: File,
}

/// What is wrong with a file, in one line that begins with its name.
#[derive(Debug)]
pub struct FileError {
    path: PathBuf,
    problem: String,
}

impl MrtFile {
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let error =
            |problem: &dyn fmt::Display| FileError { path: path.into(), problem: problem.to_string() };
        // Opening a pipe would wait for its writer, so the kind of file is looked at first.
        if !std::fs::metadata(path).map_err(|e| error(&e))?.is_file() {
            return Err(error(&"is not a regular file"));
        }
        let file = File::open(path).map_err(|e| error(&e))?;
        let bytes = file.metadata().map_err(|e| error(&e))?.len();
        let mut first = vec![0; bytes.min(HEADER_BYTES as u64) as usize];
        file.read_exact_at(&mut first, 0).map_err(|e| error(&e))?;
        let mut prologue = vec![0; prologue_bytes(&first, bytes).map_err(|e| error(&e))?];
        file.read_exact_at(&mut prologue, 0).map_err(|e| error(&e))?;
        let prologue = Prologue::parse(&prologue, bytes).map_err(|e| error(&e))?;
        Ok(MrtFile { path: path.into(), prologue, file })
    }

    /// Fills `out` with the bytes from `offset`.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), FileError> {
        let end = offset + out.len() as u64;
        self.file
            .read_exact_at(out, offset)
            .map_err(|e| self.error(format!("reading bytes {offset} to {end}: {e}")))
    }

    /// The content of section `name`, checked; `None` if there is no such section.
    pub fn section(&self, name: &str) -> Result<Option<Vec<u8>>, FileError> {
        let Some(section) = self.prologue.section(name) else { return Ok(None) };
        let mut content = vec![0; section.bytes as usize];
        self.read(section.offset, &mut content)?;
        self.prologue.check_section(name, &content).map_err(|problem| self.error(problem))?;
        Ok(Some(content))
    }

    /// An error of this file.
    pub fn error(&self, problem: impl fmt::Display) -> FileError {
        FileError { path: self.path.clone(), problem: problem.to_string() }
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.problem)
    }
}

impl Error for FileError {}
