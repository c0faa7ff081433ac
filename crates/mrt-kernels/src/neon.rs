//! NEON: 16 lanes in four 128-bit registers.
//!
//! Of 32 registers the 6 × 16 tile takes 24 for accumulators, 6 for four inputs of each row of the left-hand side,
//! and 2 for the right-hand side, of which each is used at once. 24 independent chains cover FMA's latency of 4
//! cycles at four a cycle.

use std::arch::aarch64::*;

use half::f16;

use crate::lanes::{F16_MAX, Lanes};

#[derive(Clone, Copy)]
pub(crate) struct Lanes16([float32x4_t; 4]);

/// `$op` on all quarters of the operands.
macro_rules! each {
    ($op:ident, $($operand:expr),+) => {
        // SAFETY: a `Lanes16` exists only where NEON does (see `Lanes`).
        Lanes16(std::array::from_fn(|q| unsafe { $op($($operand.0[q]),+) }))
    };
}

impl Lanes for Lanes16 {
    const TILE_ROWS: usize = 6;
    const TILE_GROUPS: usize = 1;
    const DIRECT_ROWS: usize = 2;
    const SPLAT_4: bool = true;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller promises the instruction set.
        Lanes16([unsafe { vdupq_n_f32(x) }; 4])
    }
    #[inline(always)]
    unsafe fn splat_4(p: *const f32) -> [Self; 4] {
        // SAFETY: the caller promises the instruction set and 4 readable f32.
        unsafe {
            let x = vld1q_f32(p);
            [
                Lanes16([vdupq_laneq_f32::<0>(x); 4]),
                Lanes16([vdupq_laneq_f32::<1>(x); 4]),
                Lanes16([vdupq_laneq_f32::<2>(x); 4]),
                Lanes16([vdupq_laneq_f32::<3>(x); 4]),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller promises the instruction set and 16 readable f32.
        Lanes16(std::array::from_fn(|q| unsafe { vld1q_f32(p.add(4 * q)) }))
    }
    #[inline(always)]
    unsafe fn widen(p: *const f16) -> Self {
        // SAFETY: the caller promises the instruction set and 16 readable FP16.
        unsafe {
            let low = vreinterpretq_f16_u16(vld1q_u16(p.cast()));
            let high = vreinterpretq_f16_u16(vld1q_u16(p.cast::<u16>().add(8)));
            Lanes16([
                vcvt_f32_f16(vget_low_f16(low)),
                vcvt_high_f32_f16(low),
                vcvt_f32_f16(vget_low_f16(high)),
                vcvt_high_f32_f16(high),
            ])
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        for (q, v) in self.0.into_iter().enumerate() {
            // SAFETY: the value proves the instruction set; the caller promises room for 16 f32.
            unsafe { vst1q_f32(p.add(4 * q), v) };
        }
    }
    #[inline(always)]
    unsafe fn narrow(self, p: *mut f16) {
        // SAFETY: the value proves the instruction set; the caller promises room for 16 FP16.
        unsafe {
            let v = self.min(Self::splat(F16_MAX)).max(Self::splat(-F16_MAX)).0;
            let low = vcvt_high_f16_f32(vcvt_f16_f32(v[0]), v[1]);
            let high = vcvt_high_f16_f32(vcvt_f16_f32(v[2]), v[3]);
            vst1q_u16(p.cast(), vreinterpretq_u16_f16(low));
            vst1q_u16(p.cast::<u16>().add(8), vreinterpretq_u16_f16(high));
        }
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        each!(vaddq_f32, self, b)
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        each!(vsubq_f32, self, b)
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        each!(vmulq_f32, self, b)
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        each!(vdivq_f32, self, b)
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        // The instruction takes the summand first.
        each!(vfmaq_f32, c, self, b)
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        each!(vmaxq_f32, self, b)
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        each!(vminq_f32, self, b)
    }
    #[inline(always)]
    fn shift_to_exponent(self) -> Self {
        // SAFETY: the value proves the instruction set.
        Lanes16(self.0.map(|v| unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(v))) }))
    }
}
