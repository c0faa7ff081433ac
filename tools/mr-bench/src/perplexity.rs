//! `mr-bench perplexity`: how well the model predicts a text.

use std::io::Write;
use std::path::PathBuf;

use clap::{ArgGroup, Args};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use mr_cli::{LoadedModel, ModelSource, Result};
use mruntime::{Chunks, Limits, OpenOptions, Pool, Qwen2Config, create_qwen2_arenas};
use mruntime_text::SpecialTokens;
use serde_json::json;

use crate::inference::{Inference, RunArgs, logits_rows, read_tokens};
use crate::machine::Origin;

/// Windows are not longer than this by default: their KV cache should fit any machine.
const DEFAULT_WINDOW: usize = 4096;

/// Measure the perplexity of a text
///
/// The text is cut into windows of --ctx tokens side by side. Each window is predicted by itself, without a token
/// before it, and all predictions within it count: of N tokens, N - 1.
#[derive(Args)]
#[command(group = ArgGroup::new("text").required(true))]
pub struct PerplexityArgs {
    #[command(flatten)]
    pub model: ModelSource,
    /// UTF-8 text; special tokens in it (<|endoftext|>) are taken as such
    #[arg(short, long, value_name = "TEXT", group = "text")]
    file: Option<PathBuf>,
    /// JSON array of token ids, instead of a text
    #[arg(long, value_name = "IDS.json", group = "text")]
    tokens: Option<PathBuf>,
    /// Tokens of a window [default: what the model was trained for, at most 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    ctx: Option<u32>,
    /// Tokens of a forward pass; the result is the same with any number
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = mr_cli::parse_count)]
    pub batch: usize,
    #[command(flatten)]
    pub run: RunArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

impl PerplexityArgs {
    /// The text, as tokens: at least two.
    pub fn tokens(&self, model: &LoadedModel) -> Result<Vec<u32>> {
        let tokens = match (&self.file, &self.tokens) {
            (Some(path), _) => {
                let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
                model.tokenizer()?.encode(&text, SpecialTokens::Parse)?
            }
            (None, Some(path)) => read_tokens(path, model.config().vocab_size)?,
            (None, None) => unreachable!("clap asks for one"),
        };
        match tokens.len() {
            n @ 0..2 => Err(format!("the text has {n} tokens; a prediction needs at least 2").into()),
            _ => Ok(tokens),
        }
    }

    /// Tokens of a window.
    pub fn window(&self, cfg: &Qwen2Config) -> usize {
        let longest = (cfg.max_position_embeddings as usize).min(DEFAULT_WINDOW);
        self.ctx.map_or(longest, |n| n as usize)
    }
}

/// Runs the subcommand.
pub fn run(args: PerplexityArgs) -> Result<()> {
    let mut pool = Pool::new(args.run.threads.unwrap_or_else(mruntime::performance_cores))?;
    let model = args.model.open(&OpenOptions::default(), &mut pool)?;
    let cfg = model.config();
    let tokens = args.tokens(&model)?;
    let window = args.window(cfg);
    let (isa, numerics) = (args.run.isa.get(), args.run.isa.numerics()?);
    let limits = Limits { context: window, batch: args.batch.min(window), threads: pool.threads() };
    let mut arenas = create_qwen2_arenas(cfg, &limits)?;
    let mut inference = Inference::new(cfg, model.weights(), &mut arenas, &limits, &args.run.isa)?;

    let vocab = cfg.vocab_size as usize;
    let mut logits = logits_rows(limits.batch, cfg)?;
    let mut losses = vec![0.0; limits.batch];
    let (mut sum, mut predictions) = (0.0, 0);
    let bar = progress_bar(tokens.len() as u64);
    for window in tokens.chunks(window) {
        inference.kv.truncate(0);
        // Nothing follows the last token that it could predict.
        let (inputs, targets) = (&window[..window.len() - 1], &window[1..]);
        for (inputs, targets) in inputs.chunks(limits.batch).zip(targets.chunks(limits.batch)) {
            let logits = &mut logits[..inputs.len() * vocab];
            let losses = &mut losses[..inputs.len()];
            inference.forward(inputs, logits, &mut pool)?;
            let logits = &*logits;
            pool.run_split(Chunks::new(losses, 1), |_, i, loss| {
                loss[0] = negative_log_likelihood(&logits[i * vocab..][..vocab], targets[i]);
            });
            // One by one, so that the sum does not depend on the batch.
            losses.iter().for_each(|loss| sum += loss);
            predictions += losses.len();
            bar.inc(inputs.len() as u64);
            bar.set_message(format!("{:.4}", (sum / predictions as f64).exp()));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();

    let mean = sum / predictions as f64;
    let perplexity = mean.exp();
    let origin = Origin::now();
    let mut stdout = std::io::stdout().lock();
    if args.json {
        let result = json!({
            "model": model.name(), "tokens": tokens.len(), "window": window, "predictions": predictions,
            "mean_nll": mean, "perplexity": perplexity, "threads": pool.threads(), "isa": isa.name(), "numerics": numerics.name(),
        });
        writeln!(stdout, "{}", origin.with(result)?)?;
    } else {
        origin.write(&mut stdout)?;
        let (isa, numerics, threads) = (isa.name(), numerics.name(), pool.threads());
        writeln!(stdout, "run with  {isa}, {numerics} numerics, {threads} threads\n")?;
        writeln!(stdout, "tokens {}, windows of {window}, predictions {predictions}", tokens.len())?;
        writeln!(stdout, "mean negative log-likelihood {mean:.6} nats")?;
        writeln!(stdout, "perplexity {perplexity:.4}")?;
    }
    Ok(())
}

/// `-ln softmax(logits)[target]`, in nats: log-sum-exp less the target's logit.
pub fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    sum.ln() + max - f64::from(logits[target as usize])
}

/// On a terminal only, which indicatif sees to.
pub fn progress_bar(tokens: u64) -> ProgressBar {
    let style = "{bar:30} {pos}/{len} tokens, {per_sec}, ETA {eta}, perplexity {msg}";
    let style = ProgressStyle::with_template(style).expect("the template is valid");
    ProgressBar::new(tokens).with_style(style).with_finish(ProgressFinish::AndClear)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_those_of_softmax() {
        // Probabilities 1/2, 1/4, 1/4, however far from zero the logits are.
        for shift in [0.0, 1000.0, -1000.0f32] {
            let logits = [2.0f32.ln() + shift, shift, shift];
            for (target, p) in [(0, 0.5f64), (1, 0.25), (2, 0.25)] {
                assert!((negative_log_likelihood(&logits, target) + p.ln()).abs() < 1e-4);
            }
        }
    }
}
