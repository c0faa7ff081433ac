//! A file that appears under its name complete or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::{FileError, Result};

/// A temporary file beside the file that it will replace; dropping it removes it.
#[derive(Debug)]
pub struct NewFile {
    /// The name as given, for messages.
    shown: PathBuf,
    /// The name with links resolved, so that a link to another disk keeps its file there.
    path: PathBuf,
    temp: NamedTempFile,
}

impl NewFile {
    /// Creates the temporary file for `path`, which may exist unless it is one of `inputs`: files that are read to make
    /// it.
    ///
    /// # Errors
    /// A name that cannot be a file's, or a directory that cannot be written to.
    pub fn create<P: AsRef<Path>>(
        path: &Path,
        inputs: impl IntoIterator<Item = P>,
    ) -> std::result::Result<Self, FileError> {
        let bad = |problem: String| FileError::new(path, problem);
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(bad("is the name of a directory; name the file to write".into()));
        }
        let real = match std::fs::symlink_metadata(path) {
            Ok(meta) if meta.is_symlink() => {
                path.canonicalize().map_err(|e| bad(format!("is a link that leads nowhere: {e}")))?
            }
            _ => path.to_owned(),
        };
        let existing = std::fs::metadata(&real).ok();
        match &existing {
            Some(meta) if meta.is_dir() => return Err(bad("is a directory; name the file to write".into())),
            Some(meta) if !meta.is_file() => {
                return Err(bad("is not a regular file; name another one".into()));
            }
            _ => {}
        }
        let Some(name) = real.file_name() else { return Err(bad("is not a file name".into())) };
        let parent = real.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let cannot = |e: io::Error| bad(format!("cannot be written to {}: {}", parent.display(), plain(&e)));
        let folder = parent.canonicalize().map_err(cannot)?;
        let real = folder.join(name);
        // As the disk spells it, which may not care for upper and lower case.
        let spelt = real.canonicalize().unwrap_or_else(|_| real.clone());
        let is_real = |input: P| input.as_ref().canonicalize().is_ok_and(|input| input == spelt);
        if inputs.into_iter().any(is_real) {
            return Err(bad("is read to make the new file; name another one".into()));
        }
        let mut builder = tempfile::Builder::new();
        let prefix = format!(".{}.", name.to_string_lossy());
        builder.prefix(&prefix).suffix(".tmp");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // The usual ones of a new file, not those of a private temporary one.
            builder.permissions(PermissionsExt::from_mode(0o666));
        }
        let temp = builder.tempfile_in(&folder).map_err(cannot)?;
        if let Some(existing) = existing {
            // Whoever could not read the old file cannot read the new one.
            temp.as_file().set_permissions(existing.permissions()).map_err(cannot)?;
        }
        Ok(NewFile { shown: path.to_owned(), path: real, temp })
    }

    /// The file that will be replaced, links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The temporary file.
    pub fn file(&self) -> &File {
        self.temp.as_file()
    }

    /// The error of a failed operation on the file, under the name as given.
    pub fn error(&self, error: io::Error) -> FileError {
        FileError::new(&self.shown, format!("cannot be written: {}", plain(&error)))
    }

    /// The error of a file system that cannot hold the file.
    pub fn no_room(&self, bytes: u64, error: io::Error) -> FileError {
        FileError::new(&self.shown, format!("cannot reserve the {bytes} bytes of the new file: {error}"))
    }

    /// Writes the file by `write` and syncs it; it has still to be given its name.
    ///
    /// # Errors
    /// Those of `write`, an [`io::Error`] under the file's name, and those of the file system.
    pub fn write(&self, write: impl FnOnce(&mut BufWriter<&File>) -> Result<()>) -> Result<()> {
        let mut out = BufWriter::new(self.file());
        write(&mut out).map_err(|error| match error.downcast() {
            Ok(error) => self.error(*error).into(),
            Err(other) => other,
        })?;
        out.flush().and_then(|()| self.file().sync_all()).map_err(|e| self.error(e))?;
        Ok(())
    }

    /// Gives the file, which has been synced, its name and syncs the directory.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn commit(self) -> std::result::Result<(), FileError> {
        let NewFile { shown, path, temp } = self;
        // Windows cannot open directories for this.
        #[cfg(unix)]
        let folder = path.parent().and_then(|folder| File::open(folder).ok());
        temp.persist(&path)
            .map_err(|e| FileError::new(&shown, format!("cannot be written: {}", plain(&e.error))))?;
        #[cfg(unix)]
        if let Some(folder) = folder {
            let unsure = |e| format!("is complete, but the disk does not confirm its name: {e}");
            folder.sync_all().map_err(|e| FileError::new(&shown, unsure(e)))?;
        }
        Ok(())
    }
}

/// The error without the temporary file's name, which tempfile appends.
fn plain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(_) => error.to_string(),
        None => error.kind().to_string(),
    }
}
