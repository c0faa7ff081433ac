//! The fast lane: products on units that multiply 16-bit numbers, at the price of the numerics contract: with weights, and on
//! `fast-bf16` and `fast-amx` with the KV cache. Opt-in, never the default.
//!
//! The activations are rounded to 16 bits, once for all panels, and sums need not be one chain of fused multiply-adds.
//! For one lane and the same batches the result still depends on nothing else, not on the number of threads either; other
//! batches may give other bits. On x86-64 numbers of rows at which a lane gains nothing are left to the exact products, and
//! `fast-fhm` computes a lone row otherwise than several. Of the rest a row does not depend on those beside it.

#![cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(unused_variables, reason = "there is no lane")
)]

use std::ops::Range;

use crate::attention::{self, KvGroup};
use crate::isa::{Isa, Kind};
use crate::product::{Epilogue, Lhs, Rhs, check_product};
use crate::window::{Window, span};

/// What a product may trade for speed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Numerics {
    /// Nothing: the same bits on every instruction set, for every number of threads and every batch.
    #[default]
    Exact,
    /// Accuracy, on this lane.
    Fast(FastLane),
}

impl Numerics {
    /// The fast lane that goes with `isa`, if this machine has one.
    pub fn fast(isa: Isa) -> Option<Numerics> {
        FastLane::detect(isa).map(Numerics::Fast)
    }

    /// `exact`, or `fast-` and the lane: what results are labelled with.
    pub fn name(self) -> &'static str {
        match self {
            Numerics::Exact => "exact",
            Numerics::Fast(lane) => lane.name(),
        }
    }

    /// A number for files that hold what was computed so: 0 exact, 1 `fast-bf16`, 2 `fast-fp16`, 3 `fast-fhm`,
    /// 4 `fast-kleidiai`, 5 `fast-amx`. Numbers are never used again.
    pub fn id(self) -> u32 {
        match self {
            Numerics::Exact => 0,
            Numerics::Fast(lane) => match lane.0 {
                #[cfg(target_arch = "x86_64")]
                Lane::Bf16 => 1,
                #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
                Lane::Fp16 => 2,
                #[cfg(target_arch = "aarch64")]
                Lane::Fhm => 3,
                #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
                Lane::Kleidiai => 4,
                #[cfg(target_arch = "x86_64")]
                Lane::Amx => 5,
            },
        }
    }
}

/// A fast lane that this machine has; like [`Isa`], a value is proof of detection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FastLane(pub(crate) Lane);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// `bf16.rs`
    #[cfg(target_arch = "x86_64")]
    Bf16,
    /// `amx.rs`, `amx_product.rs`
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// `fp16.rs`
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    Fp16,
    /// `fp16_neon.rs` with FEAT_FHM
    #[cfg(target_arch = "aarch64")]
    Fhm,
    /// `kleidiai.rs`
    #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
    Kleidiai,
}

impl Lane {
    fn is_detected(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Lane::Bf16 => crate::bf16::is_detected(),
            #[cfg(target_arch = "x86_64")]
            Lane::Amx => crate::amx::is_detected(),
            #[cfg(target_arch = "x86_64")]
            Lane::Fp16 => crate::fp16_avx512::is_detected(),
            #[cfg(target_arch = "aarch64")]
            Lane::Fp16 | Lane::Fhm => crate::fp16_neon::is_detected(),
            #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
            Lane::Kleidiai => crate::kleidiai::is_detected(),
        }
    }
}

impl FastLane {
    /// The fastest lane of this machine that goes with `isa`.
    pub fn detect(isa: Isa) -> Option<FastLane> {
        FastLane::supported(isa).last()
    }

