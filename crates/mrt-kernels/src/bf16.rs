//! The fast lane of AVX512-BF16: `vdpbf16ps` multiplies two pairs of BF16 numbers and adds both products to an f32.
//!
//! Weights that came from BF16 convert back without loss (FP16 holds them exactly, or rounded them once before);
//! activations are rounded to BF16's 8 bits, as PyTorch does in BF16. A panel is converted once per block: rows k and
//! k + 1 become one row of 32 pairs. Subnormal numbers count as zero, in and out: so the instruction is defined.
//!
//! Attention rounds queries, keys, the weights of its softmax and values; the softmax and all sums are f32.

use std::arch::x86_64::*;
use std::hint::black_box;

use half::{bf16, f16};

use crate::attention::{self, AttentionProducts, KvGroup};
use crate::avx512;
use crate::fast::{FastLhs, fast_stride};
use crate::lanes::Lanes;
use crate::panel::{LANES, PANEL};
use crate::product::{self, Epilogue, K_BLOCK, PanelSums, Rhs, Sums, start_from_bias};
use crate::window::Window;

/// As on the processors that this lane is for.
type Lanes16 = avx512::Lanes16<false>;

/// Fewer rows are bound by memory: exact products are as fast.
pub(crate) const LEAST_ROWS: usize = 8;

/// Rows of the register tile, as in `avx512.rs`: 24 accumulators, two pairs of weights, activations broadcast from memory.
const TILE_ROWS: usize = 12;

pub(crate) fn is_detected() -> bool {
    is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw")
}

/// Rounds a row to BF16, nearest even, and fills `out` up with zeros. Nothing is scaled: BF16 has f32's range.
///
/// # Safety
/// The machine has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) unsafe fn pack_row(x: &[f32], out: &mut [u16]) -> f32 {
    let (x16, x_rest) = x.as_chunks::<LANES>();
    for (x, out) in x16.iter().zip(out.as_chunks_mut::<LANES>().0) {
        // SAFETY: both chunks hold 16 elements.
        unsafe {
            let narrow = _mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr()));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), std::mem::transmute::<__m256bh, __m256i>(narrow));
        }
    }
    let rest = x_rest.iter().map(|&x| bf16::from_f32(x).to_bits()).chain(std::iter::repeat(0));
    out[x16.len() * LANES..].iter_mut().zip(rest).for_each(|(out, x)| *out = x);
    1.0
}

/// See [`crate::fast_product`].
///
/// # Safety
/// The machine has AVX512-BF16; [`product::check_product`] holds, and `lhs` is as long as it says.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(crate) unsafe fn product(
    lhs: FastLhs<'_>,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &mut Window<'_>,
    scratch: &mut [f32],
) {
    // SAFETY: the same contract.
    unsafe { product::product::<Lanes16>(&Bf16(lhs), rhs, epilogue, y, scratch) }
}

struct Bf16<'a>(FastLhs<'a>);

impl PanelSums for Bf16<'_> {
    #[inline(always)]
    unsafe fn panel_sums(&self, panel: &[f16], wide: &mut [f32], sums: &mut [f32]) {
        let FastLhs { x, scales, k } = self.0;
        // SAFETY: the contract of the trait, whose `wide` holds twice as many elements, and of `product`.
        unsafe {
            start_from_bias::<Lanes16>(panel, sums);
            let x = Rows { x: x.as_ptr(), stride: fast_stride(k) };
            let sums = Sums::of(sums, PANEL);
            add_products::<{ 2 * K_BLOCK }>(scales.len(), x, k, panel.as_ptr().add(PANEL), wide, sums);
        }
    }
}

/// See [`crate::fast_attention`].
///
/// # Safety
/// The machine has AVX512-BF16, and [`attention::check`] holds.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(crate) unsafe fn attention(group: KvGroup<'_>, out: &mut Window<'_>, scratch: &mut [f32]) {
    // SAFETY: the same contract.
    unsafe { attention::attend::<Lanes16, Bf16Attention>(group, out, scratch) }
}

struct Bf16Attention;

impl AttentionProducts for Bf16Attention {
    type Rows = Rows;

    #[inline(always)]
    unsafe fn queries(queries: &[f32], k: usize, room: &mut [f32]) -> Rows {
        let stride = k.next_multiple_of(2);
        let room = room.as_mut_ptr().cast::<u16>();
        for (r, x) in queries.chunks_exact(k).enumerate() {
            // SAFETY: `room` holds 2 * k numbers of 16 bits for each row, and `stride` is no more.
            unsafe { pack_row(x, std::slice::from_raw_parts_mut(room.add(r * stride), stride)) };
        }
        Rows { x: room, stride }
    }

