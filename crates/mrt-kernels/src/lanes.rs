//! The vector that all kernels are written over: 16 lanes of f32.

use half::f16;

use crate::isa::Kind;
use crate::panel::{LANES, PANEL};

/// The largest finite FP16 number. What goes into the KV cache is clamped to it, so that an outlier saturates
/// instead of becoming an infinity.
pub(crate) const F16_MAX: f32 = 65504.0;

/// 16 lanes of f32 in as many registers as the instruction set needs.
///
/// All arithmetic is IEEE 754 binary32, rounded to nearest even, lane by lane; `fma` is fused. That is the whole
/// reason why every instruction set gives the same bits.
///
/// A value exists only where its instruction set does: the constructors are `unsafe` and demand it, and
/// arithmetic on values is safe because a value is the proof.
pub(crate) trait Lanes: Copy {
    /// The instruction set.
    const KIND: Kind;
    /// Rows of the GEMM register tile.
    const TILE_ROWS: usize;
    /// Whether the tile takes all 32 columns of a panel. If not, it takes 16.
    const WIDE_TILES: bool = false;
    /// Rows up to which the registers hold the sums of all 32 columns of a panel.
    const DIRECT_ROWS: usize;
    /// Rows from which a block of a panel is widened to f32 once for all tiles. With fewer, each tile converts FP16 for itself.
    const WIDENED_ROWS: usize;
    /// Whether the first tile widens the block as it goes. If not, a loop of its own does before.
    const WIDENED_BY_TILE: bool = false;
    /// Rows that pass over the panels together where a product has more: 1024 inputs of 64 rows are 256 KiB, half of a small L2
    /// cache, and stay there.
    const PASS_ROWS: usize = 64;
    /// Inputs (k) that [`Lanes::tile_steps`] takes at a time.
    const K_STEP: usize = 1;
    /// How many rows ahead a panel is fetched that is read in one pass. With AVX-512 on Zen 4 one thread decodes a tenth slower
    /// with 16, 5 % slower with 96.
    const PREFETCH_ROWS: usize = 64;
    /// Rows up to which a product reads several panels at a time (`streams`). With AVX2 on Zen 3, and on Emerald Rapids, that is
    /// faster; with AVX-512 on Zen 4 one thread then decodes a tenth slower.
    const STREAMED_ROWS: usize = 0;

    /// Inputs of a panel that so many rows multiply before those of the next panel, and how many inputs ahead they are fetched.
    fn stream_block(_rows: usize) -> usize {
        unreachable!("products of this instruction set read one panel at a time")
    }

    /// All lanes `x`.
    /// # Safety
    /// The machine has this instruction set.
    unsafe fn splat(x: f32) -> Self;
    /// 16 consecutive f32.
    /// # Safety
    /// The machine has this instruction set; `p` may be read for 16 f32. No alignment is needed.
    unsafe fn load(p: *const f32) -> Self;
    /// 16 consecutive FP16 numbers, converted exactly.
    /// # Safety
    /// The machine has this instruction set; `p` may be read for 16 FP16. No alignment is needed.
    unsafe fn widen(p: *const f16) -> Self;
    /// Writes 16 consecutive f32.
    /// # Safety
    /// `p` may be written for 16 f32. No alignment is needed.
    unsafe fn store(self, p: *mut f32);
    /// Clamps to ±[`F16_MAX`], NaN to [`F16_MAX`], rounds to nearest even and writes 16 consecutive FP16 numbers.
    /// # Safety
    /// `p` may be written for 16 FP16. No alignment is needed.
    unsafe fn narrow(self, p: *mut f16);

    /// `self + b`
    fn add(self, b: Self) -> Self;
    /// `self - b`
    fn sub(self, b: Self) -> Self;
    /// `self * b`
    fn mul(self, b: Self) -> Self;
    /// `self / b`
    fn div(self, b: Self) -> Self;
    /// `self * b + c`, rounded once.
    fn fma(self, b: Self, c: Self) -> Self;
    /// The larger; `b` if one of them is NaN. Which of two zeros is not specified.
    fn max(self, b: Self) -> Self;
    /// The smaller; `b` if one of them is NaN. Which of two zeros is not specified.
    fn min(self, b: Self) -> Self;
    /// The bits of each lane moved left by 23, from the low end of the significand into the exponent.
    fn shift_to_exponent(self) -> Self;

