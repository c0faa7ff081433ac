//! Operations on rows of activations: RMSNorm, RoPE, softmax, scaling, and SiLU for the products.
//!
//! A row need not be a multiple of 16 long: the last, short group of lanes is padded with a value that does not
//! change the result.

use half::f16;

use crate::isa::{Isa, dispatch};
use crate::lanes::Lanes;
use crate::panel::LANES;

/// RMSNorm of one row: `out[i] = x[i] / sqrt(mean(x²) + eps) * weight[i]`, the sum of squares in 16 lanes.
/// (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.)
///
/// # Panics
/// If `x`, `weight` and `out` differ in length.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f16], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len());
    dispatch!(isa, rms_norm_lanes(x: &[f32], weight: &[f16], eps: f32, out: &mut [f32]))
}

/// Rotates one head: `out[i] = x[i] cos[i] - x[i + d/2] sin[i]`, `out[i + d/2] = x[i + d/2] cos[i] + x[i] sin[i]`,
/// for i below d/2, all multiplied by `factor` at the end.
/// (Su et al., "RoFormer", 2021, with the halves of a head paired as Hugging Face pairs them.)
///
/// # Panics
/// If `x` and `out` are not both twice as long as `cos` and `sin`.
pub fn rope(isa: Isa, x: &[f32], cos: &[f32], sin: &[f32], factor: f32, out: &mut [f32]) {
    assert!(x.len() == 2 * cos.len() && cos.len() == sin.len() && x.len() == out.len());
    dispatch!(isa, rope_lanes(x: &[f32], cos: &[f32], sin: &[f32], factor: f32, out: &mut [f32]))
}

/// Replaces `scores` by `exp(score - max)` and returns the sum of the results, in 16 lanes. Dividing by the sum,
/// which a softmax ends with, is left to whoever uses the weights.
///
/// Differences below -80 count as -80 (1.8e-35), so that no weight is subnormal. A score that is NaN counts as the least.
pub fn softmax(isa: Isa, scores: &mut [f32]) -> f32 {
    dispatch!(isa, softmax_lanes(scores: &mut [f32]) -> f32)
}

/// `out[i] = x[i] * factor`
///
/// # Panics
/// If the lengths differ.
pub fn scale(isa: Isa, x: &[f32], factor: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    dispatch!(isa, scale_lanes(x: &[f32], factor: f32, out: &mut [f32]))
}

/// Elements `i ..` of `x`, at most 16; missing lanes are `pad`.
#[inline(always)]
unsafe fn load<L: Lanes>(x: &[f32], i: usize, pad: f32) -> L {
    if let Some(full) = x[i..].first_chunk::<LANES>() {
        // SAFETY: 16 elements; the instruction set is the caller's promise.
        return unsafe { L::load(full.as_ptr()) };
    }
    let mut lanes = [pad; LANES];
    lanes[..x.len() - i].copy_from_slice(&x[i..]);
    // SAFETY: as above.
    unsafe { L::load(lanes.as_ptr()) }
}

/// Elements `i ..` of FP16 `x`, at most 16; missing lanes are zero.
#[inline(always)]
unsafe fn widen<L: Lanes>(x: &[f16], i: usize) -> L {
    if let Some(full) = x[i..].first_chunk::<LANES>() {
        // SAFETY: 16 elements; the instruction set is the caller's promise.
        return unsafe { L::widen(full.as_ptr()) };
    }
    let mut lanes = [f16::ZERO; LANES];
    lanes[..x.len() - i].copy_from_slice(&x[i..]);
    // SAFETY: as above.
    unsafe { L::widen(lanes.as_ptr()) }
}

/// Writes `v` to elements `i ..` of `out`, as many of the 16 as there are.
#[inline(always)]
fn store<L: Lanes>(v: L, out: &mut [f32], i: usize) {
    if let Some(full) = out[i..].first_chunk_mut::<LANES>() {
        // SAFETY: room for 16 elements.
        return unsafe { v.store(full.as_mut_ptr()) };
    }
    let rest = &mut out[i..];
    rest.copy_from_slice(&v.to_array()[..rest.len()]);
}

#[inline(always)]
unsafe fn rms_norm_lanes<L: Lanes>(x: &[f32], weight: &[f16], eps: f32, out: &mut [f32]) {
    // SAFETY: the instruction set is `dispatch!`'s promise.
    unsafe {
        let mut squares = L::splat(0.0);
        for i in (0..x.len()).step_by(LANES) {
            let v = load::<L>(x, i, 0.0);
            squares = v.fma(v, squares);
        }
        let mean = squares.tree(|a, b| a + b) / x.len() as f32;
        let inverse = L::splat(1.0 / (mean + eps).sqrt());
        for i in (0..x.len()).step_by(LANES) {
            store(load::<L>(x, i, 0.0).mul(inverse).mul(widen(weight, i)), out, i);
        }
    }
}

