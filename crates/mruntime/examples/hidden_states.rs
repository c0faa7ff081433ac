//! Reads what is inside: `hidden_states FILE.mrt TOKEN_ID...` prints, for each layer, the size of the last token's hidden
//! state and how far the layer has turned it.

#![forbid(unsafe_code)]

use std::error::Error;

use mruntime::{
    Isa, Limits, Model, OpenOptions, Pool, Stage, create_qwen2_arenas, performance_cores,
    qwen2_forward_observed, qwen2_init_kv_cache, qwen2_init_scratch,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let file = args.next().ok_or("usage: hidden_states FILE.mrt TOKEN_ID...")?;
    let tokens: Vec<u32> = args.map(|id| id.parse()).collect::<Result<_, _>>()?;
    let mut pool = Pool::new(performance_cores())?;
    let model = Model::open(file, &OpenOptions::default(), &mut pool)?;
    let cfg = model.config();
    let limits = Limits { context: tokens.len().max(1), batch: 512, threads: pool.threads() };
    let mut arenas = create_qwen2_arenas(cfg, &limits)?;
    let mut kv = qwen2_init_kv_cache(cfg, limits.context, &mut arenas.kv_cache.bump())?;
    let mut scratch = qwen2_init_scratch(cfg, &limits, Isa::detect(), &mut arenas.scratch.bump())?;

    // `values` are [tokens][hidden]: the last row belongs to the last token.
    let hidden = cfg.hidden_size as usize;
    let mut states: Vec<Vec<f32>> = Vec::new();
    let weights = model.weights();
    qwen2_forward_observed(cfg, &weights, &mut kv, &mut scratch, &tokens, &mut [], &mut pool, |seen| {
        if let Stage::Embed | Stage::Down = seen.stage {
            states.push(seen.values[seen.values.len() - hidden..].to_vec());
        }
    })?;

    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    println!("layer  norm      cosine with the layer before");
    for (layer, pair) in states.windows(2).enumerate() {
        let (before, after) = (&pair[0], &pair[1]);
        let cosine = dot(before, after) / (dot(before, before) * dot(after, after)).sqrt();
        println!("{layer:5}  {:<8.2}  {cosine:.4}", dot(after, after).sqrt());
    }
    Ok(())
}
