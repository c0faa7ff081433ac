//! The fast lanes of 64-bit Arm: FP16 units, four times as wide in multiply-adds as widening FP16 to f32 leaves them.
//!
//! Several rows (FEAT_FP16): FMLA in FP16, straight from the panel. After [`BLOCK`] inputs the sums are added to f32 sums
//! and begin anew, so that errors do not grow with k. A block of a row is scaled by a power of two such that its
//! sums cannot overflow while weights are below [`2^5`](TOP); sums that do are computed again in f32.
//!
//! One row, with FEAT_FHM too: FMLAL multiplies FP16 numbers exactly and adds to f32. Only the activations are rounded.

use std::arch::aarch64::*;
use std::arch::asm;
use std::arch::is_aarch64_feature_detected;
use std::ops::Range;

use half::f16;

use crate::fast::{FAST_BLOCK as BLOCK, FAST_ROWS as ROWS, FastLhs, fast_stride};
use crate::lanes::Lanes;
use crate::neon::Lanes16;
use crate::panel::{LANES, PANEL};
use crate::product::{self, Epilogue, Lhs, PanelSums, Rhs, start_from_bias};
use crate::window::Window;

/// Inputs whose products are added up one by one in FP16. A block is two such chains, whose sums are added up in FP16
/// before they are added to f32 sums. That is as accurate as adding each to f32, to 3 %, and halves the stores, which take
/// vector units.
const CHAIN: usize = BLOCK / 2;

/// Inputs that all rows pass over before the next ones: 16 KiB of a panel, which stay in the L1 cache.
const L1_BLOCK: usize = 4 * BLOCK;

/// Exponent of the largest activation of a block as it is packed: 64 products with weights below 2^5 stay below 2^16, FP16's
/// limit, and activations up to 2^18 times smaller than the largest keep all their bits.
const TOP: i32 = 4;

/// The same of a lone row, whose sums are f32: as large as FP16 goes.
const LONE_TOP: i32 = 14;

pub(crate) fn is_detected() -> bool {
    is_aarch64_feature_detected!("fp16")
}

/// Packs those rows of `lhs` in groups of [`ROWS`] and sets their scales. For each block of a group: 8 scales, relative to
/// those of the rows, then 8 activations for each k. With `FHM` a lone row is packed as it is.
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
    let row = |r: usize| &lhs.x[r * lhs.stride..][..lhs.k];
    if FHM && lhs.rows == 1 {
        let exponent = exponent(row(0), LONE_TOP);
        let factor = power_of_two(-exponent);
        for (x, out) in row(0).chunks(ROWS).zip(out.chunks_mut(ROWS)) {
            // SAFETY: the machine has NEON.
            out.copy_from_slice(&unsafe { narrow_8(x, factor) }[..out.len()]);
        }
        scales[0] = power_of_two(exponent);
        return;
    }
    let groups = out.chunks_exact_mut(ROWS * fast_stride(lhs.k)).zip(scales.chunks_mut(ROWS));
    for (first, (out, scales)) in rows.step_by(ROWS).zip(groups) {
        let exponents: [i32; ROWS] =
            std::array::from_fn(|r| if r < scales.len() { exponent(row(first + r), TOP) } else { 0 });
        for (scale, e) in scales.iter_mut().zip(exponents) {
            *scale = power_of_two(e);
        }
        let len = ROWS * (lhs.k + lhs.k.div_ceil(BLOCK));
        for (b, out) in out[..len].chunks_mut(ROWS * (1 + BLOCK)).enumerate() {
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
                    // SAFETY: the machine has NEON.
                    *eight = unsafe { narrow_8(&x[..x.len().min(8)], factors[r]) };
                }
                // SAFETY: the machine has NEON.
                let columns = unsafe { transpose(eight) };
                out.copy_from_slice(&columns.as_flattened()[..out.len()]);
            }
        }
    }
}

/// The exponent e for which the largest magnitude in `x` divided by 2^e is in 2^top .. 2^(top + 1): no less than leaves 2^-e
/// times 2^14 finite.
fn exponent(x: &[f32], top: i32) -> i32 {
    ((greatest_bits(x) >> 23) as i32 - 127 - top).max(-112)
}

/// The bits of the greatest magnitude; those of an infinity or a NaN are greater than of any number.
#[inline(always)]
fn greatest_bits(x: &[f32]) -> u32 {
    x.iter().fold(0, |max, x| max.max(x.to_bits() & !(1 << 31)))
}

/// 2^e of a normal number.
fn power_of_two(e: i32) -> f32 {
    f32::from_bits(((e + 127) as u32) << 23)
}

