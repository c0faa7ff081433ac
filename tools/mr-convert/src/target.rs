//! A file that appears under its name complete or not at all.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use mruntime::hf::Qwen2Dir;
use tempfile::NamedTempFile;

use crate::ConvertError;

/// A temporary file beside the file that it will replace; dropping it removes it.
pub struct Target {
    /// The name as given, for messages.
    shown: PathBuf,
    /// The name with links resolved, so that a link to another disk keeps its file there.
    path: PathBuf,
    temp: NamedTempFile,
}

impl Target {
    /// Creates the temporary file for `path`, which may exist unless the model is read from it.
    ///
    /// # Errors
    /// A name that cannot be a file's, or a directory that cannot be written to.
    pub fn create(path: &Path, model: &Qwen2Dir) -> Result<Self, ConvertError> {
        let bad = |problem: String| ConvertError::target(path, problem);
        let real = match std::fs::symlink_metadata(path) {
            Ok(meta) if meta.is_symlink() => {
                path.canonicalize().map_err(|e| bad(format!("is a link that leads nowhere: {e}")))?
            }
            _ => path.to_owned(),
        };
        match std::fs::metadata(&real) {
            Ok(meta) if meta.is_dir() => return Err(bad("is a directory; name the file to write".into())),
            Ok(meta) if !meta.is_file() => return Err(bad("is not a regular file; name another one".into())),
            _ => {}
        }
        let Some(name) = real.file_name() else { return Err(bad("is not a file name".into())) };
        let parent = real.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let parent = parent
            .canonicalize()
            .map_err(|e| bad(format!("cannot be written to {}: {}", parent.display(), plain(&e))))?;
        let real = parent.join(name);
        if sources(model).any(|source| source.canonicalize().is_ok_and(|source| source == real)) {
            return Err(bad("is a file of the model that is converted; name another one".into()));
        }
        let mut builder = tempfile::Builder::new();
        let prefix = format!(".{}.", name.to_string_lossy());
        builder.prefix(&prefix).suffix(".tmp");
        // The usual permissions of a new file, not those of a private temporary one.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temp = builder
            .tempfile_in(&parent)
            .map_err(|e| bad(format!("cannot be written to {}: {}", parent.display(), plain(&e))))?;
        Ok(Target { shown: path.to_owned(), path: real, temp })
    }

    /// The file that will be replaced, links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The temporary file.
    pub(crate) fn file(&self) -> &File {
        self.temp.as_file()
    }

    /// The error of a failed operation on the file, under the target's name.
    pub(crate) fn error(&self, error: io::Error) -> ConvertError {
        ConvertError::target(&self.shown, format!("cannot be written: {}", plain(&error)))
    }

    /// The error of a file system that cannot hold the file.
    pub(crate) fn no_room(&self, bytes: u64, error: io::Error) -> ConvertError {
        let problem = format!("cannot reserve the {bytes} bytes of the new file: {error}");
        ConvertError::target(&self.shown, problem)
    }

    /// Gives the file, which has been synced, its name and syncs the directory.
    pub(crate) fn commit(self) -> Result<(), ConvertError> {
        let Target { shown, path, temp } = self;
        let failed = |e| ConvertError::target(&shown, format!("cannot be written: {}", plain(&e)));
        temp.persist(&path).map_err(|e| failed(e.error))?;
        // Windows cannot open directories for this.
        #[cfg(unix)]
        if let Some(parent) = path.parent() {
            File::open(parent).and_then(|dir| dir.sync_all()).map_err(failed)?;
        }
        Ok(())
    }

    /// Writes, syncs and names a small file.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn write_small(self, bytes: &[u8]) -> Result<(), ConvertError> {
        self.file().write_all(bytes).and_then(|()| self.file().sync_all()).map_err(|e| self.error(e))?;
        self.commit()
    }
}

fn sources(model: &Qwen2Dir) -> impl Iterator<Item = PathBuf> {
    let weights = model.weights.files().map(Path::to_owned);
    weights.chain(model.files.iter().map(|f| model.path.join(&f.name)))
}

/// The error without the temporary file's name, which tempfile appends.
fn plain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(_) => error.to_string(),
        None => error.kind().to_string(),
    }
}