    #[inline(always)]
    unsafe fn weights(weights: &mut [f32], stride: usize) -> Rows {
        // SAFETY: the same contract.
        unsafe { narrow_in_place(weights, stride) };
        Rows { x: weights.as_ptr().cast(), stride: 2 * stride }
    }

    #[inline(always)]
    unsafe fn add(rows: usize, x: Rows, k: usize, panel: *const f16, wide: &mut [f32], sums: Sums) {
        // SAFETY: the contract of the trait; a block of attention is shorter than `wide`.
        unsafe { add_products::<{ attention::BLOCK }>(rows, x, k, panel, wide, sums) }
    }
}

/// Rounds rows of f32, `stride` apart, each to the first half of its place.
///
/// # Safety
/// The machine has AVX512-BF16; `stride` is a multiple of 16.
#[inline(always)]
pub(crate) unsafe fn narrow_in_place(rows: &mut [f32], stride: usize) {
    for row in rows.chunks_exact_mut(stride) {
        let from = row.as_mut_ptr();
        let to = from.cast::<__m256i>();
        for i in 0..stride / LANES {
            // SAFETY: 16 elements of the row are read; what is written begins at 32 * i of its bytes, before what is
            // still to be read, at 64 * (i + 1).
            unsafe {
                let narrow = _mm512_cvtneps_pbh(_mm512_loadu_ps(from.add(i * LANES)));
                _mm256_storeu_si256(to.add(i), std::mem::transmute::<__m256bh, __m256i>(narrow));
            }
        }
    }
}

/// Rounds 32 numbers.
///
/// # Safety
/// The machine has AVX512-BF16; both have 32 elements.
#[inline(always)]
pub(crate) unsafe fn narrow_32(x: *const f32, out: *mut u16) {
    // SAFETY: the contract above; both types are 512 bits.
    unsafe {
        let narrow = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x.add(LANES)), _mm512_loadu_ps(x));
        _mm512_storeu_si512(out.cast(), std::mem::transmute::<__m512bh, __m512i>(narrow));
    }
}

/// Rows of BF16 numbers, `stride` apart.
#[derive(Clone, Copy)]
struct Rows {
    x: *const u16,
    stride: usize,
}

/// Continues the sums of `rows` rows with `k` inputs, `BLOCK` of them at a time.
///
/// # Safety
/// The machine has AVX512-BF16; `x` has `rows` rows of `k` elements, and a zero after them if `k` is odd; `panel` has `k`
/// rows, `sums` has `rows` rows of 32; `wide` holds `BLOCK` rows of 16.
#[inline(always)]
unsafe fn add_products<const BLOCK: usize>(
    rows: usize,
    x: Rows,
    k: usize,
    panel: *const f16,
    wide: &mut [f32],
    sums: Sums,
) {
    let tiles = rows.div_ceil(TILE_ROWS);
    let pairs = wide.as_mut_ptr().cast::<__m512i>();
    for start in (0..k).step_by(BLOCK) {
        let block = BLOCK.min(k - start);
        // SAFETY: the contract above: start + block <= k; half as many rows of 32 pairs, 4 bytes each, fit into `wide`; rows
        // first .. end are rows of `x` and of the sums.
        unsafe {
            pair_up(panel.add(start * PANEL), block, block, pairs);
            let ahead = panel.wrapping_add((start + block) * PANEL);
            for t in 0..tiles {
                let (first, end) = (t * rows / tiles, (t + 1) * rows / tiles);
                let x = Rows { x: x.x.add(first * x.stride + start), ..x };
                let sums = sums.after(start).skip_rows(first);
                tile_rows(end - first, x, block.div_ceil(2), pairs, ahead, sums);
            }
        }
    }
}

/// Runs `iterations` rounds of independent `vdpbf16ps` in registers; the number of floating-point operations, as
/// [`crate::fma_peak`] counts them.
///
/// # Safety
/// The machine has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) unsafe fn peak(iterations: u64) -> u64 {
    // As many chains as the register tile has accumulators.
    const CHAINS: usize = 2 * TILE_ROWS;
    // One of two BF16 numbers in each pair is 1, the other -1: sums stay what they are, and none is subnormal.
    let ones = _mm512_set1_epi32(black_box(0xbf80_3f80u32.cast_signed()));
    // SAFETY: both types are 512 bits, any of which are BF16 numbers.
    let (a, b) = unsafe {
        let b = _mm512_set1_epi32(black_box(0x3f80_3f80));
        (std::mem::transmute::<__m512i, __m512bh>(ones), std::mem::transmute::<__m512i, __m512bh>(b))
    };
    let mut sums = [_mm512_set1_ps(black_box(1.0)); CHAINS];
    for _ in 0..iterations {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, a, b);
        }
    }
    black_box(sums);
    iterations * (CHAINS * LANES * 4) as u64
}

