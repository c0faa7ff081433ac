//! Turns a Hugging Face Qwen2 directory into one `.mrt` file that the runtime maps as it is.

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use mr_cli::{all_cores, exit_code, parse_threads, say};
use mr_convert::{NewFile, convert, sources, to_json, write_summary};
use mruntime::Pool;
use mruntime::hf::Qwen2Dir;

/// Packing runs at the speed of memory long before this many threads, and each one holds 5 MB.
const MOST_DEFAULT_THREADS: usize = 16;

/// Turn a Hugging Face Qwen2 directory into one .mrt file
///
/// The same input gives the same bytes on every machine and with any number of threads. An existing OUT.mrt is
/// replaced in one step when everything has succeeded, and is untouched otherwise.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Directory with config.json, safetensors weights and tokenizer.json
    model_dir: PathBuf,
    /// File to write
    #[arg(value_name = "OUT.mrt")]
    out: PathBuf,
    /// Threads to pack with [default: all cores, at most 16]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<usize>,
    /// Also write the conversion report of every tensor to this file
    #[arg(long, value_name = "FILE.json")]
    report: Option<PathBuf>,
    /// A line on where the model is from, kept in the file (a URL and a revision, for example) [default: what a file
    /// `origin` in MODEL_DIR says]
    #[arg(long, value_name = "TEXT")]
    origin: Option<String>,
    /// Print the conversion report as one JSON object
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    exit_code(run(&mr_cli::parse::<Cli>()))
}

fn run(cli: &Cli) -> mr_cli::Result<()> {
    let interrupted = mr_cli::interrupted()?;
    let mut pool = Pool::new(cli.threads.unwrap_or(all_cores().min(MOST_DEFAULT_THREADS)))?;
    let model = Qwen2Dir::open(&cli.model_dir)?;
    if model.file("tokenizer.json").is_none() {
        say("note: there is no tokenizer.json; the file will take token ids, not text");
    }
    // Both files are begun before the work, so that a directory that cannot be written to is noticed at once.
    let target = NewFile::create(&cli.out, sources(&model))?;
    let report = cli.report.as_deref().map(|path| NewFile::create(path, sources(&model))).transpose()?;
    if report.as_ref().is_some_and(|report| report.path() == target.path()) {
        return Err("--report names the file to be converted to; give the report another name".into());
    }

    let converted = convert(&model, &target, cli.origin.as_deref(), &mut pool, &interrupted)?;
    let json = to_json(&model.config, &converted);
    if let Some(report) = &report {
        report.write(|out| Ok(writeln!(out, "{json:#}")?))?;
    }
    target.commit()?;
    report.map(NewFile::commit).transpose()?;
    let mut out = std::io::stdout().lock();
    if cli.json {
        writeln!(out, "{json}")?;
    } else {
        write_summary(&mut out, &cli.out, &model.config, &converted)?;
    }
    Ok(())
}
