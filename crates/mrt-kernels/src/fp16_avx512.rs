//! The fast lane of AVX512-FP16: see [`fp16`](crate::fp16). A vector holds all 32 columns of a panel.

use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;
use std::ops::Range;

use half::f16;

use crate::avx512;
use crate::fast::FastLhs;
use crate::fp16::{self, BLOCK, CHAIN, ROWS};
use crate::lanes::Lanes;
use crate::panel::{LANES, PANEL};
use crate::product::{self, Epilogue, Lhs, PanelSums, Rhs};
use crate::window::Window;

/// As on the processors that this lane is for.
type Lanes16 = avx512::Lanes16<true>;

/// Fewer rows are bound by memory: exact products are as fast, which read several panels at a time.
pub(crate) const LEAST_ROWS: usize = 1 + <Lanes16 as Lanes>::STREAMED_ROWS;

/// Groups of rows of a full register tile: 24 accumulators and a row of weights. The multiply-adds broadcast the activations from
/// memory themselves.
const TILE_GROUPS: usize = 3;

/// Inputs that all rows pass over before the next ones: 8 KiB of a panel, which stay in the L1 cache beside what a tile multiplies
/// them with. Twice or half as many are 1 to 3 % slower on Emerald Rapids.
const L1_BLOCK: usize = 2 * BLOCK;

pub(crate) fn is_detected() -> bool {
    is_x86_feature_detected!("avx512fp16") && is_x86_feature_detected!("avx512bw")
}

/// [`fp16::pack_groups`].
///
/// # Safety
/// The machine has AVX-512.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
pub(crate) unsafe fn pack_rows(lhs: Lhs<'_>, rows: Range<usize>, out: &mut [u16], scales: &mut [f32]) {
    // SAFETY: the same contract.
    unsafe { fp16::pack_groups(lhs, rows, out, scales) }
}

/// 8 numbers times `factor` as FP16, rounded to nearest even.
///
/// # Safety
/// The machine has AVX2 and F16C.
#[inline(always)]
pub(crate) unsafe fn narrow(x: &[f32; 8], factor: f32) -> [u16; 8] {
    let mut out = [0; 8];
    // SAFETY: both arrays have 8 elements.
    unsafe {
        let x = _mm256_mul_ps(_mm256_loadu_ps(x.as_ptr()), _mm256_set1_ps(factor));
        _mm_storeu_si128(out.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
    }
    out
}

/// Elements of `a` and `b` in turn: of their first halves, and of their second.
///
/// # Safety
/// The machine has SSE2, as every x86-64 processor.
#[inline(always)]
pub(crate) unsafe fn interleave(a: &[u16; 8], b: &[u16; 8]) -> [[u16; 8]; 2] {
    let mut out = [[0; 8]; 2];
    // SAFETY: all arrays have 8 elements.
    unsafe {
        let (a, b) = (_mm_loadu_si128(a.as_ptr().cast()), _mm_loadu_si128(b.as_ptr().cast()));
        _mm_storeu_si128(out[0].as_mut_ptr().cast(), _mm_unpacklo_epi16(a, b));
        _mm_storeu_si128(out[1].as_mut_ptr().cast(), _mm_unpackhi_epi16(a, b));
    }
    out
}

/// See [`crate::fast_product`].
///
/// # Safety
/// The machine has AVX512-FP16; [`product::check_product`] holds, and `lhs` is as long as it says.
#[target_feature(enable = "avx512f,avx512bw,avx512fp16,avx2,fma,f16c")]
pub(crate) unsafe fn product(
    lhs: FastLhs<'_>,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &mut Window<'_>,
    scratch: &mut [f32],
) {
    // SAFETY: the same contract.
    unsafe { product::product::<Lanes16>(&Fp16(lhs), rhs, epilogue, y, scratch) }
}

struct Fp16<'a>(FastLhs<'a>);

impl PanelSums for Fp16<'_> {
    #[inline(always)]
    unsafe fn panel_sums(&self, panel: &[f16], _wide: &mut [f32], sums: &mut [f32]) {
        let FastLhs { scales, k, .. } = self.0;
        let group_len = fp16::group_len(k);
        let groups = scales.len().div_ceil(ROWS);
        let tiles = groups.div_ceil(TILE_GROUPS);
        let tile_rows = groups.div_ceil(tiles) * ROWS;
        let ahead_rows = CHAIN.div_ceil(tiles);
        // SAFETY: the contract of the trait and of `product`. A tile gets what `panel_sums` promises it.
        unsafe {
            fp16::panel_sums::<Lanes16>(self.0, panel, sums, (tile_rows, L1_BLOCK), |t, x, k, w, sums| {
                let x = Groups { x, len: group_len };
                let ahead = L1_BLOCK + t * ahead_rows..L1_BLOCK + (t + 1) * ahead_rows;
                match sums.len().div_ceil(ROWS * PANEL) {
                    1 => tile::<1, true>(x, k, w, ahead, sums),
                    2 => tile::<2, true>(x, k, w, ahead, sums),
                    3 if tiles <= 2 => tile::<3, true>(x, k, w, ahead, sums),
                    3 => tile::<3, false>(x, k, w, ahead, sums),
                    groups => unreachable!("a tile of {groups} groups"),
                }
            });
        }
    }
}

/// Packed groups of rows, `len` elements apart.
#[derive(Clone, Copy)]
struct Groups {
    x: *const u16,
    len: usize,
}

