//! The reference: 16 lanes as an array. The compiler turns it into whatever the target has.

use half::f16;

use crate::isa::Kind;
use crate::lanes::{F16_MAX, Lanes};

#[derive(Clone, Copy)]
pub(crate) struct Lanes16([f32; 16]);

impl Lanes16 {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Lanes16(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

impl Lanes for Lanes16 {
    const KIND: Kind = Kind::Portable;
    const TILE_ROWS: usize = 4;
    const DIRECT_ROWS: usize = 2;
    const WIDENED_ROWS: usize = Self::TILE_ROWS + 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Lanes16([x; 16])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller promises 16 readable f32.
        Lanes16(unsafe { p.cast::<[f32; 16]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn widen(p: *const f16) -> Self {
        // SAFETY: the caller promises 16 readable FP16.
        let h = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        Lanes16(std::array::from_fn(|i| widen(h[i])))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller promises room for 16 f32.
        unsafe { p.cast::<[f32; 16]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn narrow(self, p: *mut f16) {
        // SAFETY: plain numbers; the caller promises room for 16 FP16.
        unsafe {
            let v = self.min(Self::splat(F16_MAX)).max(Self::splat(-F16_MAX));
            p.cast::<[f16; 16]>().write_unaligned(v.0.map(f16::from_f32_const));
        }
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        Lanes16(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        self.zip(b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        self.zip(b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn shift_to_exponent(self) -> Self {
        Lanes16(self.0.map(|x| f32::from_bits(x.to_bits() << 23)))
    }
}

/// FP16 to f32, exactly: the significand and exponent are moved into place and rescaled by a power of two, which
/// makes subnormals normal; infinities and NaNs get f32's largest exponent.
#[inline(always)]
fn widen(h: u16) -> f32 {
    const RESCALE: f32 = f32::from_bits((127 + 112) << 23); // 2^112, the difference of the exponent biases
    let magnitude = u32::from(h & 0x7fff) << 13;
    let finite = (f32::from_bits(magnitude) * RESCALE).to_bits();
    let bits = if magnitude >= 0x7c00 << 13 { magnitude | 0x7f80_0000 } else { finite };
    f32::from_bits(bits | u32::from(h & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_fp16_number() {
        for h in 0..=u16::MAX {
            let (want, got) = (f16::from_bits(h).to_f32_const(), widen(h));
            assert!(want.to_bits() == got.to_bits() || want.is_nan() && got.is_nan(), "{h:#06x}");
        }
    }
}
