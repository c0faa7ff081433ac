//! The fast lane of KleidiAI, Arm's library of micro-kernels: its `matmul_clamp_f16_f16_f16p32x1b_6x32_neon_mla`
//! (FEAT_FP16) on our panels as they are.
//!
//! It multiplies and adds in FP16, so a sum loses up to 2^-11 of its size at every step and is infinite beyond 65504.
//! Therefore activations are scaled by a power of two per row ([`PEAK`]), its sums run over [`K_SPLIT`] inputs only and
//! are added up in f32, and where one of them reaches 65504 all the same, that row's are computed anew in f32.
//!
//! A chain of KleidiAI's starts from the row of 32 numbers before those that it multiplies, where a whole panel has
//! its biases. Any row of a panel can take that place: a block starts from its own first row, and what the chain is wrong
//! by, as it has that row once instead of x times, is set right in f32. The biases never are in FP16 sums.

use std::ffi::c_void;

use half::f16;

use crate::fast::{FastLhs, fast_stride};
use crate::lanes::{F16_MAX, Lanes};
use crate::neon::Lanes16;
use crate::panel::{LANES, PANEL};
use crate::product::{self, Epilogue, K_BLOCK, PanelSums, Rhs, start_from_bias};
use crate::window::Window;

/// Inputs of a sum in FP16. More are less accurate; fewer spend more time between two sums.
const K_SPLIT: usize = 256;

/// The largest activation of a scaled row is at least 2^`PEAK` and less than twice that: a chain of 256 products cannot
/// overflow while weights are below 0.49, and activations down to 2^-22 of the largest keep all bits of FP16.
const PEAK: u32 = 8;

unsafe extern "C" {
    /// `dst = clamp(rhs_packed[0] + lhs * rhs_packed[1..])` for `m` rows and `n` columns. Strides are in bytes, from row to row.
    fn kai_run_matmul_clamp_f16_f16_f16p32x1b_6x32_neon_mla(
        m: usize,
        n: usize,
        k: usize,
        lhs: *const c_void,
        lhs_stride: usize,
        rhs_packed: *const c_void,
        dst: *mut c_void,
        dst_stride_row: usize,
        dst_stride_col: usize,
        clamp_min: f32,
        clamp_max: f32,
    );
}

pub(crate) fn is_detected() -> bool {
    std::arch::is_aarch64_feature_detected!("fp16")
}

/// Scales a row by a power of two and rounds it to FP16; fills it up with zero to an even length. Of a row that is not finite the
/// scale is NaN: clamped to FP16 it would look as if it were.
pub(crate) fn pack_row(x: &[f32], out: &mut [u16]) -> f32 {
    let peak = x.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
    // The exponent's bits; so bounded that the scale and its reciprocal are normal numbers.
    let exponent = (peak.to_bits() >> 23).clamp(16, 254);
    let (scale, reciprocal) = (exponent - PEAK, 254 + PEAK - exponent);
    let reciprocal = f32::from_bits(reciprocal << 23);
    out.fill(0);
    for (x, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
        let (mut wide, mut narrow) = ([0.0; LANES], [f16::ZERO; LANES]);
        wide[..x.len()].copy_from_slice(x);
        // SAFETY: every Arm64 has NEON; both arrays hold 16 elements.
        unsafe {
            let wide = Lanes16::<false>::load(wide.as_ptr());
            wide.mul(Lanes16::splat(reciprocal)).narrow(narrow.as_mut_ptr());
        }
        for (out, narrow) in out.iter_mut().zip(&narrow[..x.len()]) {
            *out = narrow.to_bits();
        }
    }
    if x.iter().all(|x| x.is_finite()) { f32::from_bits(scale << 23) } else { f32::NAN }
}

