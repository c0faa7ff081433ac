//! AVX2 with FMA and F16C: 16 lanes in two 256-bit registers.
//!
//! Of 16 registers the 6 × 16 tile takes 12 for accumulators, 2 for the right-hand side and 1 for the broadcast:
//! 12 independent chains cover FMA's latency of 4 or 5 cycles at two a cycle.

use std::arch::x86_64::*;

use half::f16;

use crate::lanes::{F16_MAX, Lanes};

#[derive(Clone, Copy)]
pub(crate) struct Lanes16(__m256, __m256);

/// `$op` on both halves of the operands.
macro_rules! both {
    ($op:ident, $($operand:expr),+) => {
        // SAFETY: a `Lanes16` exists only where AVX2, FMA and F16C do (see `Lanes`).
        unsafe { Lanes16($op($($operand.0),+), $op($($operand.1),+)) }
    };
}

impl Lanes for Lanes16 {
    const TILE_ROWS: usize = 6;
    const TILE_GROUPS: usize = 1;
    const DIRECT_ROWS: usize = 2;
    /// With one at a time, the addresses of the rows take as many instructions as the multiply-adds.
    const K_STEP: usize = 4;

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
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: every x86-64 processor has the instruction, which only hints and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
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
}
