//! What the fast lanes in FP16 have in common, those of 64-bit Arm and of AVX512-FP16: products by FP16 multiply-adds straight
//! from the panel. The same bits on both.
//!
//! After [`BLOCK`] inputs the sums are added to f32 sums and begin anew, so that errors do not grow with k. A block of a row
//! is scaled by a power of two such that its sums cannot overflow while weights are below [`2^5`](TOP); sums that do are
//! computed again in f32.

use std::ops::Range;

use half::f16;

pub(crate) use crate::fast::FAST_BLOCK as BLOCK;
use crate::fast::{FastLhs, fast_stride};
#[cfg(target_arch = "x86_64")]
use crate::fp16_avx512::{interleave, narrow};
#[cfg(target_arch = "aarch64")]
use crate::fp16_neon::{interleave, narrow};
use crate::lanes::Lanes;
use crate::panel::{LANES, PANEL};
use crate::product::{Lhs, start_from_bias};

/// Rows that are packed together.
pub(crate) const ROWS: usize = 8;

/// Inputs whose products are added up one by one in FP16. A block is two such chains, whose sums are added up in FP16
/// before they are added to f32 sums. That is as accurate as adding each to f32, to 3 %, and halves the stores, which take
/// Arm's vector units.
pub(crate) const CHAIN: usize = BLOCK / 2;

/// Exponent of the largest activation of a block as it is packed: 64 products with weights below 2^5 stay below 2^16, FP16's
/// limit, and activations up to 2^18 times smaller than the largest keep all their bits.
const TOP: i32 = 4;

/// Packed elements of a block of a group of [`ROWS`] rows: its scales, and so many activations for each input.
pub(crate) const GROUP_BLOCK: usize = ROWS * (1 + BLOCK);

/// Packs those rows of `lhs` in groups of [`ROWS`] and sets their scales. For each block of a group: 8 scales, relative to
/// those of the rows, then 8 activations for each k, zeros where the group has fewer rows.
///
/// # Safety
/// The machine has the instructions of `interleave` and `narrow`.
#[inline(always)]
pub(crate) unsafe fn pack_groups(lhs: Lhs<'_>, rows: Range<usize>, out: &mut [u16], scales: &mut [f32]) {
    let row = |r: usize| &lhs.x[r * lhs.stride..][..lhs.k];
    let groups = out.chunks_exact_mut(group_len(lhs.k)).zip(scales.chunks_mut(ROWS));
    for (first, (out, scales)) in rows.step_by(ROWS).zip(groups) {
        let exponents: [i32; ROWS] =
            std::array::from_fn(|r| if r < scales.len() { exponent(row(first + r), TOP) } else { 0 });
        for (scale, e) in scales.iter_mut().zip(exponents) {
            *scale = power_of_two(e);
        }
        let len = ROWS * (lhs.k + lhs.k.div_ceil(BLOCK));
        for (b, out) in out[..len].chunks_mut(GROUP_BLOCK).enumerate() {
            let (block_scales, out) = out.split_at_mut(ROWS);
            let (start, end) = (b * BLOCK, b * BLOCK + out.len() / ROWS);
            let mut factors = [0.0; ROWS];
            for r in 0..scales.len() {
                let below = (exponents[r] - exponent(&row(first + r)[start..end], TOP)).clamp(0, 14);
                block_scales[r] = f16::from_f32_const(power_of_two(-below)).to_bits();
                factors[r] = power_of_two(below - exponents[r]);
            }
            for (i, out) in out.chunks_mut(ROWS * 8).enumerate() {
                let mut eight = [[0; 8]; ROWS];
                for (r, eight) in eight.iter_mut().enumerate().take(scales.len()) {
                    let x = &row(first + r)[start + 8 * i..end];
                    // SAFETY: the contract above.
                    *eight = unsafe { narrow_8(x, factors[r]) };
                }
                // SAFETY: the contract above.
                let columns = unsafe { transpose(eight) };
                out.copy_from_slice(&columns.as_flattened()[..out.len()]);
            }
        }
    }
}

