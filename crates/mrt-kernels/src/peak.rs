//! What the machine can do at best with these vectors, which the products are measured against: read, and multiply
//! and add.

use std::hint::black_box;

use crate::fast::FastLane;
use crate::isa::{Isa, dispatch};
use crate::lanes::Lanes;
use crate::panel::LANES;

/// Runs `iterations` rounds of independent fused multiply-adds in registers, without memory, and returns the number
/// of floating-point operations, two per lane and multiply-add. Who takes the time has the f32 FMA peak of a core.
pub fn fma_peak(isa: Isa, iterations: u64) -> u64 {
    dispatch!(isa, chains(iterations: u64) -> u64)
}

/// The same of a fast lane's unit; none where it is not known how to measure it.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables, reason = "no lane's peak is measured there"))]
pub fn fast_peak(lane: FastLane, iterations: u64) -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a lane is proof of detection.
    return Some(unsafe {
        match lane.0 {
            crate::fast::Lane::Bf16 => crate::bf16::peak(iterations),
            crate::fast::Lane::Amx => crate::amx::peak(iterations),
            crate::fast::Lane::Fp16 => crate::fp16_avx512::peak(iterations),
        }
    });
    #[cfg(not(target_arch = "x86_64"))]
    None
}

/// Reads all of `x` once, in order, and returns its greatest element (which element of a NaN is not specified). Who
/// takes the time has the read bandwidth of a core with one sequence of addresses.
pub fn read_peak(isa: Isa, x: &[f32]) -> f32 {
    dispatch!(isa, greatest(x: &[f32]) -> f32)
}

/// The same, reading four quarters of `x` in turn: faster by a quarter on Zen 3.
pub fn read_peak_in_turn(isa: Isa, x: &[f32]) -> f32 {
    dispatch!(isa, greatest_in_turn(x: &[f32]) -> f32)
}

/// As many chains as the GEMM tile has accumulators: more than an FMA unit's latency times the number of units (4 × 2 on
/// x86-64 cores, counted in native registers).
#[inline(always)]
unsafe fn chains<L: Lanes>(iterations: u64) -> u64 {
    // SAFETY: the instruction set is `dispatch!`'s promise.
    unsafe { if L::TILE_ROWS == 12 { rounds::<L, 12>(iterations) } else { rounds::<L, 6>(iterations) } }
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

#[inline(always)]
unsafe fn greatest<L: Lanes>(x: &[f32]) -> f32 {
    // SAFETY: the instruction set is `dispatch!`'s promise.
    unsafe { greatest_of::<L, false>(x) }
}

#[inline(always)]
unsafe fn greatest_in_turn<L: Lanes>(x: &[f32]) -> f32 {
    // SAFETY: the instruction set is `dispatch!`'s promise.
    unsafe { greatest_of::<L, true>(x) }
}

/// Takes four vectors a round: the next ones, or one of each quarter of `x`.
#[inline(always)]
unsafe fn greatest_of<L: Lanes, const IN_TURN: bool>(x: &[f32]) -> f32 {
    let (vectors, rest) = x.as_chunks::<LANES>();
    let rounds = vectors.len() / 4;
    let (vectors, last) = vectors.split_at(4 * rounds);
    // SAFETY: the instruction set is the caller's promise.
    let mut max = unsafe { [L::splat(f32::NEG_INFINITY); 4] };
    for i in 0..rounds {
        for (p, max) in max.iter_mut().enumerate() {
            let vector = if IN_TURN { p * rounds + i } else { 4 * i + p };
            // SAFETY: both are below 4 * rounds, the vectors; the instruction set as above.
            *max = max.max(unsafe { L::load(vectors.as_ptr().add(vector).cast()) });
        }
    }
    let greatest = max.into_iter().reduce(L::max).map_or(f32::NEG_INFINITY, |max| max.tree(f32::max));
    last.as_flattened().iter().chain(rest).copied().fold(greatest, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_read() {
        for isa in Isa::variants() {
            for peak in [read_peak, read_peak_in_turn] {
                assert_eq!(peak(isa, &[]), f32::NEG_INFINITY);
                let mut x = [-1.0; 200];
                for i in 0..200 {
                    x[i] = 1.0;
                    assert_eq!(peak(isa, &x), 1.0);
                    x[i] = -1.0;
                }
                assert_eq!(peak(isa, &x), -1.0);
            }
        }
    }

    #[test]
    fn operations_are_counted_in_whole_rounds() {
        for isa in Isa::variants() {
            let round = fma_peak(isa, 1);
            assert!(round == 6 * 16 * 2 || round == 12 * 16 * 2);
            assert_eq!(fma_peak(isa, 1000), 1000 * round);
            for lane in FastLane::supported(isa) {
                assert_eq!(fast_peak(lane, 1000), fast_peak(lane, 1).map(|round| 1000 * round));
            }
        }
    }
}
