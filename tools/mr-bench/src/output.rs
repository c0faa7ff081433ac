//! Files that are written.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use mr_cli::Result;

/// Writes a file under a temporary name beside its own, which it gets when all is written.
pub fn write_whole(path: &Path, write: impl FnOnce(&mut BufWriter<&File>) -> Result<()>) -> Result<()> {
    let failed = |e: io::Error| format!("{}: cannot be written: {e}", path.display());
    // A link stays a link.
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    if real.exists() && !real.is_file() {
        return Err(failed(io::Error::other("not a regular file")).into());
    }
    let parent = real.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    // The usual permissions of a new file, not those of a private temporary one.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let temp = builder.prefix(".mr-bench.").tempfile_in(parent).map_err(failed)?;
    let mut out = BufWriter::new(temp.as_file());
    write(&mut out).map_err(|error| match error.downcast() {
        Ok(error) => failed(*error).into(),
        Err(other) => other,
    })?;
    out.flush().map_err(failed)?;
    drop(out);
    temp.persist(&real).map_err(|e| failed(e.error))?;
    Ok(())
}