    /// Every lane of this machine that goes with `isa`, slowest first. On Intel's processors `fast-bf16` is none: there `vdpbf16ps` is
    /// half as fast as f32 multiply-adds, 85 of 174 GFLOP/s on Emerald Rapids, FP16's are twice as fast, and AMX 13 times.
    pub fn supported(isa: Isa) -> impl Iterator<Item = FastLane> {
        let lanes: &[Lane] = match isa.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => &[Lane::Bf16],
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Intel => &[Lane::Fp16, Lane::Amx],
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => &[
                Lane::Fp16,
                #[cfg(feature = "kleidiai")]
                Lane::Kleidiai,
            ],
            #[cfg(target_arch = "aarch64")]
            Kind::NeonFhm => &[
                Lane::Fhm,
                #[cfg(feature = "kleidiai")]
                Lane::Kleidiai,
            ],
            _ => &[],
        };
        lanes.iter().copied().filter(|lane| lane.is_detected()).map(FastLane)
    }

    /// `fast-bf16`, `fast-fp16`, `fast-amx`, `fast-fhm` or `fast-kleidiai`
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Lane::Bf16 => "fast-bf16",
            #[cfg(target_arch = "x86_64")]
            Lane::Amx => "fast-amx",
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            Lane::Fp16 => "fast-fp16",
            #[cfg(target_arch = "aarch64")]
            Lane::Fhm => "fast-fhm",
            #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
            Lane::Kleidiai => "fast-kleidiai",
        }
    }

    /// Whether a product of that many rows is faster here than exactly.
    pub fn takes(self, rows: usize) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Lane::Bf16 => rows >= crate::bf16::LEAST_ROWS,
            #[cfg(target_arch = "x86_64")]
            Lane::Amx => rows >= crate::amx::LEAST_ROWS,
            #[cfg(target_arch = "x86_64")]
            Lane::Fp16 => rows >= crate::fp16_avx512::LEAST_ROWS,
            #[cfg(target_arch = "aarch64")]
            Lane::Fp16 | Lane::Fhm => rows > 0,
            #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
            Lane::Kleidiai => rows > 0,
        }
    }

    /// Panels that a thread's part of a product has at least, where there are as many for each thread.
    pub fn least_panels(self) -> usize {
        match self.0 {
            // As many as it works on at a time.
            #[cfg(target_arch = "x86_64")]
            Lane::Amx => crate::product::SUMS - 1,
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            _ => 1,
        }
    }

    /// Whether the lane has attention of its own.
    pub fn attends(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Lane::Bf16 | Lane::Amx => true,
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            _ => false,
        }
    }

    /// The most rows of attention that are worth passing over keys and values together; 0 if no more than of exact ones.
    pub fn attention_rows(self) -> usize {
        match self.0 {
            // Seven tiles, or 16 tokens of seven heads. Keys and values are made pairs once for all.
            #[cfg(target_arch = "x86_64")]
            Lane::Amx => 112,
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            _ => 0,
        }
    }
}

/// The left-hand side of a fast product: all rows of an [`Lhs`], packed by [`pack_fast_rows`], as many as `scales`.
#[derive(Clone, Copy)]
pub struct FastLhs<'a> {
    /// [`fast_len`] numbers in the lane's 16-bit format.
    pub x: &'a [u16],
    /// What the numbers of each row are to be multiplied by: powers of two.
    pub scales: &'a [f32],
    /// Elements of a row that take part.
    pub k: usize,
}

/// Rows that a lane may pack together.
pub const FAST_ROWS: usize = 16;

/// Inputs of a row that share a scale, in FP16.
pub(crate) const FAST_BLOCK: usize = 64;

/// Inputs that a tile of AMX takes at once.
pub(crate) const FAST_STEP: usize = 32;

/// Packed elements of a row: `k` numbers and a scale for each block of inputs, both made even, as some units multiply in pairs, or
/// whole steps where that is more. `usize::MAX` if there are more.
pub(crate) const fn fast_stride(k: usize) -> usize {
    let scales = k.div_ceil(FAST_BLOCK);
    let scaled = k.div_ceil(2).saturating_add(scales.div_ceil(2)).saturating_mul(2);
    let steps = k.div_ceil(FAST_STEP).saturating_mul(FAST_STEP);
    if scaled > steps { scaled } else { steps }
}

/// Elements of `rows` packed rows of `k` inputs; `usize::MAX` if there are more.
pub const fn fast_len(rows: usize, k: usize) -> usize {
    match rows.checked_next_multiple_of(FAST_ROWS) {
        Some(rows) => rows.saturating_mul(fast_stride(k)),
        None => usize::MAX,
    }
}

