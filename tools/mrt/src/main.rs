//! Looks at and verifies `.mrt` files.

#![forbid(unsafe_code)]

mod file;
mod info;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use mr_cli::{all_cores, exit_code, parse_threads};
use mrt_format::Digest;
use mruntime::Pool;

use file::MrtFile;

/// Look at and verify .mrt files
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show what a file holds: model, sections, sizes, digests, origin, conversion report
    Info(InfoArgs),
    /// Check every byte of a file and name what is damaged
    Verify(VerifyArgs),
}

#[derive(Args)]
struct InfoArgs {
    /// File to look at
    #[arg(value_name = "FILE.mrt")]
    file: PathBuf,
    /// Also list the tensors
    #[arg(long)]
    tensors: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct VerifyArgs {
    /// File to check
    #[arg(value_name = "FILE.mrt")]
    file: PathBuf,
    /// The root digest that the file must have, as its publisher states it
    #[arg(long, value_name = "DIGEST")]
    root: Option<Digest>,
    /// Threads to hash with [default: all cores]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    exit_code(match Cli::parse().command {
        Command::Info(args) => run_info(&args),
        Command::Verify(args) => run_verify(&args),
    })
}

fn run_info(args: &InfoArgs) -> mr_cli::Result<()> {
    let file = MrtFile::open(&args.file)?;
    let out = &mut std::io::stdout().lock();
    if args.json {
        info::write_json(out, &file, args.tensors)
    } else {
        info::write_text(out, &file, args.tensors)
    }
}

fn run_verify(args: &VerifyArgs) -> mr_cli::Result<()> {
    let mut pool = Pool::new(args.threads.unwrap_or(all_cores()))?;
    let file = MrtFile::open(&args.file)?;
    if let Some(root) = &args.root {
        file.prologue.expect_root(root).map_err(|problem| file.error(problem))?;
    }
    let damage = verify::verify(&file, &mut pool)?;
    let out = &mut std::io::stdout().lock();
    if args.json {
        verify::write_json(out, &file, &damage)?
    } else {
        verify::write_text(out, &file, &damage)?
    }
    if damage.is_empty() { Ok(()) } else { Err(file.error("is damaged; get it again").into()) }
}