/// Converts `rows` rows of a panel to BF16, two at a time, and zeros after them up to `end` rows: element n of a row of pairs is
/// (w[k][n], w[k + 1][n]).
///
/// # Safety
/// The machine has AVX512-BF16; `panel` has `rows` rows, `pairs` room for half of `end`, rounded up, of two vectors.
#[inline(always)]
pub(crate) unsafe fn pair_up(panel: *const f16, rows: usize, end: usize, pairs: *mut __m512i) {
    for i in (0..end).step_by(2) {
        // SAFETY: the contract above.
        unsafe { pair(panel.wrapping_add(i * PANEL), rows.saturating_sub(i), pairs.add(i)) };
    }
}

/// Makes one row of pairs of two rows, of which there may be fewer: zeros stand for the others.
///
/// # Safety
/// The machine has AVX512-BF16; `row` has as many rows, `pairs` room for two vectors.
#[inline(always)]
pub(crate) unsafe fn pair(row: *const f16, rows: usize, pairs: *mut __m512i) {
    // SAFETY: the contract above.
    unsafe {
        // Lane n of the result takes element n of the first half, then of the second.
        let order = _mm512_add_epi16(
            _mm512_set1_epi32(16 << 16),
            _mm512_mullo_epi32(
                _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                _mm512_set1_epi32(0x1_0001),
            ),
        );
        for g in 0..2 {
            let mut wide = [_mm512_setzero_ps(); 2];
            for (r, wide) in wide.iter_mut().enumerate().take(rows) {
                *wide = _mm512_cvtph_ps(_mm256_loadu_si256(row.add(r * PANEL + g * LANES).cast()));
            }
            let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(wide[1], wide[0]));
            _mm512_storeu_si512(pairs.add(g), _mm512_permutexvar_epi16(order, both));
        }
    }
}

/// [`tile`] with a height known only at run time, at most [`TILE_ROWS`].
///
/// # Safety
/// As `tile`, for that many rows.
#[inline(always)]
unsafe fn tile_rows(rows: usize, x: Rows, pairs: usize, b: *const __m512i, ahead: *const f16, sums: Sums) {
    macro_rules! heights {
        ($($r:literal)+) => {
            match rows {
                // SAFETY: the same contract.
                $($r => unsafe { tile::<$r>(x, pairs, b, ahead, sums) },)+
                _ => unreachable!("a tile of {rows} rows"),
            }
        };
    }
    heights!(1 2 3 4 5 6 7 8 9 10 11 12)
}

/// The register tile: adds the products of `pairs` pairs of inputs to `R` rows of 32 sums, and prefetches as many rows of a
/// panel at `ahead`, any address.
///
/// # Safety
/// The machine has AVX512-BF16; `x` has `R` rows of `2 * pairs` elements; `b` has `pairs` rows of two vectors; `sums` has
/// `R` rows of `PANEL` elements.
#[inline(always)]
unsafe fn tile<const R: usize>(x: Rows, pairs: usize, b: *const __m512i, ahead: *const f16, sums: Sums) {
    // SAFETY: the contract above; r < R, i < pairs.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 2]; R];
        if !sums.fresh {
            for (r, row) in acc.iter_mut().enumerate() {
                *row = [0, LANES].map(|at| _mm512_loadu_ps(sums.y.add(r * sums.stride + at)));
            }
        }
        for i in 0..pairs {
            Lanes16::prefetch_l2(ahead.wrapping_add(2 * i * PANEL).cast());
            Lanes16::prefetch_l2(ahead.wrapping_add((2 * i + 1) * PANEL).cast());
            let w: [__m512bh; 2] = [0, 1]
                .map(|g| std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.add(2 * i + g))));
            for (r, row) in acc.iter_mut().enumerate() {
                let pair = x.x.add(r * x.stride + 2 * i).cast::<i32>().read_unaligned();
                let pair: __m512bh = std::mem::transmute(_mm512_set1_epi32(pair));
                for (sum, w) in row.iter_mut().zip(w) {
                    *sum = _mm512_dpbf16_ps(*sum, pair, w);
                }
            }
        }
        for (r, row) in acc.iter().enumerate() {
            for (sum, at) in row.iter().zip([0, LANES]) {
                _mm512_storeu_ps(sums.y.add(r * sums.stride + at), *sum);
            }
        }
    }
}
