//! A `.mrt` file that is read, not mapped: a file on failing storage gives an error and ends no program.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use mr_cli::FileError;
use mrt_format::{Digest, HEADER_BYTES, Prologue, prologue_bytes};

/// An open file with its validated prologue.
pub struct MrtFile {
    pub path: PathBuf,
    pub prologue: Prologue,
    /// The prologue's bytes.
    pub head: Vec<u8>,
    file: File,
}

impl MrtFile {
    /// Opens a whole file.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        Self::open_pinned(path, None)
    }

    /// Opens a whole file that must have a certain root, if one is given.
    pub fn open_pinned(path: &Path, root: Option<&Digest>) -> Result<Self, FileError> {
        let file = open_regular(path, File::options().read(true))?;
        let bytes = file.metadata().map_err(|e| FileError::new(path, e))?.len();
        Self::new(path, file, bytes, root)
    }

    /// Opens a file that may be cut short: only its prologue must be there.
    pub fn open_part(path: &Path, file: File, root: Option<&Digest>) -> Result<Self, FileError> {
        let mut first = [0; HEADER_BYTES];
        file.read_exact_at(&mut first, 0).map_err(|e| FileError::new(path, e))?;
        // The length that the header states takes the place of the file's.
        let stated = u64::from_le_bytes(first[32..40].try_into().expect("eight bytes"));
        Self::new(path, file, stated, root)
    }

    fn new(path: &Path, file: File, bytes: u64, root: Option<&Digest>) -> Result<Self, FileError> {
        let error = |problem: &dyn fmt::Display| FileError::new(path, problem);
        let mut head = vec![0; bytes.min(HEADER_BYTES as u64) as usize];
        file.read_exact_at(&mut head, 0).map_err(|e| error(&e))?;
        // The header is kept as it was read: nothing that was looked at can be another one the next time.
        let first = head.len();
        head.resize(prologue_bytes(&head, bytes).map_err(|e| error(&e))?, 0);
        file.read_exact_at(&mut head[first..], first as u64).map_err(|e| error(&e))?;
        let prologue = Prologue::parse_pinned(&head, bytes, root).map_err(|e| error(&e))?;
        Ok(MrtFile { path: path.into(), prologue, head, file })
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
        FileError::new(&self.path, problem)
    }
}

/// Opens a file that is no directory, pipe or device.
pub fn open_regular(path: &Path, options: &std::fs::OpenOptions) -> Result<File, FileError> {
    let error = |e: io::Error| FileError::new(path, e);
    // Opening a pipe would wait for its writer, so the kind of file is looked at first.
    match std::fs::metadata(path) {
        Ok(meta) if !meta.is_file() => Err(FileError::new(path, "is not a regular file")),
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(error(e)),
        _ => options.open(path).map_err(error),
    }
}
