//! Looks at, verifies, signs, repairs and unpacks `.mrt` files.

#![forbid(unsafe_code)]

mod diff;
mod file;
mod info;
mod piece;
mod repair;
mod sign;
mod unpack;
mod verify;
#[cfg(target_os = "linux")]
mod warm;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use mr_cli::{FileError, all_cores, exit_code, parse_threads, verdict};
use mrt_format::Digest;
use mruntime::Pool;

use file::MrtFile;

/// Look at, verify, sign, repair and unpack .mrt files
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
    /// Check every byte of a file, and whose it is, and name what is damaged
    Verify(VerifyArgs),
    /// Write a file back as a Hugging Face directory: FP16 safetensors and the original files
    Unpack(UnpackArgs),
    /// Show what differs between two files: config, sections, tensors; exit code 1 if something does, 2 in case of trouble
    Diff(DiffArgs),
    /// Fetch what is damaged or missing in a file from another copy of it
    Repair(RepairArgs),
    /// Sign a file's root digest with a minisign key
    Sign(SignArgs),
    /// Bring a file into memory in huge pages, where the system has them for files: programs that map it start sooner
    #[cfg(target_os = "linux")]
    Warm(WarmArgs),
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
    /// The publisher's minisign public key, or a file that holds it: the file must be signed with it
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// The signature [default: FILE.mrt.minisig]
    #[arg(long, value_name = "FILE", requires = "key")]
    signature: Option<PathBuf>,
    /// Threads to hash with [default: all cores]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct UnpackArgs {
    /// File to unpack
    #[arg(value_name = "FILE.mrt")]
    file: PathBuf,
    /// Directory to create
    dir: PathBuf,
}

#[derive(Args)]
struct DiffArgs {
    /// The one file
    #[arg(value_name = "A.mrt")]
    a: PathBuf,
    /// The other file
    #[arg(value_name = "B.mrt")]
    b: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct RepairArgs {
    /// File to repair; it may be cut short, or not exist yet
    #[arg(value_name = "FILE.mrt")]
    file: PathBuf,
    /// Another copy; it may have damage of its own
    #[arg(long, value_name = "OTHER.mrt")]
    from: PathBuf,
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

#[derive(Args)]
struct SignArgs {
    /// File to sign; every byte of it is checked before
    #[arg(value_name = "FILE.mrt")]
    file: PathBuf,
    /// Secret key, as `minisign -G` makes it
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Where to write the signature [default: FILE.mrt.minisig]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Threads to hash with [default: all cores]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<usize>,
}

#[cfg(target_os = "linux")]
#[derive(Args)]
struct WarmArgs {
    /// File to bring in
    #[arg(value_name = "FILE.mrt")]
    file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    exit_code(match mr_cli::parse::<Cli>().command {
        Command::Info(args) => run_info(&args),
        Command::Verify(args) => run_verify(&args),
        Command::Unpack(args) => run_unpack(&args),
        Command::Diff(args) => return run_diff(&args),
        Command::Repair(args) => run_repair(&args),
        Command::Sign(args) => run_sign(&args),
        #[cfg(target_os = "linux")]
        Command::Warm(args) => run_warm(&args),
    })
}

fn pool(threads: Option<usize>) -> mr_cli::Result<Pool> {
    Ok(Pool::new(threads.unwrap_or(all_cores()))?)
}

fn run_info(args: &InfoArgs) -> mr_cli::Result<()> {
    let file = MrtFile::open(&args.file)?;
    let out = &mut verdict();
    if args.json {
        info::write_json(out, &file, args.tensors)
    } else {
        info::write_text(out, &file, args.tensors)
    }
}

fn run_verify(args: &VerifyArgs) -> mr_cli::Result<()> {
    let mut pool = pool(args.threads)?;
    let file = MrtFile::open_pinned(&args.file, args.root.as_ref())?;
    let signed_by = match &args.key {
        Some(key) => {
            let signature = args.signature.clone().unwrap_or(sign::beside(&args.file));
            Some(sign::check(&file, &sign::read_key(key)?, &signature)?)
        }
        None => None,
    };
    let damage = verify::verify(&file, &mut pool)?;
    let out = &mut verdict();
    if args.json {
        verify::write_json(out, &file, &damage, signed_by.as_deref())?
    } else {
        verify::write_text(out, &file, &damage)?;
        if let Some(key) = signed_by {
            writeln!(out, "signed by key {key}")?;
        }
    }
    sound(&file, &damage)
}

/// An error if there is damage.
fn sound(file: &MrtFile, damage: &[verify::Damage]) -> mr_cli::Result<()> {
    match damage {
        [] => Ok(()),
        _ => Err(file.error("is damaged; get it again, or repair it from another copy (mrt repair)").into()),
    }
}

/// Opens a file and checks all of it; damage is told and ends the work.
fn open_sound(path: &std::path::Path, pool: &mut Pool) -> mr_cli::Result<MrtFile> {
    let file = MrtFile::open(path)?;
    let damage = verify::verify(&file, pool)?;
    if !damage.is_empty() {
        verify::write_text(&mut verdict(), &file, &damage)?;
    }
    sound(&file, &damage)?;
    Ok(file)
}

fn run_unpack(args: &UnpackArgs) -> mr_cli::Result<()> {
    let file = open_sound(&args.file, &mut pool(None)?)?;
    let interrupted = mr_cli::interrupted()?;
    let names = unpack::unpack(&file, &args.dir, &interrupted)?;
    writeln!(verdict(), "{}: {}", args.dir.display(), names.join(", "))?;
    Ok(())
}

/// Like diff: 1 if the files differ, 2 if that cannot be found out.
fn run_diff(args: &DiffArgs) -> ExitCode {
    let run = || -> mr_cli::Result<bool> {
        let (a, b) = (MrtFile::open(&args.a)?, MrtFile::open(&args.b)?);
        let list = diff::diff(&a, &b)?;
        let out = &mut verdict();
        match args.json {
            true => diff::write_json(out, &a, &b, &list)?,
            false => diff::write_text(out, &a, &b, &list)?,
        }
        Ok(a.prologue.root() == b.prologue.root())
    };
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            exit_code(Err(error));
            ExitCode::from(2)
        }
    }
}

