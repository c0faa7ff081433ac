//! AVX2 with FMA and F16C: 16 lanes in two 256-bit registers.
//!
//! Of 16 registers the 6 × 16 tile takes 12 for accumulators, 2 for the right-hand side and 1 for the broadcast:
//! 12 independent chains cover FMA's latency of 4 or 5 cycles at two a cycle.

use std::arch::asm;
use std::arch::x86_64::*;

use half::f16;

use crate::isa::Kind;
use crate::lanes::{Element, F16_MAX, Lanes, fma_rows};
use crate::panel::LANES;
use crate::product::Left;

#[derive(Clone, Copy)]
pub(crate) struct Lanes16<const INTEL: bool>(__m256, __m256);

const _: () =
    assert!(Lanes16::<false>::TILE_ROWS.is_multiple_of(3), "`fma_input` takes three rows at a time");

/// `$op` on both halves of the operands.
macro_rules! both {
    ($op:ident, $($operand:expr),+) => {
        // SAFETY: a `Lanes16` exists only where AVX2, FMA and F16C do (see `Lanes`).
        unsafe { Lanes16($op($($operand.0),+), $op($($operand.1),+)) }
    };
}

impl<const INTEL: bool> Lanes for Lanes16<INTEL> {
    const KIND: Kind = if INTEL { Kind::Avx2Intel } else { Kind::Avx2 };
    const TILE_ROWS: usize = 6;
    const DIRECT_ROWS: usize = 3;
    /// F16C costs a tile of 6 rows nothing on Zen 4: 48 rows reach 108 GFLOP/s of 117, and 103 with widened blocks. On Emerald
    /// Rapids 512 rows are 9 % faster with those, 32 rows 4 % slower.
    const WIDENED_ROWS: usize = if INTEL { 48 } else { usize::MAX };
    /// Addresses and counters take some 13 instructions a step, beside 20 for each input. On a busy Zen 3, 64 rows were 4 to
    /// 7 % faster than with 4 (medians), on a quiet one as fast.
    const K_STEP: usize = 8;
    /// On Zen 3 one thread that reads one panel at a time reaches 21.6 GB/s so, 20 with 4, and 18 to 19.5 with 64 or none.
    const PREFETCH_ROWS: usize = 16;
    const STREAMED_ROWS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller promises the instruction set.
        let v = unsafe { _mm256_set1_ps(x) };
        Lanes16(v, v)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller promises the instruction set and 16 readable f32.
        unsafe { Lanes16(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn widen(p: *const f16) -> Self {
        // SAFETY: the caller promises the instruction set and 16 readable FP16.
        unsafe {
            Lanes16(
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
            )
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the value proves the instruction set; the caller promises room for 16 f32.
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn narrow(self, p: *mut f16) {
        // SAFETY: the value proves the instruction set; the caller promises room for 16 FP16.
        unsafe {
            let v = self.min(Self::splat(F16_MAX)).max(Self::splat(-F16_MAX));
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.1));
        }
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        both!(_mm256_add_ps, self, b)
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        both!(_mm256_sub_ps, self, b)
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        both!(_mm256_mul_ps, self, b)
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        both!(_mm256_div_ps, self, b)
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        both!(_mm256_fmadd_ps, self, b, c)
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        both!(_mm256_max_ps, self, b)
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        both!(_mm256_min_ps, self, b)
    }
    /// Twice a block of each run is in the L1 cache. On Zen 3 one row is 1 to 2 % slower with 24 than with 16, 3 to 5 % with two
    /// threads; two and three rows are 2 to 8 % slower with 16 than with 24.
    #[inline(always)]
    fn stream_block(rows: usize) -> usize {
        if rows == 1 { 16 } else { 24 }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // Assembly, which stays where it is: the compiler gathers prefetches, and what comes in bursts comes later.
        // SAFETY: every x86-64 processor has the instruction, which only hints and never faults.
        unsafe { asm!("prefetcht0 [{p}]", p = in(reg) p, options(nostack, preserves_flags)) }
    }
    #[inline(always)]
    fn prefetch_l2(p: *const u8) {
        // SAFETY: as in `prefetch`.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    fn shift_to_exponent(self) -> Self {
        // SAFETY: the value proves the instruction set.
        let shift = |v| unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(v))) };
        Lanes16(shift(self.0), shift(self.1))
    }
    #[inline(always)]
    unsafe fn tile_step<E: Element, const R: usize, const G: usize>(
        acc: &mut [[Self; G]; R],
        x: *const f32,
        x_stride: usize,
        b: *const E,
    ) {
        // SAFETY: the same contract.
        unsafe {
            if R.is_multiple_of(3) {
                fma_input::<E, R, G, 0, INTEL>(acc, Left { x, stride: x_stride }, b);
            } else {
                // There are registers to spare, and the compiler's order is the faster one.
                fma_rows(acc, x, x_stride, b);
            }
        }
    }
    #[inline(always)]
    unsafe fn tile_steps<E: Element, const R: usize, const G: usize>(
        acc: &mut [[Self; G]; R],
        x: *const f32,
        x_stride: usize,
        b: *const E,
    ) {
        // SAFETY: the caller promises the instruction set, 8 elements of each row of `x`, and 8 rows of `b`.
        unsafe {
            if R != Self::TILE_ROWS {
                for i in 0..Self::K_STEP {
                    Self::tile_step(acc, x.add(i), x_stride, b.add(i * E::stride::<G>()));
                }
                return;
            }
            let x = Left { x, stride: x_stride };
            macro_rules! inputs {
                ($($i:literal)+) => { $(fma_input::<E, R, G, $i, INTEL>(acc, x, b.add($i * E::stride::<G>()));)+ };
            }
            inputs!(0 1 2 3 4 5 6 7);
        }
    }
}

