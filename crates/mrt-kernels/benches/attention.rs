//! Throughput of `attention` on one thread, for one KV group of Qwen2.5-0.5B (7 query heads of width 64): bytes of keys
//! and values and, as "items", floating-point operations a second.
//!
//! One token is decoding, 6 are a tile of prefill. Keys and values come from memory, as they do when a model runs: passes go
//! round a buffer that is larger than caches are.

use std::fmt;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use half::f16;
use mrt_kernels::{Isa, KvGroup, Rhs, Window, attention, attention_scratch_len, panel_count, panel_len};

const KV_ELEMENTS: usize = 64 << 20;

const HEADS: usize = 7;
const HEAD_DIM: usize = 64;

/// The instruction set, the tokens, and the positions that the first of them sees.
struct Case {
    isa: Isa,
    tokens: usize,
    seen: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} at {}", self.isa.name(), self.tokens, self.seen)
    }
}

/// Every vector instruction set with every shape.
fn cases() -> impl Iterator<Item = Case> {
    let isas = Isa::supported().filter(|&isa| isa != Isa::PORTABLE || isa == Isa::detect());
    let shapes = [(1, 512), (1, 4096), (1, 16384), (6, 512), (6, 4096)];
    isas.flat_map(move |isa| shapes.map(|(tokens, seen)| Case { isa, tokens, seen }))
}

#[divan::bench(args = cases(), max_time = 1)]
fn kv_group(bencher: Bencher<'_, '_>, case: &Case) {
    let &Case { isa, tokens, seen } = case;
    let (rows, positions) = (tokens * HEADS, seen + tokens - 1);
    let keys_len = panel_count(positions) * panel_len(HEAD_DIM);
    let values_len = panel_count(HEAD_DIM) * panel_len(positions);
    let kv = vec![f16::from_f32(0.01); KV_ELEMENTS];
    let queries = vec![0.5; rows * HEAD_DIM];
    let mut out = vec![0.0; rows * HEAD_DIM];
    let mut scratch = vec![0.0; attention_scratch_len(rows, HEAD_DIM, positions)];
    let mut start = 0;
    let pairs = HEADS * (0..tokens).map(|token| seen + token).sum::<usize>();
    bencher
        .counter(BytesCount::new(2 * positions * HEAD_DIM * size_of::<f16>()))
        .counter(ItemsCount::new(4 * HEAD_DIM * pairs))
        .bench_local(|| {
            let (keys, values) = kv[start..][..keys_len + values_len].split_at(keys_len);
            let len = keys_len + values_len;
            start = if start + 2 * len <= kv.len() { start + len } else { 0 };
            let group = KvGroup {
                queries: &queries,
                heads: HEADS,
                head_dim: HEAD_DIM,
                seen,
                keys: Rhs { panels: keys, stride: panel_len(HEAD_DIM) },
                values: Rhs { panels: values, stride: panel_len(positions) },
            };
            let mut window = Window::new(&mut out, tokens, HEADS * HEAD_DIM, HEADS * HEAD_DIM);
            attention(isa, group, &mut window, &mut scratch);
        });
}

fn main() {
    divan::main();
}