impl Groups {
    /// # Safety
    /// There are as many elements.
    #[inline(always)]
    unsafe fn add(self, n: usize) -> Self {
        // SAFETY: the contract above.
        Groups { x: unsafe { self.x.add(n) }, ..self }
    }
}

/// The register tile: adds the products of `k` inputs to rows of 32 sums.
///
/// # Safety
/// The machine has AVX512-FP16; `x` is at the start of a block of `G` groups, which have the rows of `sums` together and `k` more inputs,
/// as has `w`. `ahead`: see [`chain`].
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512fp16")]
unsafe fn tile<const G: usize, const STEADY: bool>(
    mut x: Groups,
    k: usize,
    mut w: *const f16,
    ahead: Range<usize>,
    sums: &mut [f32],
) {
    // SAFETY: the contract above. A block of n inputs has 8 scales and 8 n activations a group, and n rows of the panel.
    unsafe {
        for start in (0..k).step_by(BLOCK) {
            let block = BLOCK.min(k - start);
            let mut acc = chain::<G, STEADY>(x.add(ROWS), w, block.min(CHAIN), ahead.clone());
            if block > CHAIN {
                let second = chain::<G, STEADY>(
                    x.add(ROWS * (1 + CHAIN)),
                    w.add(PANEL * CHAIN),
                    block - CHAIN,
                    ahead.clone(),
                );
                for (acc, second) in acc.as_flattened_mut().iter_mut().zip(second.as_flattened()) {
                    *acc = _mm512_add_ph(*acc, *second);
                }
            }
            let mut scales = [[0.0; ROWS]; G];
            for (g, scales) in scales.iter_mut().enumerate() {
                let group = _mm256_cvtph_ps(_mm_loadu_si128(x.x.add(g * x.len).cast()));
                _mm256_storeu_ps(scales.as_mut_ptr(), group);
            }
            // The vectors go through memory, from where their halves are converted 1.5 % faster.
            let mut saved = [[_mm512_setzero_si512(); ROWS]; G];
            for (saved, acc) in saved.as_flattened_mut().iter_mut().zip(acc.as_flattened()) {
                *saved = _mm512_castph_si512(*acc);
            }
            let saved = black_box(&saved).as_flattened();
            for ((sums, saved), scale) in
                sums.as_chunks_mut::<PANEL>().0.iter_mut().zip(saved).zip(scales.as_flattened())
            {
                let scale = Lanes16::splat(*scale);
                let saved: *const f16 = (&raw const *saved).cast();
                for at in [0, LANES] {
                    let sum = sums.as_mut_ptr().add(at);
                    Lanes16::widen(saved.add(at)).fma(scale, Lanes16::load(sum)).store(sum);
                }
            }
            x = x.add(ROWS * (1 + block));
            w = w.add(PANEL * block);
        }
    }
}

/// The sums of `k` products in FP16. It first prefetches the rows `ahead`, counted from `w`: the loop of a full tile has no load to spare.
/// Few rows wait for memory, which delivers more where, with `STEADY`, the next block is prefetched row by row.
///
/// # Safety
/// The machine has AVX512-FP16; each group of `x` has `8 * k` elements, `w` `k` rows.
#[inline(always)]
unsafe fn chain<const G: usize, const STEADY: bool>(
    x: Groups,
    w: *const f16,
    k: usize,
    ahead: Range<usize>,
) -> [[__m512h; ROWS]; G] {
    // SAFETY: the contract above; i < k. The assembly is a comment.
    unsafe {
        let mut acc = [[_mm512_setzero_ph(); ROWS]; G];
        if !STEADY {
            for i in ahead {
                Lanes16::prefetch_l2(w.wrapping_add(i * PANEL).cast());
            }
        }
        let mut groups: [*const u16; G] = std::array::from_fn(|g| x.x.add(g * x.len));
        for i in 0..k {
            if STEADY {
                Lanes16::prefetch_l2(w.wrapping_add((L1_BLOCK + i) * PANEL).cast());
            }
            let w = _mm512_castsi512_ph(_mm512_loadu_si512(w.add(PANEL * i).cast()));
            for (x, acc) in groups.iter_mut().zip(&mut acc) {
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_epi16(x.add(r).cast::<i16>().read());
                    *acc = _mm512_fmadd_ph(_mm512_castsi512_ph(x), w, *acc);
                }
                // Keeps a register for each group: with addresses of a base and an index a multiply-add is two operations to
                // the processor, and tiles are 4 to 6 % slower.
                asm!("/* {} */", inout(reg) x.add(ROWS) => *x, options(readonly, nostack, preserves_flags));
            }
        }
        acc
    }
}

/// Runs `iterations` rounds of independent FP16 multiply-adds in registers; the number of floating-point operations.
///
/// # Safety
/// The machine has AVX512-FP16.
#[target_feature(enable = "avx512f,avx512bw,avx512fp16")]
pub(crate) unsafe fn peak(iterations: u64) -> u64 {
    // As many chains as the register tile has accumulators.
    const CHAINS: usize = TILE_GROUPS * ROWS;
    let number = |x: f32| {
        _mm512_castsi512_ph(_mm512_set1_epi16(black_box(f16::from_f32_const(x)).to_bits().cast_signed()))
    };
    // x = x / 2 + 1 tends to 2.
    let (factor, summand, start) = (number(0.5), number(1.0), number(0.0));
    let mut x = [start; CHAINS];
    for _ in 0..iterations {
        for x in &mut x {
            *x = _mm512_fmadd_ph(*x, factor, summand);
        }
    }
    black_box(x);
    iterations * (CHAINS * PANEL * 2) as u64
}
