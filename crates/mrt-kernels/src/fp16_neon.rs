//! The fast lanes of 64-bit Arm: FP16 units, four times as wide in multiply-adds as widening FP16 to f32 leaves them.
//!
//! Several rows (FEAT_FP16): see [`fp16`](crate::fp16). One row, with FEAT_FHM too: FMLAL multiplies FP16 numbers exactly and adds
//! to f32. Only the activations are rounded.

use std::arch::aarch64::*;
use std::arch::asm;
use std::arch::is_aarch64_feature_detected;
use std::ops::Range;

use half::f16;

use crate::fast::FastLhs;
use crate::fp16::{self, BLOCK, CHAIN, ROWS, exponent, narrow_8, power_of_two};
use crate::neon::Lanes16;
use crate::panel::PANEL;
use crate::product::{self, Epilogue, Lhs, PanelSums, Rhs};
use crate::window::Window;

/// Inputs that all rows pass over before the next ones: 16 KiB of a panel, which stay in the L1 cache.
const L1_BLOCK: usize = 4 * BLOCK;

/// Exponent of the largest activation of a lone row, whose sums are f32, as it is packed: as large as FP16 goes.
const LONE_TOP: i32 = 14;

pub(crate) fn is_detected() -> bool {
    is_aarch64_feature_detected!("fp16")
}

/// [`fp16::pack_groups`]; with `FHM` a lone row is packed as it is.
///
/// # Safety
/// The machine has NEON.
#[target_feature(enable = "neon")]
pub(crate) unsafe fn pack_rows<const FHM: bool>(
    lhs: Lhs<'_>,
    rows: Range<usize>,
    out: &mut [u16],
    scales: &mut [f32],
) {
    if FHM && lhs.rows == 1 {
        let row = &lhs.x[..lhs.k];
        let exponent = exponent(row, LONE_TOP);
        let factor = power_of_two(-exponent);
        for (x, out) in row.chunks(ROWS).zip(out.chunks_mut(ROWS)) {
            // SAFETY: the machine has NEON.
            out.copy_from_slice(&unsafe { narrow_8(x, factor) }[..out.len()]);
        }
        scales[0] = power_of_two(exponent);
    } else {
        // SAFETY: the machine has NEON.
        unsafe { fp16::pack_groups(lhs, rows, out, scales) };
    }
}

/// 8 numbers times `factor` as FP16, rounded to nearest even.
///
/// # Safety
/// The machine has NEON.
#[inline(always)]
pub(crate) unsafe fn narrow(x: &[f32; 8], factor: f32) -> [u16; 8] {
    let mut out = [0; 8];
    // SAFETY: both arrays have 8 elements.
    unsafe {
        let low = vcvt_f16_f32(vmulq_n_f32(vld1q_f32(x.as_ptr()), factor));
        let both = vcvt_high_f16_f32(low, vmulq_n_f32(vld1q_f32(x.as_ptr().add(4)), factor));
        vst1q_u16(out.as_mut_ptr(), vreinterpretq_u16_f16(both));
    }
    out
}

/// Elements of `a` and `b` in turn: of their first halves, and of their second.
///
/// # Safety
/// The machine has NEON.
#[inline(always)]
pub(crate) unsafe fn interleave(a: &[u16; 8], b: &[u16; 8]) -> [[u16; 8]; 2] {
    let mut out = [[0; 8]; 2];
    // SAFETY: all arrays have 8 elements.
    unsafe {
        let (a, b) = (vld1q_u16(a.as_ptr()), vld1q_u16(b.as_ptr()));
        vst1q_u16(out[0].as_mut_ptr(), vzip1q_u16(a, b));
        vst1q_u16(out[1].as_mut_ptr(), vzip2q_u16(a, b));
    }
    out
}

/// See [`crate::fast_product`]; for `Fp16<false>`.
///
/// # Safety
/// The machine has FEAT_FP16; [`product::check_product`] holds, and `lhs` is as long as it says.
#[target_feature(enable = "neon,fp16")]
pub(crate) unsafe fn fp16_product(
    lhs: FastLhs<'_>,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &mut Window<'_>,
    scratch: &mut [f32],
) {
    // SAFETY: the same contract.
    unsafe { product::product::<Lanes16<false>>(&Fp16::<false>(lhs), rhs, epilogue, y, scratch) }
}