fn run_repair(args: &RepairArgs) -> mr_cli::Result<()> {
    let done = repair::repair(&args.file, &args.from, args.root.as_ref(), &mut pool(args.threads)?)?;
    let out = &mut verdict();
    let path = args.file.display();
    if args.json {
        writeln!(out, "{}", done.to_json())?;
    } else {
        for (name, from, to) in &done.fetched {
            writeln!(out, "{path}: fetched {name} (bytes {from} to {to})")?;
        }
        for (name, from, to) in &done.missing {
            writeln!(out, "{path}: {name} (bytes {from} to {to}) is in neither copy")?;
        }
        if done.missing.is_empty() {
            writeln!(out, "{path}: is whole; root: {}", done.root)?;
        }
    }
    match done.missing.len() {
        0 => Ok(()),
        n => Err(FileError::new(
            &args.file,
            format!("{n} pieces are missing still; repair it from another copy"),
        )
        .into()),
    }
}

fn run_sign(args: &SignArgs) -> mr_cli::Result<()> {
    let file = open_sound(&args.file, &mut pool(args.threads)?)?;
    let signature = args.out.clone().unwrap_or(sign::beside(&args.file));
    sign::sign(&file, &args.key, &signature)?;
    writeln!(verdict(), "{}: signs root {}", signature.display(), file.prologue.root())?;
    Ok(())
}

#[cfg(target_os = "linux")]
fn run_warm(args: &WarmArgs) -> mr_cli::Result<()> {
    let (found, now) = warm::warm(&args.file)?;
    let out = &mut verdict();
    match args.json {
        true => warm::write_json(out, &args.file, found, now)?,
        false => warm::write_text(out, &args.file, found, now)?,
    }
    if now.is_huge() {
        return Ok(());
    }
    let problem = "is in memory, but in small pages: close it in other programs and try again, or its file system has \
                   no huge pages";
    Err(FileError::new(&args.file, problem).into())
}
