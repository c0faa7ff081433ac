//! NEON: 16 lanes in four 128-bit registers.
//!
//! Of 32 registers the 6 × 16 tile takes 24 for accumulators, 6 for four inputs of each row of the left-hand side,
//! and 2 for the right-hand side. 24 independent chains cover FMA's latency of 4 cycles at four a cycle, and up to
//! six.
//!
//! With `FHM` (FEAT_FHM, FP16 products into f32 sums) FP16 is widened by multiplying by one: see [`widen_8`].

use std::arch::aarch64::*;
use std::arch::asm;

use half::f16;

use crate::isa::Kind;
use crate::lanes::{Element, F16_MAX, Lanes};
use crate::panel::LANES;

#[derive(Clone, Copy)]
pub(crate) struct Lanes16<const FHM: bool>([float32x4_t; 4]);

/// `$op` on all quarters of the operands.
macro_rules! each {
    ($op:ident, $($operand:expr),+) => {
        // SAFETY: a `Lanes16` exists only where NEON does (see `Lanes`).
        Lanes16(std::array::from_fn(|q| unsafe { $op($($operand.0[q]),+) }))
    };
}

/// FMAX and FMIN would give NaN where one operand is NaN.
#[inline(always)]
unsafe fn larger(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: the caller promises NEON.
    unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
}

/// As [`larger`].
#[inline(always)]
unsafe fn smaller(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: the caller promises NEON.
    unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
}

impl<const FHM: bool> Lanes for Lanes16<FHM> {
    const KIND: Kind = if FHM { Kind::NeonFhm } else { Kind::Neon };
    const TILE_ROWS: usize = 6;
    const DIRECT_ROWS: usize = 3;
    /// FCVTL in the tile's loop would cost it 40 % of its speed.
    const WIDENED_ROWS: usize = Self::TILE_ROWS + 1;
    const K_STEP: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller promises the instruction set.
        Lanes16([unsafe { vdupq_n_f32(x) }; 4])
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
            let ([a, b], [c, d]) = (widen_8::<FHM>(p), widen_8::<FHM>(p.add(8)));
            Lanes16([a, b, c, d])
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
        each!(larger, self, b)
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        each!(smaller, self, b)
    }
    #[inline(always)]
    fn shift_to_exponent(self) -> Self {
        // SAFETY: the value proves the instruction set.
        Lanes16(self.0.map(|v| unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(v))) }))
    }
    #[inline(always)]
    unsafe fn tile_step<E: Element, const R: usize, const G: usize>(
        acc: &mut [[Self; G]; R],
        x: *const f32,
        x_stride: usize,
        b: *const E,
    ) {
        // SAFETY: the caller promises the instruction set, an element of each row of `x`, and a row of `b`.
        unsafe {
            let mut one = [vdupq_n_f32(0.0); R];
            for (r, one) in one.iter_mut().enumerate() {
                *one = vld1q_dup_f32(x.add(r * x_stride));
            }
            fma_lane::<E, R, G, FHM, 0>(acc, &one, b);
        }
    }
    #[inline(always)]
    unsafe fn tile_steps<E: Element, const R: usize, const G: usize>(
        acc: &mut [[Self; G]; R],
        x: *const f32,
        x_stride: usize,
        b: *const E,
    ) {
        // SAFETY: the caller promises the instruction set, 4 elements of each row of `x`, and 4 rows of `b`.
        unsafe {
            let mut four = [vdupq_n_f32(0.0); R];
            for (r, four) in four.iter_mut().enumerate() {
                *four = vld1q_f32(x.add(r * x_stride));
            }
            fma_lane::<E, R, G, FHM, 0>(acc, &four, b);
            fma_lane::<E, R, G, FHM, 1>(acc, &four, b.add(E::stride::<G>()));
            fma_lane::<E, R, G, FHM, 2>(acc, &four, b.add(2 * E::stride::<G>()));
            fma_lane::<E, R, G, FHM, 3>(acc, &four, b.add(3 * E::stride::<G>()));
        }
    }
}

/// -0.0 in all lanes of two registers.
static NEGATIVE_ZEROS: [f32; 8] = [-0.0; 8];

/// 8 consecutive FP16 numbers as f32, exactly.
///
/// FCVTL is two operations for two of the four vector units of Neoverse V1 and V2: one a cycle. FMLAL and FMLAL2
/// (FEAT_FHM) run on all four, and -0 + h * 1 is h, with the sign of a zero too. They overwrite their summand,
/// which is therefore loaded each time: a register move would take a vector unit again, a load takes none.
///
/// # Safety
/// The machine has NEON, and FEAT_FHM if `FHM`; `p` may be read for 8 FP16.
#[inline(always)]
unsafe fn widen_8<const FHM: bool>(p: *const f16) -> [float32x4_t; 2] {
    // SAFETY: the contract above; the assembly reads the 8 f32 of a static and writes its operands only.
    unsafe {
        let h = vld1q_u16(p.cast());
        if FHM {
            let (mut low, mut high);
            asm!(
                "ldp {low:q}, {high:q}, [{zeros}]",
                "fmlal {low:v}.4s, {h:v}.4h, {one:v}.4h",
                "fmlal2 {high:v}.4s, {h:v}.4h, {one:v}.4h",
                low = out(vreg) low,
                high = out(vreg) high,
                h = in(vreg) h,
                one = in(vreg) vdupq_n_u16(f16::ONE.to_bits()),
                zeros = in(reg) &NEGATIVE_ZEROS,
                options(pure, readonly, nostack, preserves_flags)
            );
            [low, high]
        } else {
            let h = vreinterpretq_f16_u16(h);
            [vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)]
        }
    }
}

/// `acc[r] += x[r][LANE] * b` for `R` rows of `16 * G` sums.
///
/// The compiler keeps assembly in order. Left to itself (`vfmaq_laneq_f32` is the same instruction) it loads and
/// widens the right-hand sides of several inputs first, and spills sums to make room for them.
///
/// # Safety
/// The machine has NEON, and FEAT_FHM if `FHM`; `b` has `16 * G` elements.
#[inline(always)]
unsafe fn fma_lane<E: Element, const R: usize, const G: usize, const FHM: bool, const LANE: i32>(
    acc: &mut [[Lanes16<FHM>; G]; R],
    x: &[float32x4_t; R],
    b: *const E,
) {
    for g in 0..G {
        for q in [0, 2] {
            // SAFETY: the contract above; 16 g + 4 q + 8 <= 16 G. The registers have no room for `widen_8`'s constant
            // in tiles of more than three rows.
            let w = unsafe {
                let b = b.add(LANES * g + 4 * q);
                if size_of::<E>() == size_of::<f32>() {
                    [vld1q_f32(b.cast()), vld1q_f32(b.cast::<f32>().add(4))]
                } else if R <= 3 {
                    widen_8::<FHM>(b.cast())
                } else {
                    widen_8::<false>(b.cast())
                }
            };
            for (q, w) in [(q, w[0]), (q + 1, w[1])] {
                for r in 0..R {
                    let sum = &mut acc[r][g].0[q];
                    // SAFETY: NEON is the caller's promise; the assembly writes nothing but `sum`.
                    unsafe {
                        asm!(
                            "fmla {sum:v}.4s, {w:v}.4s, {x:v}.s[{lane}]",
                            sum = inout(vreg) *sum,
                            w = in(vreg) w,
                            x = in(vreg) x[r],
                            lane = const LANE,
                            options(nostack, preserves_flags)
                        );
                    }
                }
            }
        }
    }
}
