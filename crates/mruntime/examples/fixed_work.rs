//! A fixed amount of work, for counting instructions: `fixed_work PREFILL DECODE` prefills and decodes that many tokens
//! with a small model of random weights, on one thread.

#![forbid(unsafe_code)]

use mruntime::{
    Arena, Isa, Limits, Pool, Qwen2Config, Qwen2Weights, create_qwen2_arenas, qwen2_forward,
    qwen2_init_kv_cache, qwen2_init_scratch, qwen2_memory_sizes,
};

/// The proportions of Qwen2.5-0.5B , tied, on a smaller scale: 9 million weights.
const CONFIG: Qwen2Config = Qwen2Config {
    hidden_size: 448,
    intermediate_size: 2432,
    num_layers: 2,
    num_heads: 7,
    num_kv_heads: 1,
    head_dim: 64,
    vocab_size: 4000,
    max_position_embeddings: 512,
    rms_norm_eps: 1e-6,
    rope_theta: 1e6,
    tie_word_embeddings: true,
};
const LIMITS: Limits = Limits { context: 512, batch: 64, threads: 1 };

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let numbers: Vec<usize> = std::env::args().skip(1).map(|n| n.parse()).collect::<Result<_, _>>()?;
    let &[prefill, decode] = numbers.as_slice() else {
        return Err("usage: fixed_work PREFILL DECODE (numbers of tokens)".into());
    };
    let mut weights = Arena::new(qwen2_memory_sizes(&CONFIG, &LIMITS)?.weights)?;
    let mut state = 1u32;
    for bits in bytemuck::cast_slice_mut::<u8, u16>(weights.bytes_mut()) {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *bits = 0x2800 | (state >> 16) as u16 & 0x83ff; // FP16 from 1/32 to 1/16, of either sign
    }
    let weights = Qwen2Weights::from_arena(&CONFIG, weights.bytes())?;
    let mut arenas = create_qwen2_arenas(&CONFIG, &LIMITS)?;
    let mut kv = qwen2_init_kv_cache(&CONFIG, LIMITS.context, &mut arenas.kv_cache.bump())?;
    let mut scratch = qwen2_init_scratch(&CONFIG, &LIMITS, Isa::detect(), &mut arenas.scratch.bump())?;
    let mut pool = Pool::new(LIMITS.threads)?;
    let mut logits = vec![0.0; CONFIG.vocab_size as usize];
    let mut run = |tokens: &[u32]| {
        qwen2_forward(&CONFIG, &weights, &mut kv, &mut scratch, tokens, &mut logits, &mut pool)
    };

    if prefill > 0 {
        run(&(0..prefill as u32).collect::<Vec<_>>())?;
    }
    for token in 0..decode as u32 {
        run(&[token])?;
    }
    println!("{}", scratch.isa().name());
    Ok(())
}
