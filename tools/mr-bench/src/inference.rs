//! A model with the memory to run it: what every measurement but the roofline starts from.

use std::path::Path;

use clap::Args;
use mr_cli::{NumericsArg, Result};
use mruntime::{
    Isa, KvCache, Limits, Numerics, Observation, Pool, Qwen2Arenas, Qwen2Config, Qwen2Weights, Scratch,
    qwen2_forward, qwen2_forward_observed, qwen2_init_kv_cache, qwen2_init_scratch,
};

/// How to run the model, whatever is measured.
#[derive(Args)]
pub struct RunArgs {
    /// Threads [default: all fast physical cores]
    #[arg(short, long, value_name = "N", value_parser = mr_cli::parse_threads)]
    pub threads: Option<usize>,
    #[command(flatten)]
    pub isa: IsaArg,
}

/// The choice of the instruction set, and of what to make of it.
#[derive(Args)]
pub struct IsaArg {
    /// Instruction set [default: the fastest of this machine]
    #[arg(long, value_name = "NAME", value_parser = parse_isa)]
    isa: Option<Isa>,
    #[command(flatten)]
    numerics: NumericsArg,
}

impl IsaArg {
    pub fn get(&self) -> Isa {
        self.isa.unwrap_or_else(Isa::detect)
    }

    /// What goes with it.
    ///
    /// # Errors
    /// When the fast lane was asked for and there is none.
    pub fn numerics(&self) -> Result<Numerics> {
        self.numerics.get(self.get())
    }
}

fn parse_isa(name: &str) -> std::result::Result<Isa, String> {
    Isa::by_name(name).ok_or_else(|| {
        let names: Vec<_> = Isa::supported().map(Isa::name).collect();
        format!("this machine has {}", names.join(", "))
    })
}

/// Weights, KV cache and scratch memory at work.
pub struct Inference<'a> {
    cfg: Qwen2Config,
    weights: Qwen2Weights<'a>,
    pub kv: KvCache<'a>,
    scratch: Scratch<'a>,
}

impl<'a> Inference<'a> {
    /// Over arenas made for `limits`.
    pub fn new(
        cfg: &Qwen2Config,
        weights: Qwen2Weights<'a>,
        arenas: &'a mut Qwen2Arenas,
        limits: &Limits,
        isa: &IsaArg,
    ) -> Result<Self> {
        let kv = qwen2_init_kv_cache(cfg, limits.context, &mut arenas.kv_cache.bump())?;
        let mut scratch = qwen2_init_scratch(cfg, limits, isa.get(), &mut arenas.scratch.bump())?;
        scratch.set_numerics(isa.numerics()?);
        Ok(Inference { cfg: *cfg, weights, kv, scratch })
    }

    /// Whatever the command line chose.
    pub fn set_numerics(&mut self, numerics: Numerics) {
        self.scratch.set_numerics(numerics);
    }

    /// [`qwen2_forward`].
    pub fn forward(&mut self, tokens: &[u32], logits: &mut [f32], pool: &mut Pool) -> Result<()> {
        Ok(qwen2_forward(&self.cfg, &self.weights, &mut self.kv, &mut self.scratch, tokens, logits, pool)?)
    }

    /// [`qwen2_forward_observed`].
    pub fn forward_observed(
        &mut self,
        tokens: &[u32],
        logits: &mut [f32],
        pool: &mut Pool,
        observe: impl FnMut(Observation<'_>),
    ) -> Result<()> {
        let Inference { cfg, weights, kv, scratch } = self;
        Ok(qwen2_forward_observed(cfg, weights, kv, scratch, tokens, logits, pool, observe)?)
    }
}

/// Room for `rows` rows of logits.
pub fn logits_rows(rows: usize, cfg: &Qwen2Config) -> Result<Vec<f32>> {
    let len = rows.saturating_mul(cfg.vocab_size as usize);
    let mut logits = Vec::new();
    logits.try_reserve_exact(len).map_err(|_| {
        format!("no memory for the logits of {rows} tokens at a time; take a smaller --batch")
    })?;
    logits.resize(len, 0.0);
    Ok(logits)
}

/// Reads a JSON array of token ids, at least one, all within a vocabulary of `vocab`.
pub fn read_tokens(path: &Path, vocab: u32) -> Result<Vec<u32>> {
    let shown = path.display();
    let text = std::fs::read(path).map_err(|e| format!("{shown}: {e}"))?;
    let tokens: Vec<u32> = serde_json::from_slice(&text)
        .map_err(|e| format!("{shown}: is not a JSON array of token ids: {e}"))?;
    if tokens.is_empty() {
        return Err(format!("{shown}: has no token ids").into());
    }
    match tokens.iter().position(|&token| token >= vocab) {
        Some(i) => {
            let id = tokens[i];
            Err(format!("{shown}: id {id} at index {i} is outside the vocabulary of {vocab} tokens").into())
        }
        None => Ok(tokens),
    }
}
