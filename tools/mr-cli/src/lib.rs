//! What the command-line tools that run a model share: how a model is chosen and opened, and how a program ends.

#![forbid(unsafe_code)]

mod cli;
mod file_error;
mod model;
mod new_file;
mod numerics;
mod output;
mod pages;
mod progress;

use std::error::Error;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts;

pub use cli::parse;
pub use file_error::FileError;
pub use model::{LoadedModel, ModelSource, TemplateSource};
pub use new_file::NewFile;
pub use numerics::NumericsArg;
pub use output::{say, verdict};
pub use pages::Pages;
pub use progress::progress_bar;

/// With an error that is shown to the user as it is: one line.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Ends a program: errors go to stderr in one line, and a reader that has closed our output (`| head`) is none.
pub fn exit_code(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            // What has no name of its own is what the program prints on.
            let what = if error.is::<io::Error>() { "standard output: " } else { "" };
            // One line, whatever a file is called.
            say(format!("error: {what}{error}").replace(char::is_control, "?"));
            ExitCode::FAILURE
        }
    }
}

/// What a program says that was interrupted while it made a new file.
pub const INTERRUPTED: &str = "interrupted; nothing was written";

/// Becomes true when the user interrupts the program (Ctrl-C) or the system asks it to end, which does not happen by itself
/// any more, unless it is done a second time.
///
/// # Errors
/// When the system does not let signals be handled.
pub fn interrupted() -> Result<Arc<AtomicBool>> {
    #[cfg(unix)]
    const SIGNALS: [i32; 3] = [consts::SIGINT, consts::SIGTERM, consts::SIGHUP];
    #[cfg(not(unix))]
    const SIGNALS: [i32; 2] = [consts::SIGINT, consts::SIGTERM];
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in SIGNALS {
        // In this order: what the first signal sets, the second one finds.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&interrupted))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&interrupted)))
            .map_err(|e| format!("cannot handle signals: {e}"))?;
    }
    Ok(interrupted)
}

fn is_closed_pipe(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// The number of logical cores that this process may use.
pub fn all_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Parses a number of threads.
///
/// # Errors
/// A text for clap when it is not one that a pool can have.
pub fn parse_threads(text: &str) -> std::result::Result<usize, String> {
    parse_in(text, 1..=mruntime::pool::MAX_THREADS)
}

/// Parses a number of things that must be at least one.
///
/// # Errors
/// A text for clap when it is not such a number.
pub fn parse_count(text: &str) -> std::result::Result<usize, String> {
    parse_in(text, 1..=u32::MAX as usize)
}

fn parse_in(text: &str, range: std::ops::RangeInclusive<usize>) -> std::result::Result<usize, String> {
    let number = text.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("it must be a whole number from {} to {}", range.start(), range.end()))
}
