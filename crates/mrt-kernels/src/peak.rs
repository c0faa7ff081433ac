//! The rate at which the machine can multiply and add: what the products are measured against.

use std::hint::black_box;

use crate::isa::{Isa, dispatch};
use crate::lanes::Lanes;
use crate::panel::LANES;

/// Runs `iterations` rounds of independent fused multiply-adds in registers, without memory, and returns the number
/// of floating-point operations, two per lane and multiply-add. Who takes the time has the f32 FMA peak of a core.
pub fn fma_peak(isa: Isa, iterations: u64) -> u64 {
    dispatch!(isa, chains(iterations: u64) -> u64)
}

/// As many chains as the GEMM tile has accumulators: they fill the registers, and there are more of them than an FMA
/// unit's latency times the number of units (4 × 2 on x86-64 cores, counted in native registers).
#[inline(always)]
unsafe fn chains<L: Lanes>(iterations: u64) -> u64 {
    // SAFETY: the instruction set is `dispatch!`'s promise.
    unsafe { if L::TILE_GROUPS == 2 { rounds::<L, 24>(iterations) } else { rounds::<L, 6>(iterations) } }
}

#[inline(always)]
unsafe fn rounds<L: Lanes, const CHAINS: usize>(iterations: u64) -> u64 {
    // x = x / 2 + 1 tends to 2: no infinities or subnormal numbers, which can be slower.
    // SAFETY: the instruction set is the caller's promise.
    let (factor, summand, start) =
        unsafe { (L::splat(black_box(0.5)), L::splat(black_box(1.0)), L::splat(black_box(0.0))) };
    let mut x = [start; CHAINS];
    for _ in 0..iterations {
        for x in &mut x {
            *x = x.fma(factor, summand);
        }
    }
    for x in x {
        black_box(x.to_array());
    }
    iterations * (CHAINS * LANES * 2) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_counted_in_whole_rounds() {
        for isa in Isa::supported() {
            let round = fma_peak(isa, 1);
            assert!(round == 6 * 16 * 2 || round == 24 * 16 * 2);
            assert_eq!(fma_peak(isa, 1000), 1000 * round);
        }
    }
}