#[inline(always)]
unsafe fn rope_lanes<L: Lanes>(x: &[f32], cos: &[f32], sin: &[f32], factor: f32, out: &mut [f32]) {
    let (x0, x1) = x.split_at(cos.len());
    let (out0, out1) = out.split_at_mut(cos.len());
    // SAFETY: the instruction set is `dispatch!`'s promise.
    unsafe {
        let factor = L::splat(factor);
        for i in (0..cos.len()).step_by(LANES) {
            let (a, b) = (load::<L>(x0, i, 0.0), load::<L>(x1, i, 0.0));
            let (c, s) = (load::<L>(cos, i, 0.0), load::<L>(sin, i, 0.0));
            store(a.mul(c).sub(b.mul(s)).mul(factor), out0, i);
            store(b.mul(c).add(a.mul(s)).mul(factor), out1, i);
        }
    }
}

/// [`softmax`].
///
/// # Safety
/// The machine has `L`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn softmax_lanes<L: Lanes>(scores: &mut [f32]) -> f32 {
    let (whole, rest) = scores.as_chunks_mut::<LANES>();
    // SAFETY: a chunk holds 16 elements; the instruction set is the contract.
    unsafe {
        // Of a NaN and a number, `max` gives the one on the right.
        let mut max = load::<L>(rest, 0, f32::NEG_INFINITY).max(L::splat(f32::NEG_INFINITY));
        for chunk in &*whole {
            max = L::load(chunk.as_ptr()).max(max);
        }
        let max = L::splat(max.tree(f32::max));
        // No score is above the largest one.
        let least = L::splat(EXP_MIN);
        let mut sum = L::splat(0.0);
        for chunk in whole {
            let e = exp(L::load(chunk.as_ptr()).sub(max).max(least));
            e.store(chunk.as_mut_ptr());
            sum = sum.add(e);
        }
        store(exp(load::<L>(rest, 0, f32::NEG_INFINITY).sub(max).max(least)), rest, 0);
        // Lanes past the end must add nothing.
        sum.add(load(rest, 0, 0.0)).tree(|a, b| a + b)
    }
}

#[inline(always)]
unsafe fn scale_lanes<L: Lanes>(x: &[f32], factor: f32, out: &mut [f32]) {
    // SAFETY: the instruction set is `dispatch!`'s promise.
    let factor = unsafe { L::splat(factor) };
    for i in (0..x.len()).step_by(LANES) {
        // SAFETY: as above.
        let v = unsafe { load::<L>(x, i, 0.0) };
        store(v.mul(factor), out, i);
    }
}

/// What [`exp`] takes: e^-80 is 1.8e-35, e^88 1.7e38.
const EXP_MIN: f32 = -80.0;
const EXP_MAX: f32 = 88.0;

/// e^x for x in `EXP_MIN ..= EXP_MAX`; the relative error is below 1e-7.
///
/// x = n ln 2 + r with |r| <= ln(2)/2; e^r = 1 + r + r² q(r), where q is the polynomial of degree 4 with the least relative
/// error of e^r, 3e-9 (Remez's algorithm); the result is scaled by 2^n. Adding 1.5 * 2^23 rounds to an integer in the low bits
/// of the sum; the further 127 makes those bits the exponent of 2^n.
#[inline(always)]
unsafe fn exp<L: Lanes>(x: L) -> L {
    // SAFETY: a value of type `L` proves the instruction set.
    let c = |c: f32| unsafe { L::splat(c) };
    const LN2_HIGH: f32 = 355.0 / 512.0; // few bits, so that n * LN2_HIGH is exact
    const LN2_LOW: f32 = -2.121_944_4e-4; // ln 2 - LN2_HIGH
    let shifter = c(12_582_912.0 + 127.0);
    let shifted = x.fma(c(std::f32::consts::LOG2_E), shifter);
    let n = shifted.sub(shifter);
    let r = n.fma(c(-LN2_LOW), n.fma(c(-LN2_HIGH), x));
    let q = r.fma(c(1.381_454e-3), c(8.368_745e-3));
    let q = q.fma(r, c(4.166_839e-2));
    let q = q.fma(r, c(0.166_665_21));
    let q = q.fma(r, c(0.499_999_94));
    let scale = shifted.shift_to_exponent();
    q.fma(r.mul(r), r).fma(scale, scale)
}