/// Rounds those rows of `lhs` to the lane's 16-bit format. The first is a multiple of [`FAST_ROWS`], and so is the end or it
/// is that of `lhs`.
///
/// # Panics
/// If `rows` are not such rows, `lhs.k` is 0, `out` does not have [`fast_len`] elements for them and `scales` one for each, or `lhs` is
/// shorter than its sizes say.
pub fn pack_fast_rows(lane: FastLane, lhs: Lhs<'_>, rows: Range<usize>, out: &mut [u16], scales: &mut [f32]) {
    assert!(rows.start.is_multiple_of(FAST_ROWS) && rows.end <= lhs.rows, "rows {rows:?} of {}", lhs.rows);
    assert!(rows.end.is_multiple_of(FAST_ROWS) || rows.end == lhs.rows, "rows {rows:?} of {}", lhs.rows);
    assert_eq!(out.len(), fast_len(rows.len(), lhs.k));
    assert_eq!(scales.len(), rows.len());
    assert!(span(lhs.rows, lhs.stride, lhs.k) <= lhs.x.len(), "left-hand side shorter than its sizes");
    if rows.is_empty() {
        return;
    }
    match lane.0 {
        #[cfg(target_arch = "x86_64")]
        Lane::Bf16 => {
            let out = out.chunks_exact_mut(fast_stride(lhs.k));
            for ((r, out), scale) in rows.zip(out).zip(scales) {
                let x = &lhs.x[r * lhs.stride..][..lhs.k];
                // SAFETY: a `FastLane` proves that its features were detected.
                *scale = unsafe { crate::bf16::pack_row(x, out) };
            }
        }
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Lane::Amx => unsafe { crate::amx::pack_rows(lhs, rows, out, scales) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Lane::Fp16 => unsafe { crate::fp16_avx512::pack_rows(lhs, rows, out, scales) },
        // SAFETY: a `FastLane` proves that its features were detected.
        #[cfg(target_arch = "aarch64")]
        Lane::Fp16 => unsafe { crate::fp16_neon::pack_rows::<false>(lhs, rows, out, scales) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Lane::Fhm => unsafe { crate::fp16_neon::pack_rows::<true>(lhs, rows, out, scales) },
        #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
        Lane::Kleidiai => {
            let out = out.chunks_exact_mut(fast_stride(lhs.k));
            for ((r, out), scale) in rows.zip(out).zip(scales) {
                *scale = crate::kleidiai::pack_row(&lhs.x[r * lhs.stride..][..lhs.k], out);
            }
        }
    }
}

/// [`panel_product`](crate::panel_product) on a fast lane.
///
/// # Panics
/// If `y` and `lhs` differ in rows, a slice is shorter than its sizes say, or `scratch` has fewer than
/// [`product_scratch_len`](crate::product_scratch_len)`(rows)` elements.
pub fn fast_product(
    lane: FastLane,
    lhs: FastLhs<'_>,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &mut Window<'_>,
    scratch: &mut [f32],
) {
    let rows = lhs.scales.len();
    if !check_product(rows, lhs.k, rhs, epilogue, y, scratch) {
        return;
    }
    assert!(fast_len(rows, lhs.k) <= lhs.x.len(), "left-hand side shorter than its sizes");
    match lane.0 {
        // SAFETY: a `FastLane` proves that its features were detected; the assertions above are the contract.
        #[cfg(target_arch = "x86_64")]
        Lane::Bf16 => unsafe { crate::bf16::product(lhs, rhs, epilogue, y, scratch) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Lane::Amx => unsafe { crate::amx_product::product(lhs, rhs, epilogue, y, scratch) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Lane::Fp16 => unsafe { crate::fp16_avx512::product(lhs, rhs, epilogue, y, scratch) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Lane::Fp16 => unsafe { crate::fp16_neon::fp16_product(lhs, rhs, epilogue, y, scratch) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Lane::Fhm => unsafe { crate::fp16_neon::fhm_product(lhs, rhs, epilogue, y, scratch) },
        // SAFETY: as above.
        #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
        Lane::Kleidiai => unsafe { crate::kleidiai::product(lhs, rhs, epilogue, y, scratch) },
    }
}

/// [`attention`](crate::attention) on a fast lane. The bits of a token do not depend on those beside it.
///
/// # Panics
/// As there, and when the lane has none of its own.
pub fn fast_attention(lane: FastLane, group: KvGroup<'_>, out: &mut Window<'_>, scratch: &mut [f32]) {
    if attention::check(group, out, scratch) {
        match lane.0 {
            // SAFETY: a `FastLane` proves that its features were detected; `check` is the rest of the contract.
            #[cfg(target_arch = "x86_64")]
            Lane::Bf16 => unsafe { crate::bf16::attention(group, out, scratch) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Lane::Amx => unsafe { crate::amx::attention(group, out, scratch) },
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            _ => unreachable!("no attention on {}", lane.name()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{PANEL, f16, panel_count, panel_len, product_scratch_len};

    pub(crate) fn noise(seed: u32, n: usize, scale: f32) -> Vec<f32> {
        let mut s = seed;
        let mut next = || {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next() * scale).collect()
    }

    pub(crate) fn lanes() -> impl Iterator<Item = FastLane> {
        Isa::variants().flat_map(FastLane::supported)
    }

    /// A lane's own product of the first `rows` rows of `x`.
    pub(crate) fn run(
        lane: FastLane,
        x: &[f32],
        rows: usize,
        k: usize,
        panels: &[f16],
        n: usize,
    ) -> Vec<f32> {
        let mut packed = vec![u16::MAX; fast_len(rows, k)];
        let mut scales = vec![f32::NAN; rows];
        pack_fast_rows(lane, Lhs { x, rows, stride: k, k }, 0..rows, &mut packed, &mut scales);
        let (mut y, mut scratch) = (vec![f32::NAN; rows * n], vec![f32::NAN; product_scratch_len(rows)]);
        let lhs = FastLhs { x: &packed, scales: &scales, k };
        let mut window = Window::new(&mut y, rows, n, n);
        fast_product(lane, lhs, Rhs::weights(panels, k), Epilogue::Store, &mut window, &mut scratch);
        y
    }

    /// Whether this lane adds products of that many rows in FP16.
    fn adds_in_fp16(lane: FastLane, rows: usize) -> bool {
        lane.name() == "fast-fp16" || lane.name() == "fast-fhm" && rows > 1
    }

    /// Against f64, for inputs as large as Qwen2's activations are. `unit`: what the 16-bit format does to each term. BF16
    /// rounds inputs to 2^-8 at most, which the exact result bears, FP16 to 2^-11. Each of k sums in f32 rounds to 2^-24;
    /// each of 33 in FP16, an input and a weight at a time, to 2^-11, and to 2^-25 of what 1 stands for: at most a 16th of the
    /// largest activation.
    #[test]
    fn errors_are_those_of_the_formats() {
        const SIZES: [(usize, usize, usize); 9] = [
            (1, 1, 32),
            (1, 900, 64),
            (2, 63, 32),
            (5, 200, 32),
            (7, 129, 64),
            (8, 15, 33),
            (13, 64, 64),
            (25, 897, 40),
            (12, 4864, 32),
        ];
        for lane in lanes() {
            for (rows, k, n) in SIZES {
                let mut x = noise(7, rows * k, 3.0);
                x.iter_mut().step_by(97).for_each(|x| *x *= 9000.0);
                let mut panels = vec![f16::ZERO; panel_count(n) * panel_len(k)];
                panels
                    .iter_mut()
                    .zip(noise(9, panel_count(n) * panel_len(k), 0.1))
                    .for_each(|(w, x)| *w = f16::from_f32(x));
                let got = run(lane, &x, rows, k, &panels, n);
                let unit = match lane.name() {
                    "fast-bf16" | "fast-amx" | "fast-kleidiai" => 2f64.powi(-7),
                    _ if adds_in_fp16(lane, rows) => 34.0 * 2f64.powi(-11),
                    _ => 2f64.powi(-11),
                };
                for (r, x) in x.chunks(k).enumerate() {
                    let largest = x.iter().fold(0f32, |max, x| max.max(x.abs()));
                    let least = if adds_in_fp16(lane, rows) { 2f64.powi(-24) / 16.0 } else { 0.0 };
                    let least = k as f64 * f64::from(largest) * least;
                    for j in 0..n {
                        let panel = &panels[j / PANEL * panel_len(k)..];
                        let terms = (0..k).map(|i| {
                            f64::from(x[i]) * f64::from(panel[(i + 1) * PANEL + j % PANEL].to_f32())
                        });
                        let bias = f64::from(panel[j % PANEL].to_f32());
                        let (sum, size) = terms.fold((bias, bias.abs()), |(s, a), t| (s + t, a + t.abs()));
                        let bound = size * (unit + (k + 2) as f64 * 2f64.powi(-24)) + least;
                        let error = (f64::from(got[r * n + j]) - sum).abs();
                        assert!(error <= bound, "{} {rows} {k} {n}: {error} > {bound}", lane.name());
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        let (rows, k, n) = (25, 130, 64);
        let x = noise(3, rows * k, 3.0);
        let panels: Vec<f16> = noise(5, 2 * panel_len(k), 0.1).into_iter().map(f16::from_f32).collect();
        for lane in lanes() {
            let all = run(lane, &x, rows, k, &panels, n);
            // A lone row has sums of its own with FMLAL.
            let least = if lane.name() == "fast-fhm" { 2 } else { 1 };
            for count in least..=9 {
                for first in (0..=rows - count).step_by(count) {
                    let some = run(lane, &x[first * k..][..count * k], count, k, &panels, n);
                    assert!(
                        some == all[first * n..][..count * n],
                        "{} {count} rows from {first}",
                        lane.name()
                    );
                }
            }
        }
    }

    #[test]
    fn rows_packed_in_parts_are_those_packed_at_once() {
        let rows = 2 * FAST_ROWS + 5;
        for (lane, k) in lanes().flat_map(|lane| [1, 31, 70, 896, 4864].map(|k| (lane, k))) {
            let x = noise(3, rows * k, 3.0);
            let lhs = Lhs { x: &x, rows, stride: k, k };
            let pack = |part: usize| {
                let (mut packed, mut scales) = (vec![0; fast_len(rows, k)], vec![0.0; rows]);
                let parts = packed.chunks_mut(fast_len(part, k)).zip(scales.chunks_mut(part));
                for (first, (packed, scales)) in (0..).step_by(part).zip(parts) {
                    pack_fast_rows(lane, lhs, first..first + scales.len(), packed, scales);
                }
                (packed, scales)
            };
            assert!(pack(FAST_ROWS) == pack(3 * FAST_ROWS), "{} {k}", lane.name());
        }
    }

    #[test]
    fn what_this_lane_holds_exactly_is_exact() {
        // Small whole numbers and powers of two: no lane rounds them.
        let (k, n) = (133, 32);
        let panels: Vec<f16> =
            (0..panel_len(k)).map(|i| f16::from_f32(((i * 5) % 11) as f32 / 8.0)).collect();
        // KleidiAI's chains start from weights as they are, which FP16 rounds beside scaled products.
        let lanes = lanes().filter(|lane| lane.name() != "fast-kleidiai");
        for (lane, rows) in lanes.flat_map(|lane| [1, 2, 9].map(|rows| (lane, rows))) {
            let x: Vec<f32> = (0..rows * k).map(|i| (i % 7) as f32 - 3.0).collect();
            let y = run(lane, &x, rows, k, &panels, n);
            for (i, y) in y.iter().enumerate() {
                let (r, j) = (i / n, i % n);
                let sum: f32 = (0..k).map(|i| x[r * k + i] * panels[(i + 1) * PANEL + j].to_f32()).sum();
                assert_eq!(*y, sum + panels[j].to_f32(), "{}", lane.name());
            }
        }
    }
}
