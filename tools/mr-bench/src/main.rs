//! Measures the runtime and this machine: speed beside the limits of the hardware, cold start, logits, perplexity.

#![forbid(unsafe_code)]

#[cfg(target_os = "linux")]
mod cold;
#[cfg(target_os = "linux")]
mod cold_child;
mod inference;
mod logits;
mod machine;
mod perplexity;
mod roofline;
#[cfg(target_os = "linux")]
mod sparse;
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
    #[cfg(target_os = "linux")]
    Cold(cold::ColdArgs),
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
    #[cfg(target_os = "linux")]
    {
        let mut args = std::env::args().skip(1);
        if args.next().as_deref() == Some(cold_child::ARGUMENT) {
            return mr_cli::exit_code(cold_child::run(&args.next().unwrap_or_default()));
        }
    }
    mr_cli::exit_code(match mr_cli::parse::<Cli>().command {
        Command::Speed(args) => speed::run(args),
        Command::Roofline(args) => roofline(args),
        #[cfg(target_os = "linux")]
        Command::Cold(args) => cold::run(args),
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
