//! The fast lane: weight products on units that multiply 16-bit numbers, at the price of the numerics contract.
//! Opt-in, never the default.
//!
//! The activations are rounded to 16 bits, once for all panels, and sums need not be one chain of fused multiply-adds.
//! For one lane and the same batches the result still depends on nothing else, not on the number of threads either; other
//! batches may give other bits, because a lane leaves numbers of rows at which it gains nothing to the exact products.

#![cfg_attr(not(target_arch = "x86_64"), allow(unused_variables, reason = "there is no lane yet"))]

use crate::isa::Isa;
use crate::panel::panel_count;
use crate::product::{Epilogue, Rhs, check_product};
use crate::window::Window;

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

    /// A number for files that hold what was computed so: 0 exact, 1 `fast-bf16`, 4 `fast-kleidiai`. Numbers are never
    /// used again.
    pub fn id(self) -> u32 {
        match self {
            Numerics::Exact => 0,
            Numerics::Fast(lane) => match lane.0 {
                #[cfg(target_arch = "x86_64")]
                Lane::Bf16 => 1,
                #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
                Lane::Kleidiai => 4,
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
    /// `kleidiai.rs`
    #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
    Kleidiai,
}

impl FastLane {
    /// The lane of this machine that goes with `isa`.
    pub fn detect(isa: Isa) -> Option<FastLane> {
        match isa.0 {
            #[cfg(target_arch = "x86_64")]
            crate::isa::Kind::Avx512 if crate::bf16::is_detected() => Some(FastLane(Lane::Bf16)),
            #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
            crate::isa::Kind::Neon | crate::isa::Kind::NeonFhm if crate::kleidiai::is_detected() => {
                Some(FastLane(Lane::Kleidiai))
            }
            _ => None,
        }
    }

    /// `fast-bf16` or `fast-kleidiai`
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Lane::Bf16 => "fast-bf16",
            #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
            Lane::Kleidiai => "fast-kleidiai",
        }
    }

    /// Whether a product of that many rows is faster here than exactly.
    pub fn takes(self, rows: usize) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Lane::Bf16 => rows >= crate::bf16::LEAST_ROWS,
            #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
            Lane::Kleidiai => rows > 0,
        }
    }
}

/// The left-hand side of a fast product: `rows` rows of [`fast_stride`]`(k)` numbers in the lane's 16-bit format.
/// Row r stands for the activations divided by `scales[r]`.
#[derive(Clone, Copy)]
pub struct FastLhs<'a> {
    /// Rows, packed by [`pack_fast_row`].
    pub x: &'a [u16],
    /// What [`pack_fast_row`] returned for each row.
    pub scales: &'a [f32],
    /// Elements of a row that take part.
    pub k: usize,
}

/// Elements from one row of a [`FastLhs`] to the next: `k` made even, since units multiply in pairs.
pub const fn fast_stride(k: usize) -> usize {
    k.next_multiple_of(2)
}

