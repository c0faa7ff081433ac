//! The command line of a tool, and what shells and `man` know of it.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::{ExitCode, exit};
#[cfg(unix)]
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use clap_complete::Shell;

use crate::{FileError, Result, exit_code, say};

const HELP: &str = "Also: `--completions SHELL` prints completions for bash, zsh, fish, elvish or powershell; `--man-pages DIR` writes man \
                    pages.";

/// Parses the command line of a tool; wrong usage ends the process with code 2. Alone on it, `--completions SHELL`
/// prints completions and `--man-pages DIR` writes man pages, instead of the tool's work.
pub fn parse<T: Parser>() -> T {
    // All tools tell of them in an error's one line.
    mruntime_text::silence_caught_panics();
    // A limit on the size of files is an error to tell of, too, and not the end of the process.
    #[cfg(unix)]
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
    let command = || T::command().after_help(HELP);
    let args: Vec<OsString> = std::env::args_os().collect();
    match args.get(1).and_then(|arg| arg.to_str()) {
        Some("--completions") if args.len() == 3 => end(completions(command(), &args[2])),
        Some("--man-pages") if args.len() == 3 => end(man_pages(command(), Path::new(&args[2]))),
        _ => {}
    }
    T::from_arg_matches(&command().get_matches()).unwrap_or_else(|e| e.exit())
}

/// Ends the process.
fn end(result: Result<()>) -> ! {
    exit(i32::from(exit_code(result) != ExitCode::SUCCESS))
}

fn completions(mut command: clap::Command, shell: &OsString) -> Result<()> {
    let Ok(shell) = Shell::from_str(&shell.to_string_lossy(), true) else {
        say("error: completions are for bash, zsh, fish, elvish or powershell");
        exit(2)
    };
    let name = command.get_name().to_owned();
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut text);
    Ok(std::io::stdout().write_all(&text)?)
}

fn man_pages(command: clap::Command, dir: &Path) -> Result<()> {
    Ok(clap_mangen::generate_to(command, dir).map_err(|e| FileError::new(dir, e))?)
}
