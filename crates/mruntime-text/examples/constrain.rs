//! Custom logits processing: `constrain FILE.mrt QUESTION` lets the model answer with "yes" or "no" only, and never with
//! a token whose text holds an exclamation mark.
//!
//! The hook stands between the logits and the choice: `session_logits` gives the logits to change, `session_next` chooses.

#![forbid(unsafe_code)]

use std::error::Error;

use mruntime::{
    Isa, Limits, Model, OpenOptions, Pool, Sampler, SamplingOptions, Session, create_qwen2_arenas,
    performance_cores, qwen2_init_kv_cache, qwen2_init_scratch, session_logits, session_next,
    session_prefill,
};
use mruntime_text::{ChatTemplate, SpecialTokens, Tokenizer};

/// Forbids every token that does not go on with one of `allowed`, of which `said` is said.
fn mask(logits: &mut [f32], tokenizer: &Tokenizer<'_>, allowed: &[&str], said: &str) {
    for (id, logit) in logits.iter_mut().enumerate() {
        let text = tokenizer.decode(&[id as u32], true);
        let goes_on =
            allowed.iter().any(|word| word.strip_prefix(said).is_some_and(|rest| rest.starts_with(&text)));
        if text.is_empty() || text.contains('!') || !goes_on {
            *logit = f32::NEG_INFINITY;
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, question] = args.as_slice() else { return Err("usage: constrain FILE.mrt QUESTION".into()) };
    let mut pool = Pool::new(performance_cores())?;
    let model = Model::open(file, &OpenOptions::default(), &mut pool)?;
    let (cfg, isa) = (*model.config(), Isa::detect());
    let tokenizer = Tokenizer::from_model(&model)?;
    let template = ChatTemplate::from_model(&model)?.ok_or("the model has no chat template")?;
    let message = serde_json::json!({ "role": "user", "content": question });
    let prompt = tokenizer.encode(&template.render(&[message], None, true)?, SpecialTokens::Parse)?;

    let limits = Limits { context: prompt.len() + 16, batch: 512, threads: pool.threads() };
    let mut arenas = create_qwen2_arenas(&cfg, &limits)?;
    let kv = qwen2_init_kv_cache(&cfg, limits.context, &mut arenas.kv_cache.bump())?;
    let scratch = qwen2_init_scratch(&cfg, &limits, isa, &mut arenas.scratch.bump())?;
    let mut session = Session::new(cfg, model.weights(), kv, scratch);
    let mut sampler = Sampler::new(SamplingOptions::GREEDY, cfg.vocab_size as usize, isa)?;

    session_prefill(&mut session, &prompt, &mut pool)?;
    let (allowed, mut said) = (["yes", "no"], String::new());
    while !allowed.contains(&said.as_str()) {
        mask(session_logits(&mut session, &mut pool)?, &tokenizer, &allowed, &said);
        let token = session_next(&mut session, &mut sampler, &mut pool)?;
        said.push_str(&tokenizer.decode(&[token], true));
    }
    println!("{said}");
    Ok(())
}