/// Adds the products of input `I` of each row of `x` with a row of `b`, 16 columns after the other: neither 6 × 16 nor 3 × 32
/// sums leave registers for more. `R` is a multiple of 3.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; `x` has `R` rows of more than `I` elements, `b` has `16 * G`.
#[inline(always)]
unsafe fn fma_input<E: Element, const R: usize, const G: usize, const I: usize, const INTEL: bool>(
    acc: &mut [[Lanes16<INTEL>; G]; R],
    x: Left,
    b: *const E,
) {
    // SAFETY: the contract above; g < G, and the rows of each group are rows of `x`.
    unsafe {
        // No closure, which would be compiled without the instruction set.
        for g in 0..G {
            let w = E::lanes(b.add(g * LANES));
            for (i, rows) in acc.as_chunks_mut::<3>().0.iter_mut().enumerate() {
                fma_three_rows::<I, INTEL>(x.skip_rows(3 * i), w, rows.each_mut().map(|row| &mut row[g]));
            }
        }
    }
}

/// `sums[r] = x[r][I] * w + sums[r]`, rounded once. Assembly, which the compiler keeps in order: it would load what comes
/// next early, and have no register left for all sums of the 6 × 16 tile. It would also compute an address for each row.
///
/// # Safety
/// The machine has AVX2 and FMA; `x` has three rows of more than `I` elements.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn fma_three_rows<const I: usize, const INTEL: bool>(
    x: Left,
    w: Lanes16<INTEL>,
    [sum0, sum1, sum2]: [&mut Lanes16<INTEL>; 3],
) {
    // SAFETY: the contract above; the assembly reads one element of each row and writes its operands only.
    unsafe {
        asm!(
            "vbroadcastss {x_i}, dword ptr [{x} + {offset}]",
            "vfmadd231ps {low0}, {x_i}, {w_low}",
            "vfmadd231ps {high0}, {x_i}, {w_high}",
            "vbroadcastss {x_i}, dword ptr [{x} + 4 * {stride} + {offset}]",
            "vfmadd231ps {low1}, {x_i}, {w_low}",
            "vfmadd231ps {high1}, {x_i}, {w_high}",
            "vbroadcastss {x_i}, dword ptr [{x} + 8 * {stride} + {offset}]",
            "vfmadd231ps {low2}, {x_i}, {w_low}",
            "vfmadd231ps {high2}, {x_i}, {w_high}",
            x_i = out(ymm_reg) _,
            x = in(reg) x.x,
            stride = in(reg) x.stride,
            offset = const I * size_of::<f32>(),
            low0 = inout(ymm_reg) sum0.0,
            high0 = inout(ymm_reg) sum0.1,
            low1 = inout(ymm_reg) sum1.0,
            high1 = inout(ymm_reg) sum1.1,
            low2 = inout(ymm_reg) sum2.0,
            high2 = inout(ymm_reg) sum2.1,
            w_low = in(ymm_reg) w.0,
            w_high = in(ymm_reg) w.1,
            options(nostack, preserves_flags, readonly)
        );
    }
}
