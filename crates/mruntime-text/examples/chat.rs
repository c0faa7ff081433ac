//! A chat whose answers appear as they are generated: `chat FILE.mrt`, one message a line.
//!
//! Each turn gives the whole conversation to the session, which computes what is new only.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{self, BufRead, Write};
use std::ops::ControlFlow;

use mruntime::{
    GenerateOptions, Isa, Limits, Model, OpenOptions, Pool, Sampler, SamplingOptions, Session,
    create_qwen2_arenas, performance_cores, qwen2_init_kv_cache, qwen2_init_scratch, session_generate,
};
use mruntime_text::{ChatTemplate, SpecialTokens, StreamDecoder, Tokenizer};
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let file = std::env::args().nth(1).ok_or("usage: chat FILE.mrt")?;
    let mut pool = Pool::new(performance_cores())?;
    let model = Model::open(file, &OpenOptions::default(), &mut pool)?;
    let (cfg, isa, defaults) = (*model.config(), Isa::detect(), model.generation()?);
    let tokenizer = Tokenizer::from_model(&model)?;
    let template = ChatTemplate::from_model(&model)?.ok_or("the model has no chat template")?;

    let context = 4096.min(cfg.max_position_embeddings as usize);
    let limits = Limits { context, batch: 512, threads: pool.threads() };
    let mut arenas = create_qwen2_arenas(&cfg, &limits)?;
    let kv = qwen2_init_kv_cache(&cfg, context, &mut arenas.kv_cache.bump())?;
    let scratch = qwen2_init_scratch(&cfg, &limits, isa, &mut arenas.scratch.bump())?;
    let mut session = Session::new(cfg, model.weights(), kv, scratch);
    let mut sampler =
        Sampler::new(SamplingOptions::from_defaults(&defaults, 1), cfg.vocab_size as usize, isa)?;
    let options = GenerateOptions { max_new_tokens: 1000, stop_tokens: &defaults.stop_tokens };

    let (mut messages, mut out) = (Vec::new(), io::stdout().lock());
    for line in io::stdin().lock().lines() {
        messages.push(json!({ "role": "user", "content": line? }));
        let prompt = tokenizer.encode(&template.render(&messages, None, true)?, SpecialTokens::Parse)?;
        let (mut decoder, mut answer) = (StreamDecoder::new(&tokenizer, true), String::new());
        session_generate(&mut session, &prompt, &mut sampler, &options, &mut pool, |token| {
            let piece = decoder.push(token);
            answer.push_str(piece);
            // Whoever cannot be written to any more does not want the rest.
            match write!(out, "{piece}").and_then(|()| out.flush()) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        writeln!(out)?;
        messages.push(json!({ "role": "assistant", "content": answer }));
    }
    Ok(())
}
