//! Time of one choice among the 151,936 logits of Qwen2.5, with usual options.

use divan::Bencher;
use mruntime::{Isa, Sampler, SamplingOptions, sample};

const VOCAB: usize = 151_936;

fn bench(bencher: Bencher<'_, '_>, options: SamplingOptions) {
    let mut sampler = Sampler::new(options, VOCAB, Isa::detect()).expect("valid options");
    // Shaped like a model's: most far below the few that count.
    let mut state = 1u32;
    let mut logits: Vec<f32> = (0..VOCAB)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = (state >> 8) as f32 / (1 << 24) as f32;
            18.0 * x.powi(6) - 6.0
        })
        .collect();
    bencher.bench_local(|| sample(&mut sampler, &mut logits));
}

#[divan::bench]
fn greedy(bencher: Bencher<'_, '_>) {
    bench(bencher, SamplingOptions::GREEDY);
}

#[divan::bench]
fn temperature(bencher: Bencher<'_, '_>) {
    bench(bencher, SamplingOptions { temperature: 0.7, ..SamplingOptions::GREEDY });
}

#[divan::bench]
fn top_k_20_top_p_80(bencher: Bencher<'_, '_>) {
    bench(bencher, SamplingOptions { temperature: 0.7, top_k: 20, top_p: 0.8, ..SamplingOptions::GREEDY });
}

#[divan::bench]
fn top_p_95(bencher: Bencher<'_, '_>) {
    bench(bencher, SamplingOptions { temperature: 0.7, top_p: 0.95, ..SamplingOptions::GREEDY });
}

/// With a high temperature a nucleus has most of the vocabulary.
#[divan::bench]
fn temperature_4_top_p_95(bencher: Bencher<'_, '_>) {
    bench(bencher, SamplingOptions { temperature: 4.0, top_p: 0.95, ..SamplingOptions::GREEDY });
}

fn main() {
    divan::main();
}