/// Rounds a row of activations to the lane's 16-bit format and returns the scale, a power of two.
///
/// # Panics
/// If `out` does not have [`fast_stride`]`(x.len())` elements.
pub fn pack_fast_row(lane: FastLane, x: &[f32], out: &mut [u16]) -> f32 {
    assert_eq!(out.len(), fast_stride(x.len()));
    match lane.0 {
        // SAFETY: a `FastLane` proves that its features were detected.
        #[cfg(target_arch = "x86_64")]
        Lane::Bf16 => unsafe { crate::bf16::pack_row(x, out) },
        #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
        Lane::Kleidiai => crate::kleidiai::pack_row(x, out),
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
    let (rows, panels) = (lhs.scales.len(), panel_count(y.columns()) * epilogue.panels_per_output());
    if rows == 0 || panels == 0 {
        return;
    }
    check_product(rows, lhs.k, rhs, panels, y, scratch);
    assert!(rows * fast_stride(lhs.k) <= lhs.x.len(), "left-hand side shorter than its sizes");
    match lane.0 {
        // SAFETY: a `FastLane` proves that its features were detected; the assertions above are the contract.
        #[cfg(target_arch = "x86_64")]
        Lane::Bf16 => unsafe { crate::bf16::product(lhs, rhs, epilogue, y, scratch) },
        // SAFETY: as above.
        #[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
        Lane::Kleidiai => unsafe { crate::kleidiai::product(lhs, rhs, epilogue, y, scratch) },
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{PANEL, f16, panel_len, product_scratch_len};

    pub(crate) fn noise(seed: u32, n: usize, scale: f32) -> Vec<f32> {
        let mut s = seed;
        let mut next = || {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next() * scale).collect()
    }

    pub(crate) fn lanes() -> impl Iterator<Item = FastLane> {
        Isa::supported().filter_map(FastLane::detect)
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
        let mut packed = vec![u16::MAX; rows * fast_stride(k)];
        let out = packed.chunks_exact_mut(fast_stride(k));
        let scales: Vec<f32> = x.chunks(k).zip(out).map(|(x, out)| pack_fast_row(lane, x, out)).collect();
        let (mut y, mut scratch) = (vec![f32::NAN; rows * n], vec![f32::NAN; product_scratch_len(rows)]);
        let lhs = FastLhs { x: &packed, scales: &scales, k };
        let mut window = Window::new(&mut y, rows, n, n);
        fast_product(lane, lhs, Rhs::weights(panels, k), Epilogue::Store, &mut window, &mut scratch);
        y
    }

    /// Of a lane that adds in f32: against f64, for inputs as large as Qwen2's activations are. Inputs are rounded to
    /// 2^-8 at most each, which the exact result bears, and each of k sums to 2^-24.
    #[test]
    fn errors_are_those_of_rounded_inputs() {
        for lane in lanes() {
            for (rows, k, n) in [(1, 1, 32), (8, 15, 33), (13, 64, 64), (25, 897, 40), (12, 4864, 32)] {
                let mut x = noise(7, rows * k, 3.0);
                x.iter_mut().step_by(97).for_each(|x| *x *= 9000.0);
                let mut panels = vec![f16::ZERO; panel_count(n) * panel_len(k)];
                panels
                    .iter_mut()
                    .zip(noise(9, panel_count(n) * panel_len(k), 0.1))
                    .for_each(|(w, x)| *w = f16::from_f32(x));
                let got = run(lane, &x, rows, k, &panels, n);
                for r in 0..rows {
                    for j in 0..n {
                        let panel = &panels[j / PANEL * panel_len(k)..];
                        let terms = (0..k).map(|i| {
                            f64::from(x[r * k + i]) * f64::from(panel[(i + 1) * PANEL + j % PANEL].to_f32())
                        });
                        let bias = f64::from(panel[j % PANEL].to_f32());
                        let (sum, size) = terms.fold((bias, bias.abs()), |(s, a), t| (s + t, a + t.abs()));
                        let bound = size * (2f64.powi(-7) + (k + 2) as f64 * 2f64.powi(-24));
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
            for (r, x) in x.chunks(k).enumerate() {
                assert!(run(lane, x, 1, k, &panels, n) == all[r * n..][..n], "{} row {r}", lane.name());
            }
        }
    }

    #[test]
    fn what_this_lane_holds_exactly_is_exact() {
        // Small whole numbers and powers of two: no lane rounds them.
        let (rows, k, n) = (9, 33, 32);
        let x: Vec<f32> = (0..rows * k).map(|i| (i % 7) as f32 - 3.0).collect();
        let panels: Vec<f16> =
            (0..panel_len(k)).map(|i| f16::from_f32(((i * 5) % 11) as f32 / 8.0)).collect();
        // KleidiAI's chains start from weights as they are, which FP16 rounds beside scaled products.
        for lane in lanes().filter(|lane| lane.name() != "fast-kleidiai") {
            let y = run(lane, &x, rows, k, &panels, n);
            for (i, y) in y.iter().enumerate() {
                let (r, j) = (i / n, i % n);
                let sum: f32 = (0..k).map(|i| x[r * k + i] * panels[(i + 1) * PANEL + j].to_f32()).sum();
                assert_eq!(*y, sum + panels[j].to_f32(), "{}", lane.name());
            }
        }
    }
}
