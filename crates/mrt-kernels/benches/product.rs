//! Throughput of `panel_product` and `fast_product` on one thread, on the products of Qwen2.5-0.5B: bytes of weights and,
//! as "items", floating-point operations a second.
//!
//! One row is decoding, 512 are prefill. Weights come from memory, as they do when a model runs: passes go round a
//! buffer that is larger than caches are.

use std::fmt;
use std::sync::LazyLock;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use half::f16;
use memmap2::MmapMut;
use mrt_kernels::{
    Epilogue, FastLane, FastLhs, Isa, Lhs, Rhs, Window, fast_len, fast_product, pack_fast_rows, panel_count,
    panel_len, panel_product, product_scratch_len,
};

const WEIGHT_BYTES: usize = 512 << 20;

const HIDDEN: usize = 896;
const QKV_COLUMNS: usize = 1152;
const INTERMEDIATE: usize = 4864;
const VOCAB: usize = 151_936;

static WEIGHTS: LazyLock<MmapMut> = LazyLock::new(|| {
    let mut weights = arena(WEIGHT_BYTES / size_of::<f32>());
    bytemuck::cast_slice_mut::<u8, f16>(&mut weights).fill(f16::from_f32(0.01));
    weights
});

/// Zeros for `len` f32, aligned and in huge pages where the system gives them, as the arenas of the runtime are.
fn arena(len: usize) -> MmapMut {
    let map = MmapMut::map_anon(len * size_of::<f32>()).expect("memory");
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    map
}

/// The instruction set, the fast lane if it is to multiply, and the number of rows.
struct Case {
    isa: Isa,
    lane: Option<FastLane>,
    rows: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lane = self.lane.map_or("exact", FastLane::name);
        write!(f, "{} {lane} {}", self.isa.name(), self.rows)
    }
}

/// Every vector instruction set and fast lane with every number of rows that it takes.
fn cases() -> impl Iterator<Item = Case> {
    let isas = Isa::supported().filter(|&isa| isa != Isa::PORTABLE || isa == Isa::detect());
    let lanes = isas.flat_map(|isa| {
        std::iter::once((isa, None)).chain(FastLane::supported(isa).map(move |lane| (isa, Some(lane))))
    });
    let cases =
        lanes.flat_map(|(isa, lane)| [1, 2, 4, 8, 32, 64, 128, 512].map(|rows| Case { isa, lane, rows }));
    cases.filter(|case| case.lane.is_none_or(|lane| lane.takes(case.rows)))
}

#[divan::bench(args = cases(), max_time = 1)]
fn qkv(bencher: Bencher<'_, '_>, case: &Case) {
    product(bencher, case, HIDDEN, QKV_COLUMNS, Epilogue::Store);
}

#[divan::bench(args = cases(), max_time = 1)]
fn attn_out(bencher: Bencher<'_, '_>, case: &Case) {
    product(bencher, case, HIDDEN, HIDDEN, Epilogue::Add);
}

#[divan::bench(args = cases(), max_time = 1)]
fn gate_up(bencher: Bencher<'_, '_>, case: &Case) {
    product(bencher, case, HIDDEN, INTERMEDIATE, Epilogue::SwiGlu);
}

#[divan::bench(args = cases(), max_time = 1)]
fn down(bencher: Bencher<'_, '_>, case: &Case) {
    product(bencher, case, INTERMEDIATE, HIDDEN, Epilogue::Add);
}

#[divan::bench(args = cases(), max_time = 1)]
fn lm_head(bencher: Bencher<'_, '_>, case: &Case) {
    product(bencher, case, HIDDEN, VOCAB, Epilogue::Store);
}

/// The product of `case.rows` rows of `k` activations with panels that give `n` columns.
fn product(bencher: Bencher<'_, '_>, case: &Case, k: usize, n: usize, epilogue: Epilogue) {
    let &Case { isa, lane, rows } = case;
    let matrices = if epilogue == Epilogue::SwiGlu { 2 } else { 1 };
    let len = matrices * panel_count(n) * panel_len(k);
    let weights: &[f16] = bytemuck::cast_slice(&WEIGHTS);
    let (mut x, mut y, mut scratch) = (arena(rows * k), arena(rows * n), arena(product_scratch_len(rows)));
    let [x, y, scratch] = [&mut x, &mut y, &mut scratch].map(|arena| bytemuck::cast_slice_mut(arena));
    x.fill(0.5);
    let (mut packed, mut scales) = (arena(fast_len(rows, k).div_ceil(2)), vec![0.0; rows]);
    let packed = &mut bytemuck::cast_slice_mut::<u8, u16>(&mut packed)[..fast_len(rows, k)];
    let mut start = 0;
    bencher
        .counter(BytesCount::new(len * size_of::<f16>()))
        .counter(ItemsCount::new(2 * rows * k * n * matrices))
        .bench_local(|| {
            let panels = &weights[start..][..len];
            start = if start + 2 * len <= weights.len() { start + len } else { 0 };
            let lhs = Lhs { x, rows, stride: k, k };
            let (rhs, mut out) = (Rhs::weights(panels, k), Window::new(y, rows, n, n));
            if let Some(lane) = lane {
                pack_fast_rows(lane, lhs, 0..rows, packed, &mut scales);
                let lhs = FastLhs { x: packed, scales: &scales, k };
                fast_product(lane, lhs, rhs, epilogue, &mut out, scratch);
            } else {
                panel_product(isa, lhs, rhs, epilogue, &mut out, scratch);
            }
        });
}

fn main() {
    divan::main();
}