/// Up to 8 numbers times `factor` as FP16, rounded to nearest even, and zeros.
///
/// # Safety
/// The machine has NEON.
#[target_feature(enable = "neon")]
unsafe fn narrow_8(x: &[f32], factor: f32) -> [u16; 8] {
    let mut eight = [0.0; 8];
    let x = x.first_chunk().unwrap_or_else(|| {
        eight[..x.len()].copy_from_slice(x);
        &eight
    });
    let mut out = [0; 8];
    // SAFETY: both arrays have 8 elements.
    unsafe {
        let low = vcvt_f16_f32(vmulq_n_f32(vld1q_f32(x.as_ptr()), factor));
        let both = vcvt_high_f16_f32(low, vmulq_n_f32(vld1q_f32(x.as_ptr().add(4)), factor));
        vst1q_u16(out.as_mut_ptr(), vreinterpretq_u16_f16(both));
    }
    out
}

/// # Safety
/// The machine has NEON.
#[target_feature(enable = "neon")]
unsafe fn transpose(rows: [[u16; 8]; 8]) -> [[u16; 8]; 8] {
    // SAFETY: each row has 8 elements.
    let mut v = rows.map(|row| unsafe { vld1q_u16(row.as_ptr()) });
    // Each round moves one bit of the row's number into that of the column.
    for _ in 0..3 {
        v = std::array::from_fn(|i| {
            let (a, b) = (v[i / 2], v[i / 2 + 4]);
            if i % 2 == 0 { vzip1q_u16(a, b) } else { vzip2q_u16(a, b) }
        });
    }
    v.map(|v| {
        let mut row = [0; 8];
        // SAFETY: the row has 8 elements.
        unsafe { vst1q_u16(row.as_mut_ptr(), v) };
        row
    })
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
            sums.fill(0.0);
            if FHM && scales.len() == 1 {
                lone_row(x.as_ptr(), k, panel.as_ptr().add(PANEL), sums.as_mut_ptr());
            } else {
                let group_len = ROWS * fast_stride(k);
                let saved = wide.as_mut_ptr().cast();
                for start in (0..k).step_by(L1_BLOCK) {
                    let len = L1_BLOCK.min(k - start);
                    let w = panel.as_ptr().add((1 + start) * PANEL);
                    for (g, sums) in sums.chunks_mut(ROWS * PANEL).enumerate() {
                        let x = x.as_ptr().add(g * group_len + start / BLOCK * (1 + BLOCK) * ROWS);
                        tile_rows::<FHM>(sums.len() / PANEL, x, len, w, saved, sums.as_mut_ptr());
                    }
                }
                for (r, sums) in sums.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
                    if greatest_bits(sums) >= f32::INFINITY.to_bits() {
                        let group = &x[r / ROWS * group_len..][..group_len];
                        *sums = f32_sums::<FHM>(group, r % ROWS, k, panel);
                    }
                }
            }
            finish::<FHM>(panel, scales, sums);
        }
    }
}

/// `sums[r] = bias + scales[r] * sums[r]`
///
/// # Safety
/// The machine has NEON, and FEAT_FHM if `FHM`; `panel` has the bias row, `sums` a row for each scale.
#[inline(always)]
unsafe fn finish<const FHM: bool>(panel: &[f16], scales: &[f32], sums: &mut [f32]) {
    let mut biases = [0.0; PANEL];
    // SAFETY: the contract above; all arrays have two vectors.
    unsafe {
        start_from_bias::<Lanes16<FHM>>(panel, &mut biases);
        for (sums, &scale) in sums.as_chunks_mut::<PANEL>().0.iter_mut().zip(scales) {
            for at in [0, LANES] {
                let bias = Lanes16::<FHM>::load(biases.as_ptr().add(at));
                let sum = Lanes16::load(sums.as_ptr().add(at)).fma(Lanes16::splat(scale), bias);
                sum.store(sums.as_mut_ptr().add(at));
            }
        }
    }
}

/// The sums of row `r` of a packed group in f32, where those in FP16 overflowed. These cannot: an activation is at most 2^5
/// and a weight below 2^16.
///
/// # Safety
/// The machine has NEON, and FEAT_FHM if `FHM`; `panel` has the bias row and `k` rows.
#[cold]
#[inline(never)]
unsafe fn f32_sums<const FHM: bool>(group: &[u16], r: usize, k: usize, panel: &[f16]) -> [f32; PANEL] {
    let mut sums = [0.0; PANEL];
    let number = |i: usize| f16::from_bits(group[i * ROWS + r]).to_f32_const();
    for (i, w) in panel.as_chunks::<PANEL>().0[1..=k].iter().enumerate() {
        let block = i / BLOCK * (1 + BLOCK);
        let x = number(block + 1 + i % BLOCK) * number(block);
        for (sum, w) in sums.iter_mut().zip(w) {
            *sum = x.mul_add(w.to_f32_const(), *sum);
        }
    }
    sums
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
    use super::*;
    use crate::fast::tests::{noise, run};
    use crate::fast::{FastLane, Lane};
    use crate::panel::panel_len;

    /// The lanes of this file that the machine has.
    fn lanes() -> impl Iterator<Item = FastLane> {
        let fhm = is_detected() && is_aarch64_feature_detected!("fhm");
        [(is_detected(), Lane::Fp16), (fhm, Lane::Fhm)]
            .into_iter()
            .filter(|lane| lane.0)
            .map(|lane| FastLane(lane.1))
    }

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
