//! A real model, SmolLM2-135M-Instruct, against transformers, which computed in float32 with the same FP16 weights and
//! a float32 KV cache (`scripts/make_smollm2_goldens.py`). `tests/run.sh` fetches the model.

#![forbid(unsafe_code)]

use mruntime_tests::smollm2_golden::{Golden, Prompt, Text};
use mruntime_tests::{
    Run, compare_greedy, kl_divergence, log_probabilities, max_abs_difference, smollm2, with_model,
};
use mruntime_text::{ChatTemplate, SpecialTokenNames, SpecialTokens, Tokenizer};

#[test]
fn logits_equal_those_of_transformers() {
    let (model, golden) = (smollm2(), Golden::read());
    let vocab = model.config().vocab_size as usize;
    let mut kl_sum = 0.0;
    for prompt in &golden.prompts {
        let theirs = &prompt.logits;
        let mut ours = vec![0.0; vocab];
        with_model(model.config(), model.arena(), prompt.ids.len(), Run::usual(), |mut ready| {
            ready.forward(&prompt.ids, &mut ours);
        });
        // Our KV cache is FP16. Rounding alone, 0.0008 to 0.014, takes transformers as far; other sums in float32 add
        // 0.0001, and keys and values that they make round the other way something like the rounding itself.
        let (difference, rounding) = (max_abs_difference(&ours, theirs), prompt.fp16_kv_max_dlogit);
        assert!(difference <= 2.0 * rounding, "{}: {difference}, rounding {rounding}", prompt.name);
        kl_sum += kl_divergence(theirs, &ours);
    }
    // An FP16 KV cache costs 1.4e-6, computing in FP16 would cost 2.1e-5.
    let kl_mean = kl_sum / golden.prompts.len() as f64;
    assert!(kl_mean < 1e-5, "{kl_mean}");
}

#[test]
fn greedy_tokens_equal_those_of_transformers() {
    let model = smollm2();
    let (mut equal, mut steps) = (0, 0);
    for prompt in Golden::read().prompts {
        let Prompt { name, ids, greedy, greedy_margin, .. } = &prompt;
        let context = ids.len() + greedy.len();
        let ours = with_model(model.config(), model.arena(), context, Run::usual(), |mut ready| {
            ready.generate(ids, greedy.len())
        });
        // Two logits, each off by what rounding the cache costs at most.
        equal += compare_greedy(name, &ours, greedy, greedy_margin, 0.03);
        steps += greedy.len();
    }
    // Few continuations may be cut short by a tie, or nothing much has been compared.
    assert!(equal * 10 > steps * 9, "{equal} of {steps} steps compared");
}

#[test]
fn the_likelihood_of_a_long_text_is_that_of_transformers() {
    const CALL: usize = 128;
    let model = smollm2();
    let Text { ids: tokens, nll: theirs } = Golden::read().text;
    let vocab = model.config().vocab_size as usize;
    let mut ours = Vec::new();
    with_model(model.config(), model.arena(), tokens.len(), Run::usual(), |mut ready| {
        let mut logits = vec![0.0; CALL * vocab];
        let mut targets = tokens[1..].iter();
        for chunk in tokens.chunks(CALL) {
            ready.forward(chunk, &mut logits[..chunk.len() * vocab]);
            let rows = logits.chunks_exact(vocab).take(chunk.len());
            ours.extend(rows.zip(&mut targets).map(|(row, &next)| -log_probabilities(row)[next as usize]));
        }
    });
    assert_eq!(ours.len(), 4095);
    let differences: Vec<f64> = ours.iter().zip(&theirs).map(|(a, &b)| a - f64::from(b)).collect();
    assert_eq!(differences.len(), ours.len());
    // An FP16 KV cache moves the mean by 3e-5 nats; 1e-4 is 0.01 % of the perplexity.
    let mean = differences.iter().sum::<f64>() / differences.len() as f64;
    assert!(mean.abs() < 1e-4, "{mean}");
    let worst = differences.iter().fold(0.0f64, |worst, d| worst.max(d.abs()));
    assert!(worst < 0.05, "{worst}");
}

#[test]
fn it_answers_in_a_chat() {
    let model = smollm2();
    let section = |name: &str| model.section(name).unwrap().expect(name);
    let tokenizer = Tokenizer::from_model(model).unwrap();
    assert!(tokenizer.is_prepacked());
    let names = SpecialTokenNames::from_section(&section("token_names")).unwrap();
    let template = section("chat_template");
    let template = ChatTemplate::new(std::str::from_utf8(&template).unwrap(), &names).unwrap();
    let question = serde_json::json!({"role": "user", "content": "What is the capital of France?"});
    let prompt = template.render(&[question], None, true).unwrap();
    let prompt = tokenizer.encode(&prompt, SpecialTokens::Parse).unwrap();

    let stop_tokens = model.generation().unwrap().stop_tokens;
    let answer = with_model(model.config(), model.arena(), 100, Run::usual(), |mut ready| {
        let answer = ready.generate(&prompt, 20);
        let end = answer.iter().position(|token| stop_tokens.contains(token));
        tokenizer.decode(&answer[..end.expect("it comes to an end")], false)
    });
    assert_eq!(answer, "The capital of France is Paris.");
}
