//! Nothing is allocated after start. The one test of its program: the counts are those of the whole process.

#![forbid(unsafe_code)]

use std::alloc::System;
use std::ops::ControlFlow;
use std::sync::Barrier;
use std::time::Duration;

use mruntime::{GenerateOptions, Sampler, SamplingOptions, qwen2_generate};
use mruntime_tests::{Ready, Run, TinyModel, with_model};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Heap allocations, of any thread, while `f` runs.
fn allocations(f: impl FnOnce()) -> usize {
    let region = Region::new(ALLOCATOR);
    f();
    let change = region.change();
    change.allocations + change.reallocations
}

#[test]
fn forward_and_generate_allocate_nothing() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1, "the counter counts");

    let tiny = TinyModel::named("gqa7_hd64");
    let (cfg, weights) = tiny.load();
    let prompt = &tiny.prompts[3].ids;
    let every_option = SamplingOptions {
        temperature: 0.8,
        top_k: 40,
        top_p: 0.9,
        min_p: 0.02,
        repetition_penalty: 1.1,
        seed: 1,
    };
    let run = Run { threads: 4, batch: 32, ..Run::usual() };
    with_model(&cfg, weights.bytes(), 400, run, |mut model| {
        let mut logits = vec![0.0; prompt.len() * tiny.vocab];
        let mut samplers = [SamplingOptions::GREEDY, every_option]
            .map(|options| Sampler::new(options, tiny.vocab, run.isa).unwrap());
        // A thread's own start allocates: wait until all have started.
        let started = Barrier::new(run.threads);
        model.pool.run(run.threads, |_, _| _ = started.wait());

        let prefill = allocations(|| model.forward(prompt, &mut logits));
        assert_eq!(prefill, 0, "prefill");
        // Long enough for the pool's threads to go to sleep.
        std::thread::sleep(Duration::from_millis(20));
        let decode = allocations(|| model.forward(&prompt[..1], &mut logits[..tiny.vocab]));
        assert_eq!(decode, 0, "decode, threads woken up");
        for sampler in &mut samplers {
            let Ready { cfg, weights, kv, scratch, pool } = &mut model;
            let options = GenerateOptions { max_new_tokens: 50, stop_tokens: &[] };
            let mut new_tokens = 0;
            let generate = allocations(|| {
                let on_token = |_| ControlFlow::Continue(());
                let result =
                    qwen2_generate(cfg, weights, kv, scratch, prompt, sampler, &options, pool, on_token);
                new_tokens = result.unwrap().new_tokens;
            });
            assert_eq!((generate, new_tokens), (0, 50));
        }
    });
}