/// SwiGLU: `silu(gate) * up` with `silu(x) = x / (1 + e^-x)`. (Shazeer, "GLU Variants Improve Transformer", 2020.)
///
/// # Safety
/// The machine has `L`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn swiglu<L: Lanes>(gate: L, up: L) -> L {
    // SAFETY: the caller promises the instruction set.
    unsafe {
        let e = exp(L::splat(0.0).sub(gate).max(L::splat(EXP_MIN)).min(L::splat(EXP_MAX)));
        gate.div(L::splat(1.0).add(e)).mul(up)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::portable::Lanes16;

    fn noise(n: usize, scale: f32) -> Vec<f32> {
        let mut s = 7u32;
        let mut next = || {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next() * scale).collect()
    }

    fn exp_array(x: [f32; 16]) -> [f32; 16] {
        // SAFETY: the portable vector runs everywhere; `x` holds 16 elements.
        unsafe { exp(Lanes16::load(x.as_ptr())).to_array() }
    }

    #[test]
    fn exp_is_accurate_to_a_few_ulp() {
        let mut worst = 0.0f64;
        for step in 0..=1_680_000 {
            let x = -80.0 + step as f32 * 1e-4;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp_array([x; 16])[0]) / want - 1.0).abs());
        }
        assert!(worst < 1e-7, "{worst}");
        assert_eq!(exp_array([0.0; 16])[0], 1.0);
    }

    #[test]
    fn what_exp_does_not_take_is_clamped() {
        let mut scores = [0.0, -80.0, -81.0, f32::MIN, f32::NEG_INFINITY];
        softmax(Isa::PORTABLE, &mut scores);
        assert!(scores[1] > 0.0 && scores[2..] == [scores[1]; 3], "{scores:?}");
        for gate in [-1000.0, 1000.0] {
            // SAFETY: the portable vector runs everywhere.
            let [got, ..] = unsafe { swiglu(Lanes16::splat(gate), Lanes16::splat(1.0)).to_array() };
            assert!((got - gate.max(0.0)).abs() < 1e-30, "{gate}: {got}");
        }
    }

    #[test]
    fn rms_norm_matches_its_formula() {
        for n in [1, 15, 16, 17, 64, 100, 896] {
            let (x, mut out) = (noise(n, 3.0), vec![0.0; n]);
            let weight: Vec<f16> = noise(n, 2.0).into_iter().map(f16::from_f32).collect();
            rms_norm(Isa::PORTABLE, &x, &weight, 1e-6, &mut out);
            let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / n as f64;
            for i in 0..n {
                let want = f64::from(x[i]) / (mean + 1e-6).sqrt() * f64::from(weight[i].to_f32());
                assert!((f64::from(out[i]) - want).abs() <= 1e-6 * want.abs().max(1e-3), "n {n}, i {i}");
            }
        }
    }

    #[test]
    fn softmax_sums_its_weights() {
        for n in [1, 2, 15, 16, 17, 100, 1000] {
            let mut s = noise(n, 20.0);
            let before = s.clone();
            let sum = softmax(Isa::PORTABLE, &mut s);
            let max = before.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let want: f64 = before.iter().map(|&x| f64::from(x - max).exp()).sum();
            assert!((f64::from(sum) / want - 1.0).abs() < 1e-6, "n {n}");
            assert_eq!(s.iter().copied().fold(0.0, f32::max), 1.0);
        }
    }

    #[test]
    fn a_nan_has_the_least_weight() {
        for isa in Isa::variants() {
            for n in [2, 16, 17, 48, 100] {
                for at in 0..n {
                    let mut scores = noise(n, 300.0);
                    scores[at] = f32::NEG_INFINITY;
                    let mut with_nan = scores.clone();
                    with_nan[at] = f32::NAN;
                    let sums = [&mut scores, &mut with_nan].map(|scores| softmax(isa, scores));
                    assert!(sums[0] == sums[1] && scores == with_nan, "{} n {n} at {at}", isa.name());
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for isa in Isa::variants() {
            for n in [1, 8, 15, 16, 17, 32, 100, 898] {
                let (x, y) = (noise(2 * n, 9.0), noise(2 * n + 1, 70.0));
                let weight: Vec<f16> = y[..n].iter().map(|&v| f16::from_f32(v)).collect();
                let run = |isa| {
                    let mut all = Vec::new();
                    let mut out = vec![0.0; n];
                    rms_norm(isa, &x[..n], &weight, 1e-5, &mut out);
                    all.extend_from_slice(&out);
                    let mut out = vec![0.0; 2 * n];
                    rope(isa, &x, &y[..n], &y[n..2 * n], 0.3, &mut out);
                    all.extend_from_slice(&out);
                    scale(isa, &x, 1.1, &mut out);
                    all.extend_from_slice(&out);
                    let sum = softmax(isa, &mut out);
                    all.extend_from_slice(&out);
                    all.push(sum);
                    let mut half = vec![f16::ZERO; n];
                    crate::store_v_row(
                        isa,
                        &x[..n].iter().map(|x| x * 9000.0).collect::<Vec<_>>(),
                        &mut half,
                    );
                    all.extend(half.iter().map(|h| h.to_f32()));
                    all.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                };
                assert_eq!(run(Isa::PORTABLE), run(isa), "{} n {n}", isa.name());
            }
        }
    }
}
