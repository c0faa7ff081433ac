//! The vector that all kernels are written over: 16 lanes of f32.

use half::f16;

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
    /// Rows of the GEMM register tile: as many as leave room for the right-hand side in the register file.
    const TILE_ROWS: usize;
    /// Width of the GEMM register tile, in vectors of 16 columns: 1 or 2.
    const TILE_GROUPS: usize;
    /// Rows up to which the registers hold all 32 columns of a panel beside its widened FP16 row.
    const DIRECT_ROWS: usize;

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
    /// Clamps to ±[`F16_MAX`], rounds to nearest even and writes 16 consecutive FP16 numbers.
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
    /// The larger; which of two zeros, or what of a NaN, is not specified.
    fn max(self, b: Self) -> Self;
    /// The smaller; which of two zeros, or what of a NaN, is not specified.
    fn min(self, b: Self) -> Self;
    /// The bits of each lane moved left by 23, from the low end of the significand into the exponent.
    fn shift_to_exponent(self) -> Self;

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
