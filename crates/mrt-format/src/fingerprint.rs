//! The layout fingerprint: the digest of a small arena, which writer, reader and specification must agree on.

use std::io;

use crate::config::Qwen2Config;
use crate::digest::{Digest, sha256};
use crate::layout::qwen2_weights_layout;
use crate::pack::{Counts, PackScratch, SourceDtype, TensorSource, pack_arena_range};
use crate::source::{qwen2_source_count, qwen2_source_tensors};

/// The config that is packed: no size is a multiple of 32, and Q, K and V meet inside a panel.
pub(crate) const FINGERPRINT_CONFIG: Qwen2Config = Qwen2Config {
    hidden_size: 40,
    intermediate_size: 72,
    num_layers: 2,
    num_heads: 6,
    num_kv_heads: 2,
    head_dim: 6,
    vocab_size: 70,
    max_position_embeddings: 128,
    rms_norm_eps: 1e-6,
    rope_theta: 1e6,
    tie_word_embeddings: false,
};

/// What [`layout_fingerprint`] computes, and what the header of every file of format version 1 holds.
pub const LAYOUT_FINGERPRINT: Digest = Digest([
    0xa4, 0x0b, 0xc8, 0xcd, 0xaa, 0x6a, 0x11, 0xab, 0x7f, 0x63, 0x42, 0xb7, 0x90, 0x42, 0x6b, 0x82, 0xdd,
    0x75, 0x85, 0xa0, 0x20, 0x18, 0x1d, 0x7a, 0xeb, 0x4e, 0xb2, 0xf2, 0x88, 0x74, 0xc5, 0xf9,
]);

/// Packs the pseudo-random BF16 tensors of a small config and returns the SHA-256 of the arena.
///
/// It depends on the whole of the layout and of packing: order, panels, biases, interleaving, padding,
/// rounding.
pub fn layout_fingerprint() -> Digest {
    let cfg = &FINGERPRINT_CONFIG;
    let layout = qwen2_weights_layout(cfg);
    let mut arena = vec![0; layout.arena_bytes as usize];
    let mut counts = vec![Counts::default(); qwen2_source_count(cfg)];
    pack_arena_range(
        cfg,
        &layout,
        &RandomSource::new(cfg),
        0,
        &mut arena,
        &mut counts,
        &mut PackScratch::new(),
    )
    .expect("all values are finite and small");
    sha256(&arena)
}

/// BF16 tensors whose elements, numbered through all tensors in order, come from a SplitMix64 generator of
/// seed 0.
struct RandomSource {
    /// Number of the first element of each tensor.
    first: Vec<u64>,
}

impl RandomSource {
    fn new(cfg: &Qwen2Config) -> RandomSource {
        let mut end = 0;
        let first = qwen2_source_tensors(cfg).into_iter().map(|tensor| {
            end += tensor.elements();
            end - tensor.elements()
        });
        RandomSource { first: first.collect() }
    }
}

/// Output `i` (from 0) of SplitMix64 with seed 0 (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014).
fn splitmix64(i: u64) -> u64 {
    let z = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// A BF16 value with sign and mantissa from the low bits of `z` and an exponent from 2^-27 to 2^12, so that
/// some values are exact in FP16, some round and some flush to zero.
fn bf16_bits(z: u64) -> u16 {
    let exponent = 100 + ((z >> 32) % 40) as u16;
    z as u16 & 0x807f | exponent << 7
}

impl TensorSource for RandomSource {
    fn dtype(&self, _index: usize) -> SourceDtype {
        SourceDtype::Bf16
    }

    fn read(&self, index: usize, byte_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let first = self.first[index] + byte_offset / 2;
        for (i, bytes) in (first..).zip(buf.as_chunks_mut::<2>().0) {
            *bytes = bf16_bits(splitmix64(i)).to_le_bytes();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_constant_is_the_computed_value() {
        assert_eq!(layout_fingerprint(), LAYOUT_FINGERPRINT);
    }

    #[test]
    fn generator() {
        // Published outputs of SplitMix64 for seed 0.
        assert_eq!([0, 1, 2].map(splitmix64), [0xe220a8397b1dcdaf, 0x6e789e6aa1b965f4, 0x06c45d188009454f]);
    }
}