/// See [`crate::fast_product`].
///
/// # Safety
/// The machine has FEAT_FP16; [`product::check_product`] holds, and `lhs` is as long as it says.
pub(crate) unsafe fn product(
    lhs: FastLhs<'_>,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &mut Window<'_>,
    scratch: &mut [f32],
) {
    // SAFETY: the same contract.
    unsafe { product::product::<Lanes16<false>>(&Kleidiai(lhs), rhs, epilogue, y, scratch) }
}

struct Kleidiai<'a>(FastLhs<'a>);

impl PanelSums for Kleidiai<'_> {
    unsafe fn panel_sums(&self, panel: &[f16], wide: &mut [f32], sums: &mut [f32]) {
        let FastLhs { x, scales, k } = self.0;
        let stride = fast_stride(k);
        // Rows whose FP16 sums find room in `wide`.
        let most = 2 * K_BLOCK;
        // SAFETY: the contract of the trait. Rows start .. start + block of the panel and columns start .. start + block of
        // each row of `x` are inside them, because start + block <= k; KleidiAI reads the panel's rows start ..
        // start + block, the first as its biases, and one column less, and writes 32 FP16 for each row.
        unsafe {
            start_from_bias::<Lanes16<false>>(panel, sums);
            for start in (0..k).step_by(K_SPLIT) {
                let block = K_SPLIT.min(k - start);
                let w = &panel[(1 + start) * PANEL..][..block * PANEL];
                let rows =
                    x.chunks(most * stride).zip(scales.chunks(most)).zip(sums.chunks_mut(most * PANEL));
                for ((x, scales), sums) in rows {
                    let short = wide.as_mut_ptr().cast::<f16>();
                    let short = std::slice::from_raw_parts_mut(short, scales.len() * PANEL);
                    if block > 1 {
                        kai_run_matmul_clamp_f16_f16_f16p32x1b_6x32_neon_mla(
                            scales.len(),
                            PANEL,
                            block - 1,
                            x.as_ptr().add(start + 1).cast(),
                            stride * size_of::<f16>(),
                            w.as_ptr().cast(),
                            short.as_mut_ptr().cast(),
                            PANEL * size_of::<f16>(),
                            size_of::<f16>(),
                            -F16_MAX,
                            F16_MAX,
                        );
                    }
                    for (r, scale) in scales.iter().enumerate() {
                        let x = &x[r * stride + start..][..block];
                        add_block(
                            x,
                            *scale,
                            w,
                            &short[r * PANEL..][..PANEL],
                            &mut sums[r * PANEL..][..PANEL],
                        );
                    }
                }
            }
        }
    }
}

