//! `mr-bench quality`: what the fast lane costs, beside the exact default on the same tokens.

use std::io::Write;

use mr_cli::Result;
use mruntime::{Chunks, Limits, Numerics, OpenOptions, Pool, argmax, create_qwen2_arenas};
use serde::Serialize;

use crate::inference::{Inference, logits_rows};
use crate::machine::Origin;
use crate::perplexity::{PerplexityArgs, negative_log_likelihood, progress_bar};

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    origin: Origin,
    model: String,
    isa: &'static str,
    numerics: &'static str,
    threads: usize,
    batch: usize,
    tokens: usize,
    window: usize,
    predictions: usize,
    perplexity_exact: f64,
    perplexity_fast: f64,
    /// Kullback-Leibler divergence of the fast lane's probabilities from the exact ones, nats.
    kl_mean: f64,
    kl_max: f64,
    /// Predictions whose most likely token is the same, as a share of all.
    top1_agreement: f64,
}

/// One prediction by both.
#[derive(Clone, Default)]
struct Prediction {
    exact_nll: f64,
    fast_nll: f64,
    kl: f64,
    same_top1: bool,
}

/// Runs the subcommand.
pub fn run(args: PerplexityArgs) -> Result<()> {
    let isa = args.run.isa.get();
    let Some(numerics) = Numerics::fast(isa) else {
        return Err(format!("there is no fast lane beside {} on this machine", isa.name()).into());
    };
    let mut pool = Pool::new(args.run.threads.unwrap_or_else(mruntime::performance_cores))?;
    let model = args.model.open(&OpenOptions::default(), &mut pool)?;
    let cfg = model.config();
    let (tokens, window) = (args.tokens(&model)?, args.window(cfg));
    let limits = Limits { context: window, batch: args.batch.min(window), threads: pool.threads() };
    let mut arenas = [create_qwen2_arenas(cfg, &limits)?, create_qwen2_arenas(cfg, &limits)?];
    let [exact_arenas, fast_arenas] = &mut arenas;
    let mut exact = Inference::new(cfg, model.weights(), exact_arenas, &limits, &args.run.isa)?;
    let mut fast = Inference::new(cfg, model.weights(), fast_arenas, &limits, &args.run.isa)?;
    exact.set_numerics(Numerics::Exact);
    fast.set_numerics(numerics);

    let vocab = cfg.vocab_size as usize;
    let (mut exact_logits, mut fast_logits) =
        (logits_rows(limits.batch, cfg)?, logits_rows(limits.batch, cfg)?);
    let mut predictions = vec![Prediction::default(); limits.batch];
    let (mut sum, mut kl_max, mut same, mut count) = (Prediction::default(), 0.0f64, 0, 0);
    let bar = progress_bar(tokens.len() as u64);
    for window in tokens.chunks(window) {
        exact.kv.truncate(0);
        fast.kv.truncate(0);
        let (inputs, targets) = (&window[..window.len() - 1], &window[1..]);
        for (inputs, targets) in inputs.chunks(limits.batch).zip(targets.chunks(limits.batch)) {
            let exact_logits = &mut exact_logits[..inputs.len() * vocab];
            let fast_logits = &mut fast_logits[..inputs.len() * vocab];
            exact.forward(inputs, exact_logits, &mut pool)?;
            fast.forward(inputs, fast_logits, &mut pool)?;
            let predictions = &mut predictions[..inputs.len()];
            let (exact_logits, fast_logits) = (&*exact_logits, &*fast_logits);
            pool.run_split(Chunks::new(predictions, 1), |_, i, prediction| {
                let row = i * vocab..(i + 1) * vocab;
                prediction[0] = compare(&exact_logits[row.clone()], &fast_logits[row], targets[i]);
            });
            for prediction in &*predictions {
                sum.exact_nll += prediction.exact_nll;
                sum.fast_nll += prediction.fast_nll;
                sum.kl += prediction.kl;
                kl_max = kl_max.max(prediction.kl);
                same += usize::from(prediction.same_top1);
            }
            count += inputs.len();
            bar.inc(inputs.len() as u64);
            bar.set_message(format!("{:.4}", (sum.fast_nll / count as f64).exp()));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();

    let mean = |sum: f64| sum / count as f64;
    let report = Report {
        origin: Origin::now(),
        model: model.name(),
        isa: isa.name(),
        numerics: numerics.name(),
        threads: pool.threads(),
        batch: limits.batch,
        tokens: tokens.len(),
        window,
        predictions: count,
        perplexity_exact: mean(sum.exact_nll).exp(),
        perplexity_fast: mean(sum.fast_nll).exp(),
        kl_mean: mean(sum.kl),
        kl_max,
        top1_agreement: mean(same as f64),
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
        return Ok(());
    }
    report.origin.write(&mut out)?;
    writeln!(out, "model     {}, {}, batch {}", report.model, report.isa, report.batch)?;
    writeln!(out, "text      {} tokens, windows of {window}, {count} predictions\n", report.tokens)?;
    writeln!(out, "perplexity, exact          {:.4}", report.perplexity_exact)?;
    writeln!(out, "perplexity, {:<14} {:.4}", report.numerics, report.perplexity_fast)?;
    writeln!(out, "KL divergence, mean        {:.3e} nats", report.kl_mean)?;
    writeln!(out, "KL divergence, max         {:.3e} nats", report.kl_max)?;
    writeln!(out, "same most likely token     {:.3} %", 100.0 * report.top1_agreement)?;
    Ok(())
}

/// Both predictions of `target`: `KL(exact || fast) = sum p ln(p / q)`.
fn compare(exact: &[f32], fast: &[f32], target: u32) -> Prediction {
    // Of token 0, whose logit is taken away again: the logarithm of the sum of exponentials.
    let log_sum = |logits: &[f32]| negative_log_likelihood(logits, 0) + f64::from(logits[0]);
    let (exact_sum, fast_sum) = (log_sum(exact), log_sum(fast));
    let kl = exact.iter().zip(fast).map(|(&p, &q)| {
        let (ln_p, ln_q) = (f64::from(p) - exact_sum, f64::from(q) - fast_sum);
        ln_p.exp() * (ln_p - ln_q)
    });
    Prediction {
        exact_nll: exact_sum - f64::from(exact[target as usize]),
        fast_nll: fast_sum - f64::from(fast[target as usize]),
        // Never below zero but by rounding.
        kl: kl.sum::<f64>().max(0.0),
        same_top1: argmax(exact) == argmax(fast),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_that_of_its_definition() {
        let ln = |p: f32| p.ln() + 3.0;
        let (exact, fast) = ([0.5, 0.25, 0.25].map(ln), [0.25, 0.5, 0.25].map(ln));
        let both = compare(&exact, &fast, 1);
        assert!((both.kl - (0.5 * 2f64.ln() - 0.25 * 2f64.ln())).abs() < 1e-6);
        assert!((both.exact_nll - 4f64.ln()).abs() < 1e-6 && (both.fast_nll - 2f64.ln()).abs() < 1e-6);
        assert!(!both.same_top1);
        let same = compare(&exact, &exact, 0);
        assert!(same.kl == 0.0 && same.same_top1);
    }
}
