//! AVX-512: 16 lanes in one 512-bit register.
//!
//! Of 32 registers the 12 × 16 tile takes 12 for accumulators, 1 for the right-hand side and 1 for the broadcast: 12
//! independent chains cover FMA's latency of 4 cycles at two a cycle. Few rows over short panels take twice as many, for both halves of a panel.
//!
//! With `INTEL` all tiles do, of 12 × 32: units of 512 bits begin two multiply-adds a cycle, and loads are as many, so a load
//! has to serve two. Zen 4 has units of 256 bits.

use std::arch::x86_64::*;

use half::f16;

use crate::isa::Kind;
use crate::lanes::{F16_MAX, Lanes};

#[derive(Clone, Copy)]
pub(crate) struct Lanes16<const INTEL: bool>(__m512);

impl<const INTEL: bool> Lanes for Lanes16<INTEL> {
    const KIND: Kind = if INTEL { Kind::Avx512Intel } else { Kind::Avx512 };
    const TILE_ROWS: usize = 12;
    const WIDE_TILES: bool = INTEL;
    const DIRECT_ROWS: usize = 12;
    /// The conversion costs a tile of 12 rows nothing on Zen 4: 48 rows reach 110 GFLOP/s of 117, and 101 with widened
    /// blocks and tiles of 12 × 32. On Emerald Rapids, where it takes a multiply-add's place, 512 rows reach 105 so, and 160 of
    /// 174 with those.
    const WIDENED_ROWS: usize = if INTEL { Self::TILE_ROWS + 1 } else { usize::MAX };
    /// A loop of its own waits for the L2 cache to take what it writes. On Emerald Rapids products of 32 rows are 12 % slower with
    /// it, of 128 rows 4 %; with AVX2 those of 128 rows are 3 % faster.
    const WIDENED_BY_TILE: bool = INTEL;
    /// Blocks are widened less often, and Emerald Rapids' L2 cache has 2 MiB: when a loop of its own widened them, prefill of 512 tokens was
    /// 7 to 8 % faster with 256 than with 64, 3 % than with 128 or 512.
    const PASS_ROWS: usize = if INTEL { 256 } else { 64 };
    /// On Emerald Rapids one panel at a time gives one row half of the bandwidth, and 5 % less than all of it if lines do not go past
    /// the L2 cache. 8 rows take 1.1 times as long as one; 12 would be a fifth slower so.
    const STREAMED_ROWS: usize = if INTEL { 8 } else { 0 };

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller promises the instruction set.
        Lanes16(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller promises the instruction set and 16 readable f32.
        Lanes16(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn widen(p: *const f16) -> Self {
        // SAFETY: the caller promises the instruction set and 16 readable FP16.
        Lanes16(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the value proves the instruction set; the caller promises room for 16 f32.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn narrow(self, p: *mut f16) {
        // SAFETY: the value proves the instruction set; the caller promises room for 16 FP16.
        unsafe {
            let v = self.min(Self::splat(F16_MAX)).max(Self::splat(-F16_MAX));
            _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0));
        }
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        // SAFETY: a `Lanes16` exists only where AVX-512 does (see `Lanes`); so in all methods below.
        Lanes16(unsafe { _mm512_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        Lanes16(unsafe { _mm512_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        Lanes16(unsafe { _mm512_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        Lanes16(unsafe { _mm512_div_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: as in `add`.
        Lanes16(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        Lanes16(unsafe { _mm512_max_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        Lanes16(unsafe { _mm512_min_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: every x86-64 processor has the instruction, which only hints and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    /// On Emerald Rapids 8 rows are 3 % faster than with 24, one row is as fast.
    #[inline(always)]
    fn stream_block(_rows: usize) -> usize {
        48
    }
    /// Past the L2 cache, which need not evict anything for it: on Zen 4 one thread decodes 3 % faster than with `prefetch`.
    #[inline(always)]
    fn prefetch_once(p: *const u8) {
        // SAFETY: as in `prefetch`.
        unsafe { _mm_prefetch::<_MM_HINT_NTA>(p.cast()) }
    }
    #[inline(always)]
    fn prefetch_l2(p: *const u8) {
        // SAFETY: as in `prefetch`.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    fn shift_to_exponent(self) -> Self {
        // SAFETY: as in `add`.
        Lanes16(unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(self.0))) })
    }
}
