//! `mr-bench logits`: what the model makes of given token ids, as numbers for other programs.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use clap::Args;
use mr_cli::{INTERRUPTED, ModelSource, NewFile, Result};
use mruntime::{Limits, OpenOptions, Pool, create_qwen2_arenas};
use serde_json::json;

use crate::inference::{Inference, RunArgs, logits_rows, read_tokens};
use crate::machine::Origin;

/// Write the logits of given token ids: raw little-endian f32, vocab_size of them for each position
#[derive(Args)]
pub struct LogitsArgs {
    #[command(flatten)]
    model: ModelSource,
    /// JSON array of token ids
    #[arg(long, value_name = "IDS.json")]
    tokens: PathBuf,
    /// File to write; it appears complete or not at all
    #[arg(long, value_name = "OUT.bin")]
    out: PathBuf,
    /// Write the logits of every position, not only of the last
    #[arg(long)]
    all: bool,
    /// Tokens of a forward pass; the logits have the same bits with any number
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = mr_cli::parse_count)]
    batch: usize,
    #[command(flatten)]
    run: RunArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: LogitsArgs) -> Result<()> {
    let mut pool = Pool::new(args.run.threads.unwrap_or_else(mruntime::performance_cores))?;
    let model = args.model.open(&OpenOptions::default(), &mut pool)?;
    let cfg = model.config();
    let tokens = read_tokens(&args.tokens, cfg.vocab_size)?;
    let out = NewFile::create(&args.out, model.paths().iter().chain([&args.tokens]))?;
    let interrupted = mr_cli::interrupted()?;
    let limits =
        Limits { context: tokens.len(), batch: args.batch.min(tokens.len()), threads: pool.threads() };
    let (isa, numerics) = (args.run.isa.get(), args.run.isa.numerics()?);
    let mut arenas = create_qwen2_arenas(cfg, &limits)?;
    let mut inference = Inference::new(cfg, model.weights(), &mut arenas, &limits, &args.run.isa)?;

    let vocab = cfg.vocab_size as usize;
    let mut logits = logits_rows(if args.all { limits.batch } else { 1 }, cfg)?;
    out.write(|out| {
        for batch in tokens.chunks(limits.batch) {
            let logits = &mut logits[..vocab * if args.all { batch.len() } else { 1 }];
            inference.forward(batch, logits, &mut pool)?;
            if interrupted.load(Ordering::Relaxed) {
                return Err(INTERRUPTED.into());
            }
            if args.all || inference.kv.len() == tokens.len() {
                for logit in logits {
                    out.write_all(&logit.to_le_bytes())?;
                }
            }
        }
        Ok(())
    })?;
    out.commit()?;

    let origin = Origin::now();
    let positions = if args.all { tokens.len() } else { 1 };
    let mut stdout = io::stdout().lock();
    if args.json {
        let result = json!({
            "model": model.name(), "tokens": tokens.len(), "positions": positions, "vocab_size": vocab,
            "out": args.out.display().to_string(), "threads": pool.threads(), "isa": isa.name(), "numerics": numerics.name(),
        });
        writeln!(stdout, "{}", origin.with(result)?)?;
    } else {
        origin.write(&mut stdout)?;
        let (isa, numerics, threads) = (isa.name(), numerics.name(), pool.threads());
        writeln!(stdout, "run with  {isa}, {numerics} numerics, {threads} threads\n")?;
        writeln!(
            stdout,
            "{}: {positions} x {vocab} logits after {} tokens",
            args.out.display(),
            tokens.len()
        )?;
    }
    Ok(())
}
