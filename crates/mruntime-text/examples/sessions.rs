//! Many sessions over one mapped model: `sessions FILE.mrt QUESTION...` answers all questions at the same time, each on a
//! thread of its own. What they have in common, the beginning of the prompt, is computed once.

#![forbid(unsafe_code)]

use std::error::Error;
use std::ops::ControlFlow;
use std::thread;

use mruntime::{
    Arena, GenerateOptions, Isa, Limits, Model, OpenOptions, Pool, Sampler, SamplingOptions, Session,
    create_qwen2_arenas, qwen2_init_kv_cache, qwen2_init_scratch, session_generate, session_prefill,
};
use mruntime_text::{ChatTemplate, SpecialTokens, Tokenizer};
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, questions @ ..] = args.as_slice() else {
        return Err("usage: sessions FILE.mrt QUESTION...".into());
    };
    let mut pool = Pool::new(1)?;
    let model = Model::open(file, &OpenOptions::default(), &mut pool)?;
    let tokenizer = Tokenizer::from_model(&model)?;
    let template = ChatTemplate::from_model(&model)?.ok_or("the model has no chat template")?;
    let prompts: Vec<Vec<u32>> = questions
        .iter()
        .map(|question| {
            let messages = [
                json!({ "role": "system", "content": "Answer in one short sentence." }),
                json!({ "role": "user", "content": question }),
            ];
            Ok(tokenizer.encode(&template.render(&messages, None, true)?, SpecialTokens::Parse)?)
        })
        .collect::<Result<_>>()?;
    let Some(first) = prompts.first() else { return Ok(()) };
    let common = (0..first.len()).take_while(|&i| prompts.iter().all(|p| p.get(i) == first.get(i))).count();

    let limits = Limits { context: 512, batch: 256, threads: 1 };
    let arenas = || create_qwen2_arenas(model.config(), &limits);
    let mut base_arenas = arenas()?;
    let mut base = session(&model, &limits, &mut base_arenas.kv_cache, &mut base_arenas.scratch)?;
    session_prefill(&mut base, &first[..common], &mut pool)?;
    let base = &base;

    let answer = |prompt: &[u32]| -> Result<String> {
        let (mut pool, mut arenas) = (Pool::new(1)?, arenas()?);
        let cfg = model.config();
        let kv = qwen2_init_kv_cache(cfg, limits.context, &mut arenas.kv_cache.bump())?;
        let scratch = qwen2_init_scratch(cfg, &limits, Isa::detect(), &mut arenas.scratch.bump())?;
        let mut session = base.fork(kv, scratch)?;
        let mut sampler = Sampler::new(SamplingOptions::GREEDY, cfg.vocab_size as usize, Isa::detect())?;
        let stop_tokens = model.generation()?.stop_tokens;
        let options = GenerateOptions { max_new_tokens: 100, stop_tokens: &stop_tokens };
        let mut tokens = Vec::new();
        session_generate(&mut session, prompt, &mut sampler, &options, &mut pool, |token| {
            tokens.push(token);
            ControlFlow::Continue(())
        })?;
        Ok(tokenizer.decode(&tokens, true))
    };
    let answer = &answer;
    let answers: Vec<Result<String>> = thread::scope(|scope| {
        let threads: Vec<_> = prompts.iter().map(|prompt| scope.spawn(move || answer(prompt))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err("a panic".into()))).collect()
    });
    for (question, answer) in questions.iter().zip(answers) {
        println!("{question}\n  {}", answer?);
    }
    eprintln!("({common} tokens of each prompt were computed once)");
    Ok(())
}

fn session<'a>(
    model: &'a Model,
    limits: &Limits,
    kv: &'a mut Arena,
    scratch: &'a mut Arena,
) -> Result<Session<'a>> {
    let cfg = *model.config();
    let kv = qwen2_init_kv_cache(&cfg, limits.context, &mut kv.bump())?;
    let scratch = qwen2_init_scratch(&cfg, limits, Isa::detect(), &mut scratch.bump())?;
    Ok(Session::new(cfg, model.weights(), kv, scratch))
}