/// Adds the products of one row's `x` with the rows of `w` to its sums, given what KleidiAI's chain over them came to: the
/// products of all but the first, and the first row once. Without such a chain (one input), or where it reached the
/// limits of FP16, they are computed in f32.
///
/// # Safety
/// `w` has a row of `PANEL` elements for each of `x`; `short` and `sums` have `PANEL`.
unsafe fn add_block(x: &[u16], scale: f32, w: &[f16], short: &[f16], sums: &mut [f32]) {
    type L = Lanes16<false>;
    // Infinities, which are clamped to the limit, and NaN, the difference of two.
    let largest = short.iter().fold(0, |largest, h| (h.to_bits() & 0x7fff).max(largest));
    let saturated = largest >= f16::MAX.to_bits();
    let value = |x: u16| f16::from_bits(x).to_f32();
    for half in [0, LANES] {
        // SAFETY: the contract above, and every Arm64 has NEON.
        unsafe {
            let w = w.as_ptr().add(half);
            let sums = sums.as_mut_ptr().add(half);
            let mut sum = L::load(sums);
            if saturated || x.len() == 1 {
                for (i, x) in x.iter().enumerate() {
                    sum = L::splat(scale * value(*x)).fma(L::widen(w.add(i * PANEL)), sum);
                }
            } else {
                let chain = L::widen(short.as_ptr().add(half));
                let chain = L::splat(value(x[0]) - 1.0).fma(L::widen(w), chain);
                sum = L::splat(scale).fma(chain, sum);
            }
            sum.store(sums);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fast::tests::{lanes, noise, run};
    use crate::panel::panel_len;

    /// Relative root mean square, against f64, of products with weights of up to `weights`, with one activation in 97 larger
    /// than the others' 3 by the factor `massive`. No number of it may be infinite.
    fn error(k: usize, weights: f32, massive: f32) -> Option<f64> {
        let lane = lanes().find(|lane| lane.name() == "fast-kleidiai")?;
        let (rows, n) = (13, 64);
        let mut x = noise(7, rows * k, 3.0);
        x.iter_mut().step_by(97).for_each(|x| *x *= massive);
        let panels: Vec<f16> = noise(9, 2 * panel_len(k), weights).into_iter().map(f16::from_f32).collect();
        let (mut errors, mut squares) = (0.0, 0.0);
        for (i, y) in run(lane, &x, rows, k, &panels, n).iter().enumerate() {
            let (x, column) = (&x[i / n * k..], i % n);
            let panel = panels[column / PANEL * panel_len(k)..].iter().skip(column % PANEL).step_by(PANEL);
            let mut w = panel.map(|w| w.to_f64());
            let bias = w.next().unwrap();
            let sum = w.zip(x).take(k).fold(bias, |sum, (w, x)| sum + w * f64::from(*x));
            assert!(y.is_finite());
            errors += (f64::from(*y) - sum).powi(2);
            squares += sum * sum;
        }
        Some((errors / squares).sqrt())
    }

    /// The bounds are what was seen and a tenth. Without splitting, errors are 4.4e-3 and 1.0e-2.
    #[test]
    fn splitting_bounds_the_error() {
        for (k, bound) in [(896, 2.5e-3), (4864, 2.7e-3)] {
            let error = error(k, 0.02, 1.0);
            assert!(error.is_none_or(|error| error < bound), "k {k}: {error:?}");
        }
    }

    /// Activations as massive as Qwen2's, and weights with which chains overflow in spite of scaling.
    #[test]
    fn nothing_is_infinite() {
        for weights in [0.02, 300.0, 60_000.0] {
            let error = error(896, weights, 9000.0);
            assert!(error.is_none_or(|error| error < 1e-3), "weights {weights}: {error:?}");
        }
    }

    #[test]
    fn infinities_and_nans_stay() {
        let Some(lane) = lanes().find(|lane| lane.name() == "fast-kleidiai") else { return };
        let k = 70;
        let panel = vec![f16::ONE; panel_len(k)];
        for bad in [f32::INFINITY, f32::NAN] {
            for x in [vec![bad; k], [vec![1.0; k - 1], vec![bad]].concat()] {
                let x = [x, vec![1.0; k]].concat();
                let y = run(lane, &x, 2, k, &panel, PANEL);
                assert!(y[..PANEL].iter().all(|y| !y.is_finite()));
                assert!(y[PANEL..].iter().all(|y| (y - 71.0).abs() <= 71.0 * 2e-3));
            }
        }
    }

    /// Of small numbers too, down to zeros, and whatever the length of the last block.
    #[test]
    fn any_length_and_any_scale() {
        for k in [1, 2, 255, 256, 257, 258, 513] {
            for x in [0.0, 1e-30, 1.0, 1e30] {
                let Some(lane) = lanes().find(|lane| lane.name() == "fast-kleidiai") else { return };
                // Powers of two for weights: all is exact but the biases beside the sums.
                let panel: Vec<f16> =
                    (0..panel_len(k)).map(|i| f16::from_f32(if i < PANEL { 0.0 } else { 1.0 })).collect();
                let got = run(lane, &vec![x; k], 1, k, &panel, PANEL);
                let want = x * k as f32;
                assert!(got.iter().all(|y| (y - want).abs() <= want * 2e-3), "{k} x {x}: {} {want}", got[0]);
            }
        }
    }
}
