//! The model is a part of the program: `linked-weights TOKEN_ID...` prints the id of the most probable next token.

#![forbid(unsafe_code)]

use std::error::Error;

use mruntime::{
    Isa, Limits, Model, OpenOptions, Pool, argmax, create_qwen2_arenas, include_model, performance_cores,
    qwen2_forward, qwen2_init_kv_cache, qwen2_init_scratch,
};

static MODEL: &[u8] = include_model!(env!("MODEL"));

fn main() -> Result<(), Box<dyn Error>> {
    let tokens: Vec<u32> = std::env::args().skip(1).map(|id| id.parse()).collect::<Result<_, _>>()?;
    let mut pool = Pool::new(performance_cores())?;
    let model = Model::from_static(MODEL, &OpenOptions::default(), &mut pool)?;
    let cfg = model.config();
    let limits = Limits { context: tokens.len().max(1), batch: 512, threads: pool.threads() };
    let mut arenas = create_qwen2_arenas(cfg, &limits)?;
    let mut kv = qwen2_init_kv_cache(cfg, limits.context, &mut arenas.kv_cache.bump())?;
    let mut scratch = qwen2_init_scratch(cfg, &limits, Isa::detect(), &mut arenas.scratch.bump())?;
    let mut logits = vec![0.0; cfg.vocab_size as usize];
    qwen2_forward(cfg, &model.weights(), &mut kv, &mut scratch, &tokens, &mut logits, &mut pool)?;
    println!("{}", argmax(&logits));
    Ok(())
}
