//! One-shot completion: `complete FILE.mrt "The capital of France is"`.

#![forbid(unsafe_code)]

use std::error::Error;
use std::ops::ControlFlow;

use mruntime::{
    GenerateOptions, Isa, Limits, Model, OpenOptions, Pool, Sampler, SamplingOptions, create_qwen2_arenas,
    performance_cores, qwen2_generate, qwen2_init_kv_cache, qwen2_init_scratch,
};
use mruntime_text::{SpecialTokens, Tokenizer};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, prompt] = args.as_slice() else { return Err("usage: complete FILE.mrt PROMPT".into()) };
    let mut pool = Pool::new(performance_cores())?;
    let model = Model::open(file, &OpenOptions::default(), &mut pool)?;
    let (cfg, isa) = (model.config(), Isa::detect());
    let tokenizer = Tokenizer::from_model(&model)?;
    let prompt = tokenizer.encode(prompt, SpecialTokens::AsText)?;

    // Room for the prompt and 32 tokens, no more.
    let options = GenerateOptions { max_new_tokens: 32, stop_tokens: &model.generation()?.stop_tokens };
    let limits =
        Limits { context: prompt.len() + options.max_new_tokens, batch: 512, threads: pool.threads() };
    let mut arenas = create_qwen2_arenas(cfg, &limits)?;
    let mut kv = qwen2_init_kv_cache(cfg, limits.context, &mut arenas.kv_cache.bump())?;
    let mut scratch = qwen2_init_scratch(cfg, &limits, isa, &mut arenas.scratch.bump())?;
    let mut sampler = Sampler::new(SamplingOptions::GREEDY, cfg.vocab_size as usize, isa)?;

    let mut answer = Vec::new();
    let weights = model.weights();
    qwen2_generate(
        cfg,
        &weights,
        &mut kv,
        &mut scratch,
        &prompt,
        &mut sampler,
        &options,
        &mut pool,
        |token| {
            answer.push(token);
            ControlFlow::Continue(())
        },
    )?;
    println!("{}", tokenizer.decode(&answer, true));
    Ok(())
}
