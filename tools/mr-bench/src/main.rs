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
mod profile;
mod quality;
mod roofline;
#[cfg(target_os = "linux")]
mod sparse;
mod speed;
mod turns;
mod work;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    Turns(turns::TurnsArgs),
    Roofline(roofline::RooflineArgs),
    #[cfg(target_os = "linux")]
    Cold(cold::ColdArgs),
    Logits(logits::LogitsArgs),
    Perplexity(perplexity::PerplexityArgs),
    /// Measure what the fast lane costs: perplexity, KL divergence and top-1 agreement beside the exact default
    #[command(mut_arg("numerics", |arg| arg.hide(true)))]
    Quality(perplexity::PerplexityArgs),
}

fn main() -> ExitCode {
    #[cfg(target_os = "linux")]
    {
        let mut args = std::env::args_os().skip(1);
        if args.next().is_some_and(|arg| arg == cold_child::ARGUMENT) {
            return mr_cli::exit_code(cold_child::run(&args.next().unwrap_or_default()));
        }
    }
    mr_cli::exit_code(match mr_cli::parse::<Cli>().command {
        Command::Speed(args) => speed::run(args),
        Command::Turns(args) => turns::run(args),
        Command::Roofline(args) => roofline::run(args),
        #[cfg(target_os = "linux")]
        Command::Cold(args) => cold::run(args),
        Command::Logits(args) => logits::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Quality(args) => quality::run(args),
    })
}