/// The same, with FEAT_FHM.
///
/// # Safety
/// The machine has FEAT_FP16 and FEAT_FHM; the rest as there.
#[target_feature(enable = "neon,fp16,fhm")]
pub(crate) unsafe fn fhm_product(
    lhs: FastLhs<'_>,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &mut Window<'_>,
    scratch: &mut [f32],
) {
    // SAFETY: the same contract.
    unsafe { product::product::<Lanes16<true>>(&Fp16::<true>(lhs), rhs, epilogue, y, scratch) }
}

struct Fp16<'a, const FHM: bool>(FastLhs<'a>);

impl<const FHM: bool> PanelSums for Fp16<'_, FHM> {
    #[inline(always)]
    unsafe fn panel_sums(&self, panel: &[f16], wide: &mut [f32], sums: &mut [f32]) {
        let FastLhs { x, scales, k } = self.0;
        // SAFETY: the contract of the trait and of the products: `x` is packed as `pack_rows` says, the panel has k rows
        // after the biases, and `sums` has a row for each scale.
        unsafe {
            if FHM && scales.len() == 1 {
                lone_row(x.as_ptr(), k, panel.as_ptr().add(PANEL), sums.as_mut_ptr());
                fp16::add_to_bias::<Lanes16<FHM>>(panel, scales, sums);
            } else {
                let saved = wide.as_mut_ptr().cast();
                fp16::panel_sums::<Lanes16<FHM>>(
                    self.0,
                    panel,
                    sums,
                    (ROWS, L1_BLOCK),
                    |_, x, k, w, sums| {
                        tile_rows::<FHM>(sums.len() / PANEL, x, k, w, saved, sums.as_mut_ptr());
                    },
                );
            }
        }
    }
}

/// Writes `$body` out for each lane: a lane's number is part of an instruction.
macro_rules! each_lane {
    (|$lane:ident| $body:block) => { each_lane!($lane $body 0 1 2 3 4 5 6 7) };
    ($lane:ident $body:block $($i:literal)+) => { $({ const $lane: usize = $i; $body })+ };
}

// Assembly, as in `neon.rs`: the compiler keeps it in order. Intrinsics of FEAT_FP16 are not inlined into functions that are
// generic over the features.

/// `w * x[LANE]` in FP16.
///
/// # Safety
/// The machine has FEAT_FP16.
#[inline(always)]
unsafe fn fmul<const LANE: usize>(w: uint16x8_t, x: uint16x8_t) -> uint16x8_t {
    let product;
    // SAFETY: the contract above; the assembly writes its operand only.
    unsafe {
        asm!(
            "fmul {product:v}.8h, {w:v}.8h, {x:v}.h[{lane}]",
            product = lateout(vreg) product,
            w = in(vreg) w,
            x = in(vreg_low16) x,
            lane = const LANE,
            options(nomem, nostack, preserves_flags)
        );
    }
    product
}

/// `sum += w * x[LANE]` in FP16, rounded once.
///
/// # Safety
/// The machine has FEAT_FP16.
#[inline(always)]
unsafe fn fmla<const LANE: usize>(sum: &mut uint16x8_t, w: uint16x8_t, x: uint16x8_t) {
    // SAFETY: the contract above; the assembly writes its operand only.
    unsafe {
        asm!(
            "fmla {sum:v}.8h, {w:v}.8h, {x:v}.h[{lane}]",
            sum = inout(vreg) *sum,
            w = in(vreg) w,
            x = in(vreg_low16) x,
            lane = const LANE,
            options(nomem, nostack, preserves_flags)
        );
    }
}

/// `sums += w * x[LANE]` in f32, rounded once.
///
/// # Safety
/// The machine has FEAT_FHM.
#[inline(always)]
unsafe fn fmlal<const LANE: usize>(sums: &mut [float32x4_t; 2], w: uint16x8_t, x: uint16x8_t) {
    // SAFETY: the contract above; the assembly writes its operands only.
    unsafe {
        asm!(
            "fmlal {low:v}.4s, {w:v}.4h, {x:v}.h[{lane}]",
            "fmlal2 {high:v}.4s, {w:v}.4h, {x:v}.h[{lane}]",
            low = inout(vreg) sums[0],
            high = inout(vreg) sums[1],
            w = in(vreg) w,
            x = in(vreg_low16) x,
            lane = const LANE,
            options(nomem, nostack, preserves_flags)
        );
    }
}

