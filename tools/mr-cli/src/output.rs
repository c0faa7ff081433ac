//! What a program tells its user.

use std::fmt::Display;
use std::io::{self, StdoutLock, Write};

/// Writes a line to stderr; where that is not possible, nobody is there to be told.
pub fn say(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Standard output of a program whose exit code is its answer: when its reader goes away (`| head`), the rest is dropped and
/// the work goes on.
pub fn verdict() -> impl Write {
    Verdict(io::stdout().lock())
}

struct Verdict(StdoutLock<'static>);

impl Write for Verdict {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(bytes.len()),
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.0.flush() {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }
}
