//! Measures this machine and the runtime on it.

#![forbid(unsafe_code)]

mod roofline;

use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure this machine's read bandwidth and f32 FMA peak, the limits of decoding and prefill
    Roofline(RooflineArgs),
}

#[derive(Args)]
struct RooflineArgs {
    /// Numbers of threads [default: 1 and all cores]
    #[arg(long, value_delimiter = ',')]
    threads: Vec<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn main() {
    let result = match Cli::parse().command {
        Command::Roofline(args) => roofline(args),
    };
    if let Err(error) = result {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn roofline(args: RooflineArgs) -> Result<(), Box<dyn std::error::Error>> {
    let mut threads = args.threads;
    if threads.is_empty() {
        threads = vec![1, std::thread::available_parallelism()?.get()];
        threads.dedup();
    }
    let rooflines = roofline::measure(&threads)?;
    if args.json {
        println!("{}", serde_json::json!({ "roofline": rooflines }));
    } else {
        roofline::print(&rooflines);
    }
    Ok(())
}