    /// Hints that the cache line at `p`, any address, will be read soon.
    #[inline(always)]
    fn prefetch(_p: *const u8) {}

    /// Hints that the cache line at `p`, any address, will be read soon, and not again for long.
    #[inline(always)]
    fn prefetch_once(p: *const u8) {
        Self::prefetch(p);
    }

    /// Hints that the cache line at `p`, any address, will be read later: the L2 cache is near enough.
    #[inline(always)]
    fn prefetch_l2(_p: *const u8) {}

    /// Adds the products of one input to the `R` rows of `16 * G` sums of a register tile.
    /// # Safety
    /// The machine has this instruction set; `x` has `R` elements, `x_stride` apart; `b` has `16 * G` elements.
    #[inline(always)]
    unsafe fn tile_step<E: Element, const R: usize, const G: usize>(
        acc: &mut [[Self; G]; R],
        x: *const f32,
        x_stride: usize,
        b: *const E,
    ) {
        // SAFETY: the same contract.
        unsafe { fma_rows(acc, x, x_stride, b) }
    }

    /// [`tile_step`](Lanes::tile_step) for `K_STEP` inputs, one after the other.
    /// # Safety
    /// As `tile_step`, for `K_STEP` consecutive elements of each row of `x` and as many rows of `b`, `E::stride::<G>()` apart.
    #[inline(always)]
    unsafe fn tile_steps<E: Element, const R: usize, const G: usize>(
        acc: &mut [[Self; G]; R],
        x: *const f32,
        x_stride: usize,
        b: *const E,
    ) {
        for i in 0..Self::K_STEP {
            // SAFETY: the contract above; i < K_STEP.
            unsafe { Self::tile_step(acc, x.add(i), x_stride, b.add(i * E::stride::<G>())) };
        }
    }

    /// The lanes as an array.
    #[inline(always)]
    fn to_array(self) -> [f32; 16] {
        let mut a = [0.0; 16];
        // SAFETY: `a` has room for 16 f32.
        unsafe { self.store(a.as_mut_ptr()) };
        a
    }

    /// The lanes combined by the one tree of the numerics contract: lane j with lane j + 8, then + 4, + 2, + 1.
    #[inline(always)]
    fn tree(self, combine: impl Fn(f32, f32) -> f32) -> f32 {
        let mut a = self.to_array();
        for half in [8, 4, 2, 1] {
            for j in 0..half {
                a[j] = combine(a[j], a[j + half]);
            }
        }
        a[0]
    }
}

/// [`Lanes::tile_step`] in the order that the compiler chooses.
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn fma_rows<L: Lanes, E: Element, const R: usize, const G: usize>(
    acc: &mut [[L; G]; R],
    x: *const f32,
    x_stride: usize,
    b: *const E,
) {
    // SAFETY: the contract above; r < R, g < G.
    unsafe {
        let mut w = [L::splat(0.0); G];
        for (g, w) in w.iter_mut().enumerate() {
            *w = E::lanes(b.add(g * LANES));
        }
        for (r, row) in acc.iter_mut().enumerate() {
            let x = L::splat(*x.add(r * x_stride));
            for (sum, w) in row.iter_mut().zip(w) {
                *sum = x.fma(w, *sum);
            }
        }
    }
}

/// An element type of the right-hand side of a product: FP16 panels, or panels widened to f32.
pub(crate) trait Element: Copy {
    /// Elements from one row of a right-hand side of `16 * G` columns to the next.
    fn stride<const G: usize>() -> usize;
    /// 16 elements as f32.
    /// # Safety
    /// As `Lanes::load`.
    unsafe fn lanes<L: Lanes>(p: *const Self) -> L;
}

impl Element for f32 {
    /// What is widened lies by itself.
    #[inline(always)]
    fn stride<const G: usize>() -> usize {
        G * LANES
    }
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(p: *const f32) -> L {
        // SAFETY: the same contract.
        unsafe { L::load(p) }
    }
}