/// 8 FP16 numbers `OFFSET` bytes after `p`. Of two such loads side by side the compiler makes an LDP, which llvm-mca counts as
/// three operations to dispatch on Neoverse V2: as many as FMLAL leaves room for.
///
/// # Safety
/// They may be read.
#[inline(always)]
unsafe fn load<const OFFSET: usize>(p: *const f16) -> uint16x8_t {
    let numbers;
    // SAFETY: the contract above; the assembly writes its operand only.
    unsafe {
        asm!(
            "ldr {numbers:q}, [{p}, #{offset}]",
            numbers = lateout(vreg) numbers,
            p = in(reg) p,
            offset = const OFFSET,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    numbers
}

/// Adds the products of one row with all columns of a panel to 32 sums. Even and odd k have chains of their own, the odd ones
/// up to the last multiple of 8: 16 chains cover FMLAL's latency of 4 cycles at four a cycle.
///
/// # Safety
/// The machine has FEAT_FP16 and FEAT_FHM; `x` has `k` elements, `w` as many rows, `sums` 32 elements.
#[inline(always)]
unsafe fn lone_row(x: *const u16, k: usize, w: *const f16, sums: *mut f32) {
    // SAFETY: the contract above; i < k.
    unsafe {
        let mut acc = [[[vdupq_n_f32(0.0); 2]; 4]; 2];
        let whole = k / 8 * 8;
        for i in (0..whole).step_by(8) {
            let x = vld1q_u16(x.add(i));
            let w = w.add(i * PANEL);
            each_lane!(|LANE| {
                const ROW: usize = size_of::<[f16; PANEL]>() * LANE;
                let w = [
                    load::<ROW>(w),
                    load::<{ ROW + 16 }>(w),
                    load::<{ ROW + 32 }>(w),
                    load::<{ ROW + 48 }>(w),
                ];
                for (sums, w) in acc[LANE % 2].iter_mut().zip(w) {
                    fmlal::<LANE>(sums, w, x);
                }
            });
        }
        for i in whole..k {
            let x = vdupq_n_u16(*x.add(i));
            for (q, sums) in acc[0].iter_mut().enumerate() {
                fmlal::<0>(sums, vld1q_u16(w.add(i * PANEL + 8 * q).cast()), x);
            }
        }
        for (q, (even, odd)) in acc[0].iter().zip(&acc[1]).enumerate() {
            vst1q_f32(sums.add(8 * q), vaddq_f32(even[0], odd[0]));
            vst1q_f32(sums.add(8 * q + 4), vaddq_f32(even[1], odd[1]));
        }
    }
}

/// All columns of a panel for up to 8 rows of a group: up to four side by side, more in halves of the panel.
///
/// # Safety
/// The machine has FEAT_FP16, and FEAT_FHM if `FHM`; `x` is at the start of a block of a group that has at least `rows` rows
/// and `k` more inputs, as has `w`; `sums` has `rows` rows of [`PANEL`].
#[inline(always)]
unsafe fn tile_rows<const FHM: bool>(
    rows: usize,
    x: *const u16,
    k: usize,
    w: *const f16,
    saved: *mut u16,
    sums: *mut f32,
) {
    macro_rules! heights {
        ($($r:literal x $g:literal)+) => {
            match rows {
                $($r => {
                    for at in (0..PANEL).step_by(8 * $g) {
                        // SAFETY: the same contract.
                        unsafe {
                            let (w, sums) = (w.add(at), sums.add(at));
                            if FHM {
                                fhm_tile::<$r, $g>(x, k, w, saved, sums)
                            } else {
                                fp16_tile::<$r, $g>(x, k, w, saved, sums)
                            }
                        }
                    }
                })+
                _ => unreachable!("a tile of {rows} rows"),
            }
        };
    }
    heights!(1 x 4  2 x 4  3 x 4  4 x 4  5 x 2  6 x 2  7 x 2  8 x 2)
}

/// [`tile`] without FEAT_FHM. A function of its own, like the next one: all tiles in one function take minutes to compile.
///
/// # Safety
/// As there.
#[inline(never)]
#[target_feature(enable = "neon,fp16")]
unsafe fn fp16_tile<const R: usize, const G: usize>(
    x: *const u16,
    k: usize,
    w: *const f16,
    saved: *mut u16,
    sums: *mut f32,
) {
    // SAFETY: the same contract.
    unsafe { tile::<R, G, false>(x, k, w, saved, sums) }
}

/// [`tile`] with FEAT_FHM.
///
/// # Safety
/// As there.
#[inline(never)]
#[target_feature(enable = "neon,fp16,fhm")]
unsafe fn fhm_tile<const R: usize, const G: usize>(
    x: *const u16,
    k: usize,
    w: *const f16,
    saved: *mut u16,
    sums: *mut f32,
) {
    // SAFETY: the same contract.
    unsafe { tile::<R, G, true>(x, k, w, saved, sums) }
}

/// The register tile: adds the products of `k` inputs to `R` rows of `8 * G` sums.
///
/// # Safety
/// As [`tile_rows`], for `8 * G` columns.
#[inline(always)]
unsafe fn tile<const R: usize, const G: usize, const FHM: bool>(
    mut x: *const u16,
    k: usize,
    mut w: *const f16,
    saved: *mut u16,
    sums: *mut f32,
) {
    // SAFETY: the contract above. A block of n inputs has 8 scales and 8 n activations, and n rows of the panel.
    unsafe {
        for _ in 0..k / BLOCK {
            let acc = whole_chain::<R, G>(x.add(ROWS), w);
            save(&acc, saved);
            let mut acc = whole_chain::<R, G>(x.add(ROWS * (1 + CHAIN)), w.add(PANEL * CHAIN));
            add_saved(&mut acc, saved);
            flush::<R, G, FHM>(&acc, x, sums);
            x = x.add(ROWS * (1 + BLOCK));
            w = w.add(PANEL * BLOCK);
        }
        let rest = k % BLOCK;
        if rest > 0 {
            let mut acc = chain::<R, G>(x.add(ROWS), w, rest.min(CHAIN));
            if rest > CHAIN {
                save(&acc, saved);
                acc = chain::<R, G>(x.add(ROWS * (1 + CHAIN)), w.add(PANEL * CHAIN), rest - CHAIN);
                add_saved(&mut acc, saved);
            }
            flush::<R, G, FHM>(&acc, x, sums);
        }
    }
}

/// The sums of [`CHAIN`] products in FP16, as one flat sequence: what follows overlaps it.
///
/// # Safety
/// As [`chain`].
#[inline(always)]
unsafe fn whole_chain<const R: usize, const G: usize>(x: *const u16, w: *const f16) -> [[uint16x8_t; G]; R] {
    // SAFETY: the contract above.
    unsafe {
        let mut acc = first_products::<R, G>(x, w);
        macro_rules! steps {
            ($($i:literal)+) => { $(step::<R, G>(&mut acc, x.add(ROWS * $i), w.add(PANEL * $i));)+ };
        }
        steps!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
        acc
    }
}

/// The sums of `k > 0` products in FP16.
///
/// # Safety
/// The machine has FEAT_FP16; `x` has `8 * k` elements, `w` `k` rows of `8 * G`, [`PANEL`] apart.
#[inline(always)]
unsafe fn chain<const R: usize, const G: usize>(
    x: *const u16,
    w: *const f16,
    k: usize,
) -> [[uint16x8_t; G]; R] {
    // SAFETY: the contract above; i < k.
    unsafe {
        let mut acc = first_products::<R, G>(x, w);
        for i in 1..k {
            step::<R, G>(&mut acc, x.add(ROWS * i), w.add(PANEL * i));
        }
        acc
    }
}

/// # Safety
/// `saved` has room for `8 * R * G` elements.
#[inline(always)]
unsafe fn save<const R: usize, const G: usize>(acc: &[[uint16x8_t; G]; R], saved: *mut u16) {
    for (i, &acc) in acc.as_flattened().iter().enumerate() {
        // SAFETY: the contract above; i < R * G.
        unsafe { vst1q_u16(saved.add(8 * i), acc) };
    }
}

/// `acc += saved` in FP16.
///
/// # Safety
/// The machine has FEAT_FP16; `saved` has `8 * R * G` elements.
#[inline(always)]
unsafe fn add_saved<const R: usize, const G: usize>(acc: &mut [[uint16x8_t; G]; R], saved: *const u16) {
    for (i, acc) in acc.as_flattened_mut().iter_mut().enumerate() {
        // SAFETY: the contract above; i < R * G. The assembly writes its operand only.
        unsafe {
            asm!(
                "fadd {sum:v}.8h, {sum:v}.8h, {other:v}.8h",
                sum = inout(vreg) *acc,
                other = in(vreg) vld1q_u16(saved.add(8 * i)),
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

/// `x[r] * w` for the first input of a block.
///
/// # Safety
/// The machine has FEAT_FP16; `x` has 8 elements, `w` `8 * G`.
#[inline(always)]
unsafe fn first_products<const R: usize, const G: usize>(
    x: *const u16,
    w: *const f16,
) -> [[uint16x8_t; G]; R] {
    // SAFETY: the contract above; r < 8, g < G.
    unsafe {
        let x = vld1q_u16(x);
        let mut acc = [[x; G]; R];
        for g in 0..G {
            let w = vld1q_u16(w.add(8 * g).cast());
            each_lane!(|LANE| {
                if LANE < R {
                    acc[LANE][g] = fmul::<LANE>(w, x);
                }
            });
        }
        acc
    }
}

/// `acc[r] += x[r] * w` for another input.
///
/// # Safety
/// As [`first_products`].
#[inline(always)]
unsafe fn step<const R: usize, const G: usize>(acc: &mut [[uint16x8_t; G]; R], x: *const u16, w: *const f16) {
    // SAFETY: the contract above; r < 8, g < G.
    unsafe {
        let x = vld1q_u16(x);
        for g in 0..G {
            let w = vld1q_u16(w.add(8 * g).cast());
            each_lane!(|LANE| {
                if LANE < R {
                    fmla::<LANE>(&mut acc[LANE][g], w, x);
                }
            });
        }
    }
}

/// `sums[r] += scales[r] * acc[r]`: exact but for the rounding of the sum, as scales are powers of two.
///
/// # Safety
/// The machine has FEAT_FP16, and FEAT_FHM if `FHM`; there are 8 scales, and `R` rows of `8 * G` sums, [`PANEL`] apart.
#[inline(always)]
unsafe fn flush<const R: usize, const G: usize, const FHM: bool>(
    acc: &[[uint16x8_t; G]; R],
    scales: *const u16,
    sums: *mut f32,
) {
    // SAFETY: the contract above; r < 8, g < G.
    unsafe {
        let scales = vld1q_u16(scales);
        each_lane!(|LANE| {
            if LANE < R {
                for g in 0..G {
                    let sums = sums.add(LANE * PANEL + 8 * g);
                    let mut both = [vld1q_f32(sums), vld1q_f32(sums.add(4))];
                    if FHM {
                        fmlal::<LANE>(&mut both, acc[LANE][g], scales);
                    } else {
                        fcvtl_fmla::<LANE>(&mut both, acc[LANE][g], scales);
                    }
                    vst1q_f32(sums, both[0]);
                    vst1q_f32(sums.add(4), both[1]);
                }
            }
        });
    }
}

/// [`fmlal`] where there is no FEAT_FHM, for a power of two `x[LANE]`: the product is exact.
///
/// # Safety
/// The machine has FEAT_FP16.
#[inline(always)]
unsafe fn fcvtl_fmla<const LANE: usize>(sums: &mut [float32x4_t; 2], h: uint16x8_t, x: uint16x8_t) {
    // SAFETY: the contract above; the assembly writes its operands only.
    unsafe {
        asm!(
            "dup {x:v}.4h, {xs:v}.h[{lane}]",
            "fcvtl {x:v}.4s, {x:v}.4h",
            "fcvtl {w:v}.4s, {h:v}.4h",
            "fmla {low:v}.4s, {w:v}.4s, {x:v}.4s",
            "fcvtl2 {w:v}.4s, {h:v}.8h",
            "fmla {high:v}.4s, {w:v}.4s, {x:v}.4s",
            low = inout(vreg) sums[0],
            high = inout(vreg) sums[1],
            h = in(vreg) h,
            xs = in(vreg) x,
            x = out(vreg) _,
            w = out(vreg) _,
            lane = const LANE,
            options(nomem, nostack, preserves_flags)
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::fast::{FastLane, Lane};
    use crate::fp16::tests::lanes;

    /// By Arm's manuals of the processors; see `isa.rs`.
    #[test]
    fn these_processors_have_the_lanes_that_their_manuals_say() {
        let want: &[Lane] = match std::env::var("QEMU_CPU").as_deref() {
            Ok("cortex-a53" | "cortex-a72") => &[],
            Ok("cortex-a76" | "neoverse-n1") => &[Lane::Fp16],
            Ok("max") => &[Lane::Fp16, Lane::Fhm],
            _ => return,
        };
        assert_eq!(lanes().map(|lane| lane.0).collect::<Vec<_>>(), want);
        if cfg!(not(feature = "kleidiai")) {
            assert_eq!(FastLane::detect(crate::Isa::detect()).map(|lane| lane.0), want.last().copied());
        }
    }
}
