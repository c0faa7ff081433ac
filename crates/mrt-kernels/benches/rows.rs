//! Throughput of the operations on rows, on one thread and with rows of Qwen2.5-0.5B: bytes read and written a second.
//! The rows stay in the caches, as they do when a model runs.

use divan::Bencher;
use divan::counter::BytesCount;
use half::f16;
use mrt_kernels::{Isa, rms_norm, rope, scale, softmax};

const HIDDEN: usize = 896;
const HEAD_DIM: usize = 64;
const VOCAB: usize = 151_936;

/// Every vector instruction set, by name.
fn isas() -> impl Iterator<Item = &'static str> {
    let isas = Isa::supported().filter(|&isa| isa != Isa::PORTABLE || isa == Isa::detect());
    isas.map(Isa::name)
}

/// `call` on an instruction set, which moves that many bytes.
fn bench(bencher: Bencher<'_, '_>, isa: &str, bytes: usize, mut call: impl FnMut(Isa)) {
    let isa = Isa::by_name(isa).expect("a name of a supported instruction set");
    bencher.counter(BytesCount::new(bytes)).bench_local(|| call(isa));
}

#[divan::bench(args = isas(), max_time = 0.5)]
fn rms_norm_hidden(bencher: Bencher<'_, '_>, isa: &str) {
    let (x, weight, mut out) = (vec![0.5; HIDDEN], vec![f16::ONE; HIDDEN], vec![0.0; HIDDEN]);
    bench(bencher, isa, 10 * HIDDEN, |isa| rms_norm(isa, &x, &weight, 1e-6, &mut out));
}

#[divan::bench(args = isas(), max_time = 0.5)]
fn rope_head(bencher: Bencher<'_, '_>, isa: &str) {
    let (x, cos, sin) = (vec![0.5; HEAD_DIM], vec![0.8; HEAD_DIM / 2], vec![0.6; HEAD_DIM / 2]);
    let mut out = vec![0.0; HEAD_DIM];
    bench(bencher, isa, 12 * HEAD_DIM, |isa| rope(isa, &x, &cos, &sin, 0.125, &mut out));
}

/// As sampling does it: the logits divided by the temperature, and their softmax.
#[divan::bench(args = isas(), max_time = 0.5)]
fn scale_and_softmax_vocabulary(bencher: Bencher<'_, '_>, isa: &str) {
    let logits: Vec<f32> = (0..VOCAB).map(|i| (i % 31) as f32 - 15.0).collect();
    let mut weights = vec![0.0; VOCAB];
    bench(bencher, isa, 20 * VOCAB, |isa| {
        scale(isa, &logits, 1.4, &mut weights);
        divan::black_box(softmax(isa, &mut weights));
    });
}

fn main() {
    divan::main();
}