impl Element for f16 {
    #[inline(always)]
    fn stride<const G: usize>() -> usize {
        PANEL
    }
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(p: *const f16) -> L {
        // SAFETY: the same contract.
        unsafe { L::widen(p) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, dispatch};

    #[inline(always)]
    unsafe fn widen_16<L: Lanes>(h: &[f16; 16]) -> [f32; 16] {
        // SAFETY: 16 elements; the instruction set is `dispatch!`'s promise.
        unsafe { L::widen(h.as_ptr()).to_array() }
    }

    #[inline(always)]
    unsafe fn narrow_16<L: Lanes>(x: &[f32; 16]) -> [f16; 16] {
        let mut h = [f16::ZERO; 16];
        // SAFETY: 16 elements each; the instruction set is `dispatch!`'s promise.
        unsafe { L::load(x.as_ptr()).narrow(h.as_mut_ptr()) };
        h
    }

    #[test]
    fn every_fp16_number_widens_exactly() {
        for isa in Isa::variants() {
            for start in (0..=u16::MAX).step_by(16) {
                let h: &[f16; 16] = &std::array::from_fn(|i| f16::from_bits(start + i as u16));
                let got: [f32; 16] = dispatch!(isa, widen_16(h: &[f16; 16]) -> [f32; 16]);
                for (h, got) in h.iter().zip(got) {
                    let want = h.to_f32_const();
                    assert!(
                        want.to_bits() == got.to_bits() || want.is_nan() && got.is_nan(),
                        "{} {:#06x}",
                        isa.name(),
                        h.to_bits()
                    );
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn larger_and_smaller<L: Lanes>(a: &[f32; 16], b: &[f32; 16]) -> [[f32; 16]; 2] {
        let mut out = [[0.0; 16]; 2];
        // SAFETY: the instruction set is `dispatch!`'s promise; the arrays hold 16.
        unsafe {
            let (a, b) = (L::load(a.as_ptr()), L::load(b.as_ptr()));
            a.max(b).store(out[0].as_mut_ptr());
            a.min(b).store(out[1].as_mut_ptr());
        }
        out
    }

    #[test]
    fn the_larger_and_the_smaller_are_the_same_everywhere() {
        let numbers = [0.0, -0.0, 1.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 2.0];
        for isa in Isa::variants() {
            for x in numbers {
                let (a, b) = (&[x; 16], &std::array::from_fn(|i| numbers[i % numbers.len()]));
                let [larger, smaller] =
                    dispatch!(isa, larger_and_smaller(a: &[f32; 16], b: &[f32; 16]) -> [[f32; 16]; 2]);
                for (i, &b) in b.iter().enumerate() {
                    let want = [if x > b { x } else { b }, if x < b { x } else { b }];
                    let same = |x: f32, y: f32| x == y || x.is_nan() && y.is_nan();
                    assert!(same(larger[i], want[0]), "{} {x} {b}", isa.name());
                    assert!(same(smaller[i], want[1]), "{} {x} {b}", isa.name());
                }
            }
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even_and_saturates() {
        for isa in Isa::variants() {
            // Each FP16 number, the midpoint above it, and the numbers on both sides of the midpoint.
            for bits in 0..0x7c00 {
                let low = f16::from_bits(bits).to_f32_const();
                let high = if bits == 0x7bff { 65536.0 } else { f16::from_bits(bits + 1).to_f32_const() };
                let middle = (low + high) / 2.0;
                let x = [low, middle.next_down(), middle, middle.next_up()];
                let x: &[f32; 16] = &std::array::from_fn(|i| if i < 8 { x[i % 4] } else { -x[i % 4] });
                let got: [f16; 16] = dispatch!(isa, narrow_16(x: &[f32; 16]) -> [f16; 16]);
                for (x, got) in x.iter().zip(got) {
                    let want = f16::from_f32_const(x.clamp(-F16_MAX, F16_MAX));
                    assert_eq!(want.to_bits(), got.to_bits(), "{} {x}", isa.name());
                }
            }
            for x in [1e9, f32::INFINITY, f32::NAN, -f32::NAN] {
                let x: &[f32; 16] = &[x; 16];
                let got: [f16; 16] = dispatch!(isa, narrow_16(x: &[f32; 16]) -> [f16; 16]);
                assert_eq!(got, [f16::MAX; 16]);
            }
        }
    }
}
