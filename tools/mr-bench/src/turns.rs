//! `mr-bench turns`: decodes when it is told to, for comparisons with other programs within a second. What memory can do
//! changes from minute to minute, so that one program's rate says nothing about another's a minute later.

use std::io::{self, BufRead, Write};
use std::time::Instant;

use clap::Args;
use mr_cli::{ModelSource, Result};
use mruntime::{Limits, OpenOptions, Pool, create_qwen2_arenas};

use crate::inference::{Inference, RunArgs};
use crate::speed::random_token;

/// Tokens in the context before those that are decoded.
const DEPTH: u32 = 32;

/// Tokens of the context.
const CONTEXT: u32 = 288;

/// Decode as many tokens as each line of standard input says, and answer with a JSON array of their seconds
///
/// Each turn starts after the same 32 tokens. Tokens are random; nothing is sampled.
#[derive(Args)]
pub struct TurnsArgs {
    #[command(flatten)]
    model: ModelSource,
    #[command(flatten)]
    run: RunArgs,
}

/// Runs the subcommand.
pub fn run(args: TurnsArgs) -> Result<()> {
    let mut pool = Pool::new(args.run.threads.unwrap_or_else(mruntime::performance_cores))?;
    let model = args.model.open(&OpenOptions::default(), &mut pool)?;
    let cfg = model.config();
    let limits = Limits { context: CONTEXT as usize, batch: DEPTH as usize, threads: pool.threads() };
    let mut arenas = create_qwen2_arenas(cfg, &limits)?;
    let mut inference = Inference::new(cfg, model.weights(), &mut arenas, &limits, &args.run.isa)?;
    let tokens: Vec<u32> = (0..CONTEXT).map(|i| random_token(i, cfg.vocab_size)).collect();
    let (prompt, tokens) = tokens.split_at(DEPTH as usize);
    let mut logits = vec![0.0; cfg.vocab_size as usize];
    inference.forward(prompt, &mut [], &mut pool)?;
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|e| format!("standard input: {e}"))?;
        let tokens = line.trim().parse().ok().and_then(|n: usize| tokens.get(..n)).ok_or_else(|| {
            format!("standard input: \"{line}\" is not a number of tokens up to {}", tokens.len())
        })?;
        inference.kv.truncate(prompt.len());
        let mut seconds = Vec::new();
        for &token in tokens {
            let start = Instant::now();
            inference.forward(&[token], &mut logits, &mut pool)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        let mut out = io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&seconds)?)?;
        out.flush()?;
    }
    Ok(())
}