/// The first 8 numbers, or as many as there are and zeros, times `factor` as FP16, rounded to nearest even.
///
/// # Safety
/// The machine has the instructions of `narrow`.
#[inline(always)]
pub(crate) unsafe fn narrow_8(x: &[f32], factor: f32) -> [u16; 8] {
    let mut eight = [0.0; 8];
    let x = x.first_chunk().unwrap_or_else(|| {
        eight[..x.len()].copy_from_slice(x);
        &eight
    });
    // SAFETY: the contract above.
    unsafe { narrow(x, factor) }
}

/// # Safety
/// The machine has the instructions of `interleave`.
#[inline(always)]
unsafe fn transpose(mut rows: [[u16; 8]; 8]) -> [[u16; 8]; 8] {
    // Each round moves one bit of the row's number into that of the column.
    for _ in 0..3 {
        // SAFETY: the contract above.
        let pairs: [_; 4] = std::array::from_fn(|i| unsafe { interleave(&rows[i], &rows[i + 4]) });
        rows.copy_from_slice(pairs.as_flattened());
    }
    rows
}

/// Elements of a packed group of rows of `k` inputs.
pub(crate) fn group_len(k: usize) -> usize {
    ROWS * fast_stride(k)
}

/// The exponent e for which the largest magnitude in `x` divided by 2^e is in 2^top .. 2^(top + 1): no less than leaves 2^-e
/// times 2^14 finite.
#[inline(always)]
pub(crate) fn exponent(x: &[f32], top: i32) -> i32 {
    ((greatest_bits(x) >> 23) as i32 - 127 - top).max(-112)
}

/// The bits of the greatest magnitude; those of an infinity or a NaN are greater than of any number.
#[inline(always)]
fn greatest_bits(x: &[f32]) -> u32 {
    x.iter().fold(0, |max, x| max.max(x.to_bits() & !(1 << 31)))
}

/// 2^e of a normal number.
#[inline(always)]
pub(crate) fn power_of_two(e: i32) -> f32 {
    f32::from_bits(((e + 127) as u32) << 23)
}

/// All sums of one panel, in tiles: of `tile_rows` rows, a multiple of [`ROWS`], over `block` inputs, a multiple of [`BLOCK`], that all
/// rows pass over before the next ones. `tile(t, x, n, w, sums)` adds the products of `n` inputs to the rows of `sums`: `x` is at the
/// start of a block of the first group of tile `t`, whose groups are [`group_len`] apart, `w` at the same row of the panel.
///
/// # Safety
/// The machine has `L`'s instruction set; `lhs` is packed by [`pack_groups`], `panel` has `lhs.k` rows after the biases, `sums` a
/// row for each scale.
#[inline(always)]
pub(crate) unsafe fn panel_sums<L: Lanes>(
    lhs: FastLhs<'_>,
    panel: &[f16],
    sums: &mut [f32],
    (tile_rows, block): (usize, usize),
    tile: impl Fn(usize, *const u16, usize, *const f16, &mut [f32]),
) {
    let FastLhs { x, scales, k } = lhs;
    let group_len = group_len(k);
    sums.fill(0.0);
    for start in (0..k).step_by(block) {
        let inputs = block.min(k - start);
        let w = panel[(1 + start) * PANEL..].as_ptr();
        for (t, sums) in sums.chunks_mut(tile_rows * PANEL).enumerate() {
            let x = &x[t * tile_rows / ROWS * group_len + start / BLOCK * GROUP_BLOCK..];
            tile(t, x.as_ptr(), inputs, w, sums);
        }
    }
    for (r, sums) in sums.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
        if greatest_bits(sums) >= f32::INFINITY.to_bits() {
            // SAFETY: the contract above.
            unsafe { f32_sums::<L>(&x[r / ROWS * group_len..][..group_len], r % ROWS, k, panel, sums) };
        }
    }
    // SAFETY: the contract above.
    unsafe { add_to_bias::<L>(panel, scales, sums) };
}

