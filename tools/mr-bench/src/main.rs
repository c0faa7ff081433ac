//! Measures the runtime and this machine: speed beside the limits of the hardware, logits, perplexity.

#![forbid(unsafe_code)]

mod inference;
mod logits;
mod machine;
mod perplexity;
mod roofline;
mod speed;
mod work;

use std::io::Write;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Measure the runtime and this machine
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Speed(speed::SpeedArgs),
    /// Measure this machine's read bandwidth and f32 FMA peak, the limits of decoding and prefill
    Roofline(RooflineArgs),
    Logits(logits::LogitsArgs),
    Perplexity(perplexity::PerplexityArgs),
}

#[derive(Args)]
struct RooflineArgs {
    /// Numbers of threads [default: 1 and all cores]
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', value_parser = mr_cli::parse_threads)]
    threads: Vec<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    mr_cli::exit_code(match mr_cli::parse::<Cli>().command {
        Command::Speed(args) => speed::run(args),
        Command::Roofline(args) => roofline(args),
        Command::Logits(args) => logits::run(args),
        Command::Perplexity(args) => perplexity::run(args),
    })
}

fn roofline(args: RooflineArgs) -> mr_cli::Result<()> {
    let mut threads = args.threads;
    if threads.is_empty() {
        threads = vec![1, mr_cli::all_cores()];
        threads.dedup();
    }
    let rooflines = roofline::measure(&threads)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::json!({ "roofline": rooflines }))?;
    } else {
        roofline::write_table(&rooflines, &mut out)?;
    }
    Ok(())
}