/// The sums of row `r` of a packed group in f32, where those in FP16 overflowed. These cannot: an activation is at most 2^5
/// and a weight below 2^16.
///
/// # Safety
/// The machine has `L`'s instruction set; `panel` has `k` rows after the biases.
#[inline(always)]
unsafe fn f32_sums<L: Lanes>(group: &[u16], r: usize, k: usize, panel: &[f16], sums: &mut [f32; PANEL]) {
    let number = |i: usize| f16::from_bits(group[i * ROWS + r]).to_f32_const();
    // SAFETY: the contract above; a row has two vectors.
    unsafe {
        let mut acc = [L::splat(0.0); 2];
        for (i, w) in panel.as_chunks::<PANEL>().0[1..=k].iter().enumerate() {
            let block = i / BLOCK * (1 + BLOCK);
            let x = L::splat(number(block + 1 + i % BLOCK) * number(block));
            for (acc, at) in acc.iter_mut().zip([0, LANES]) {
                *acc = x.fma(L::widen(w.as_ptr().add(at)), *acc);
            }
        }
        for (acc, at) in acc.into_iter().zip([0, LANES]) {
            acc.store(sums.as_mut_ptr().add(at));
        }
    }
}

/// `sums[r] = bias + scales[r] * sums[r]`
///
/// # Safety
/// The machine has `L`'s instruction set; `panel` has the bias row, `sums` a row for each scale.
#[inline(always)]
pub(crate) unsafe fn add_to_bias<L: Lanes>(panel: &[f16], scales: &[f32], sums: &mut [f32]) {
    let mut biases = [0.0; PANEL];
    // SAFETY: the contract above; all arrays have two vectors.
    unsafe {
        start_from_bias::<L>(panel, &mut biases);
        for (sums, &scale) in sums.as_chunks_mut::<PANEL>().0.iter_mut().zip(scales) {
            for at in [0, LANES] {
                let bias = L::load(biases.as_ptr().add(at));
                let sum = L::load(sums.as_ptr().add(at)).fma(L::splat(scale), bias);
                sum.store(sums.as_mut_ptr().add(at));
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #[cfg(target_arch = "aarch64")]
    use std::arch::is_aarch64_feature_detected;

    use super::*;
    use crate::fast::tests::{noise, run};
    use crate::fast::{FastLane, Lane};
    use crate::panel::panel_len;

    /// The lanes in FP16 that the machine has, chosen or not.
    pub(crate) fn lanes() -> impl Iterator<Item = FastLane> {
        #[cfg(target_arch = "x86_64")]
        let lanes = [(crate::fp16_avx512::is_detected(), Lane::Fp16)];
        #[cfg(target_arch = "aarch64")]
        let lanes = {
            let fp16 = crate::fp16_neon::is_detected();
            [(fp16, Lane::Fp16), (fp16 && is_aarch64_feature_detected!("fhm"), Lane::Fhm)]
        };
        lanes.into_iter().filter(|lane| lane.0).map(|lane| FastLane(lane.1))
    }

    /// `a * b + c` of FP16 numbers, rounded once to FP16.
    ///
    /// The product is exact in f64. The sum is rounded to odd, to f64 and then to f32, which keeps the last rounding from
    /// being a second one (S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    fn fma16(a: f32, b: f32, c: f32) -> f32 {
        let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
        let sum = product + c;
        if !sum.is_finite() {
            return sum as f32;
        }
        let above = sum - product;
        let error = (product - (sum - above)) + (c - above);
        let odd = match sum.to_bits() {
            bits if error == 0.0 || bits & 1 == 1 => bits,
            bits if (error > 0.0) == (sum > 0.0) => bits + 1,
            bits => bits - 1,
        };
        let odd = f64::from_bits(odd);
        let mut narrow = odd as f32;
        if f64::from(narrow) != odd {
            let outside = f64::from(narrow).abs() > odd.abs();
            narrow = f32::from_bits((narrow.to_bits() - u32::from(outside)) | 1);
        }
        round16(narrow)
    }

    fn round16(x: f32) -> f32 {
        f16::from_f32_const(x).to_f32_const()
    }

    /// 2^e for which the largest magnitude in `x` divided by it is in 2^top .. 2^(top + 1).
    fn scale(x: &[f32], top: i32) -> f32 {
        let largest = x.iter().fold(0f32, |max, x| max.max(x.abs()));
        let mut scale = 2f32.powi(-112);
        while largest / scale >= 2f32.powi(top + 1) {
            scale *= 2.0;
        }
        scale
    }

    /// Column `j` of `x * panel` as the lane defines it, while nothing overflows.
    fn model(lane: FastLane, lone: bool, x: &[f32], panel: &[f16], j: usize) -> f32 {
        let w: Vec<f32> = panel.chunks(PANEL).map(|row| row[j].to_f32_const()).collect();
        let (bias, w) = (w[0], &w[1..]);
        if lone && lane.name() == "fast-fhm" {
            let scale = scale(x, 14);
            let mut sums = [0f32; 2];
            for (i, (one, w)) in x.iter().zip(w).enumerate() {
                let sum = &mut sums[if i < x.len() / 8 * 8 { i % 2 } else { 0 }];
                *sum = round16(one / scale).mul_add(*w, *sum);
            }
            return (sums[0] + sums[1]).mul_add(scale, bias);
        }
        let row_scale = scale(x, 4);
        let mut sum = 0f32;
        for (x, w) in x.chunks(64).zip(w.chunks(64)) {
            let block_scale = scale(x, 4).max(row_scale * 2f32.powi(-14));
            let halves = x.chunks(32).zip(w.chunks(32)).map(|(x, w)| {
                x.iter().zip(w).fold(0.0, |sum, (x, w)| fma16(round16(x / block_scale), *w, sum))
            });
            let both = halves.reduce(|first, second| fma16(first, 1.0, second)).unwrap();
            sum = both.mul_add(block_scale / row_scale, sum);
        }
        sum.mul_add(row_scale, bias)
    }

    fn panel_of(k: usize, numbers: Vec<f32>) -> Vec<f16> {
        assert_eq!(numbers.len(), panel_len(k));
        numbers.into_iter().map(f16::from_f32_const).collect()
    }

    #[test]
    fn the_emulated_fma_rounds_once() {
        assert_eq!(fma16(3.0, 0.5, 2.0), 3.5);
        assert_eq!(fma16(255.0, 257.0, 0.0), f32::INFINITY); // 65535
        // 2048 is followed by 2050: halves go to the even one, and the least bit decides.
        assert_eq!(fma16(1.0, 1.0, 2048.0), 2048.0);
        assert_eq!(fma16(1.0, 1.0 + 2f32.powi(-10), 2048.0), 2050.0);
        assert_eq!(fma16(2f32.powi(-24), 2f32.powi(-24), 2049.0 - 1.0), 2048.0);
        assert_eq!(fma16(-2f32.powi(-24), 2f32.powi(-24), 2050.0), 2050.0);
    }

    #[test]
    fn every_row_equals_the_model() {
        for lane in lanes() {
            for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 17] {
                for k in [1, 7, 32, 33, 64, 97, 300] {
                    let mut x = noise((rows * k) as u32, rows * k, 3.0);
                    x.iter_mut().step_by(29).for_each(|x| *x *= 9000.0);
                    x[..k].iter_mut().step_by(2).for_each(|x| *x *= 1e-9);
                    x[(rows - 1) * k..].iter_mut().for_each(|x| *x *= 1e-30);
                    let panel = panel_of(k, noise(rows as u32, panel_len(k), 0.1));
                    let got = run(lane, &x, rows, k, &panel, PANEL);
                    for (r, x) in x.chunks(k).enumerate() {
                        for j in 0..PANEL {
                            let want = model(lane, rows == 1, x, &panel, j);
                            assert_eq!(got[r * PANEL + j], want, "{} {rows} x {k}, {r}, {j}", lane.name());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_overflows_that_f32_holds() {
        let k = 200;
        for lane in lanes() {
            for rows in [1, 2, 8, 11] {
                for (x, w) in [(3e4, 0.1), (1.0, 6e4), (6e4, 6e4), (1e30, 1e4), (1e-38, 6e4), (1e-44, 1.0)] {
                    // All of one sign: sums as large as can be.
                    let xs: Vec<f32> = noise(3, rows * k, x).into_iter().map(f32::abs).collect();
                    let panel = panel_of(k, noise(5, panel_len(k), w).into_iter().map(f32::abs).collect());
                    let got = run(lane, &xs, rows, k, &panel, PANEL);
                    for (i, got) in got.into_iter().enumerate() {
                        let (r, j) = (i / PANEL, i % PANEL);
                        let term =
                            |i: usize| f64::from(xs[r * k + i]) * panel[(i + 1) * PANEL + j].to_f64_const();
                        let want = panel[j].to_f64_const() + (0..k).map(term).sum::<f64>();
                        let error = (f64::from(got) - want).abs();
                        let least = f64::from(f32::MIN_POSITIVE) * f64::from(w) * k as f64;
                        assert!(
                            error <= want * 2f64.powi(-6) + least,
                            "{} {rows} {x} {w}: {got}, not {want}",
                            lane.name()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn infinities_and_nans_stay() {
        let (rows, k) = (3, 70);
        let panel = panel_of(k, vec![1.0; panel_len(k)]);
        for lane in lanes() {
            for rows in [1, rows] {
                for bad in [f32::INFINITY, f32::NAN] {
                    let mut x = vec![1.0; rows * k];
                    x[65] = bad;
                    let y = run(lane, &x, rows, k, &panel, PANEL);
                    assert!(y[..PANEL].iter().all(|y| !y.is_finite()), "{}", lane.name());
                    assert!(y[PANEL..].iter().all(|y| *y == 71.0), "{}", lane.name());
                }
            }
        }
    }

    /// Relative RMS errors of several rows, beside those of sums that stay in FP16 from the first input to the last, as
    /// KleidiAI's kernel for these panels adds.
    #[test]
    fn errors_do_not_grow_with_k() {
        let normal = |seed: u32, n: usize, deviation: f32| -> Vec<f32> {
            // A sum of 12 numbers, uniform between -1 and 1, has variance 4.
            noise(seed, 12 * n, 0.5 * deviation).chunks(12).map(|some| some.iter().sum()).collect()
        };
        for lane in lanes() {
            for (k, times) in [(896, 5.0), (4864, 10.0)] {
                let rows = 8;
                let (x, panel) = (normal(1, rows * k, 1.0), panel_of(k, normal(2, panel_len(k), 0.02)));
                let got = run(lane, &x, rows, k, &panel, PANEL);
                let (mut square, mut ours, mut theirs) = (0.0, 0.0, 0.0);
                for (i, got) in got.into_iter().enumerate() {
                    let (r, j) = (i / PANEL, i % PANEL);
                    let terms = (0..k).map(|i| (x[r * k + i], panel[(i + 1) * PANEL + j].to_f32_const()));
                    let bias = panel[j].to_f32_const();
                    let exact =
                        terms.clone().fold(f64::from(bias), |s, (x, w)| s + f64::from(x) * f64::from(w));
                    let fp16 = terms.fold(bias, |sum, (x, w)| fma16(round16(x), w, sum));
                    square += exact * exact;
                    ours += (f64::from(got) - exact).powi(2);
                    theirs += (f64::from(fp16) - exact).powi(2);
                }
                let [ours, theirs] = [ours, theirs].map(|sum: f64| (sum / square).sqrt());
                println!(
                    "{} K = {k}: {ours:.2e}, all in FP16 {theirs:.2e}, ratio {:.1}",
                    lane.name(),
                    theirs / ours
                );
                assert!(times * ours <= theirs, "{} K = {k}: {ours:e}, {theirs:e}", lane.name());
            }
        }
    }
}
