//! Causal attention of some tokens' query heads over one KV head, whose keys and values are panels.
//!
//! Exact, in three steps: all scores of a row, their softmax, the weighted sum of the values as one chain in ascending
//! positions. Positions can therefore not be divided among threads; tokens and KV heads can. What a row does not see has
//! weight 0, which changes no sum: the cache holds finite numbers only. A fast lane may have the two products computed its
//! own way.

use std::marker::PhantomData;

use half::f16;

use crate::isa::{Isa, dispatch};
use crate::lanes::Lanes;
use crate::panel::{LANES, PANEL, panel_count, panel_len};
use crate::product::{K_BLOCK, Left, Rhs, Sums, add_products};
use crate::rows::softmax_lanes;
use crate::window::{Window, span};

/// Inputs of a panel that all rows go through before the next ones: 16 KiB of 16-bit numbers or of half the columns widened, 32
/// KiB of all, which stay in the L1 cache.
pub(crate) const BLOCK: usize = 256;

/// What attention reads: the queries of one KV group, and the keys and values of its KV head.
#[derive(Clone, Copy)]
pub struct KvGroup<'a> {
    /// `[token][query head of the group][head_dim]`, already multiplied by 1 / sqrt(head_dim).
    pub queries: &'a [f32],
    /// Query heads of the group.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions that the first token sees, itself included; each token after it sees one more. At least 1.
    pub seen: usize,
    /// Panels of 32 positions over `head_dim` inputs. Their biases are not read.
    pub keys: Rhs<'a>,
    /// Panels of 32 dimensions over positions. Their biases are not read.
    pub values: Rhs<'a>,
}

/// Elements from one row of scores to the next: whole panels, and 16 more so that rows do not meet in a cache set.
const fn row_stride(positions: usize) -> usize {
    panel_count(positions).saturating_mul(PANEL).saturating_add(LANES)
}

/// Elements of room for a row of queries in a lane's format: 32 numbers of 16 bits, or as often as many.
const fn room_stride(head_dim: usize) -> usize {
    head_dim.div_ceil(LANES).saturating_mul(LANES)
}

/// Elements of scratch that [`attention`] needs for that many rows (tokens times heads of the group) of `head_dim`, and
/// `positions` that the last token sees.
pub const fn attention_scratch_len(rows: usize, head_dim: usize, positions: usize) -> usize {
    let row = row_stride(positions).saturating_add(PANEL + 1).saturating_add(room_stride(head_dim));
    rows.saturating_mul(row).saturating_add(K_BLOCK * LANES)
}

/// `out[token][head] = sum over positions of softmax(query . key) * value`, `out` having the tokens as rows and the heads
/// of the group side by side as columns. (Vaswani et al., "Attention Is All You Need", 2017.)
///
/// # Panics
/// Unless `out` is empty: if `seen` is 0, `out` has other columns than the heads, a slice is shorter than its sizes say, or
/// `scratch` has fewer than [`attention_scratch_len`] elements.
pub fn attention(isa: Isa, group: KvGroup<'_>, out: &mut Window<'_>, scratch: &mut [f32]) {
    if check(group, out, scratch) {
        dispatch!(isa, exact(group: KvGroup<'_>, out: &mut Window<'_>, scratch: &mut [f32]))
    }
}

/// Demands what attention demands of its slices; whether there is something to compute.
pub(crate) fn check(group: KvGroup<'_>, out: &Window<'_>, scratch: &[f32]) -> bool {
    let KvGroup { queries, heads, head_dim, seen, keys, values } = group;
    if out.rows() == 0 || out.columns() == 0 {
        return false;
    }
    assert!(seen > 0 && heads.checked_mul(head_dim) == Some(out.columns()));
    let (rows, positions) = (out.rows() * heads, seen.saturating_add(out.rows() - 1));
    assert!(rows * head_dim <= queries.len(), "queries shorter than their sizes");
    let keys_len = span(panel_count(positions), keys.stride, panel_len(head_dim));
    let values_len = span(panel_count(head_dim), values.stride, panel_len(positions));
    assert!(keys_len <= keys.panels.len() && values_len <= values.panels.len(), "too few panels");
    assert!(scratch.len() >= attention_scratch_len(rows, head_dim, positions), "scratch too short");
    true
}

/// [`attention`], whose assertions are this function's safety contract.
#[inline(always)]
unsafe fn exact<L: Lanes>(group: KvGroup<'_>, out: &mut Window<'_>, scratch: &mut [f32]) {
    // SAFETY: the same contract.
    unsafe { attend::<L, Exact<L>>(group, out, scratch) }
}

/// How the two products of attention are computed: queries by keys, and weights by values.
pub(crate) trait AttentionProducts {
    /// Rows of a left-hand side.
    type Rows: Copy;

    /// Rows of `k` queries, one after the other. They may be made in `room`, which has 16 elements for
    /// each 16 of a row, or fewer.
    ///
    /// # Safety
    /// The machine has the instruction set. The rows are used no longer than both slices live and nothing writes to `room`.
    unsafe fn queries(queries: &[f32], k: usize, room: &mut [f32]) -> Self::Rows;

    /// Rows of weights, `stride` elements apart. They may be made in place.
    ///
    /// # Safety
    /// As for `queries`; `stride` is a multiple of 16.
    unsafe fn weights(weights: &mut [f32], stride: usize) -> Self::Rows;

    /// Continues the sums of `rows` rows, as [`add_products`] does.
    ///
    /// # Safety
    /// As there, but `wide` holds `K_BLOCK` rows of 16; after `k` elements, if they are an odd number, a row of `x` has a zero.
    unsafe fn add(rows: usize, x: Self::Rows, k: usize, panel: *const f16, wide: &mut [f32], sums: Sums);
}

/// The sums of the numerics contract.
struct Exact<L>(PhantomData<L>);

impl<L: Lanes> AttentionProducts for Exact<L> {
    type Rows = Left;

    #[inline(always)]
    unsafe fn queries(queries: &[f32], k: usize, _room: &mut [f32]) -> Left {
        Left { x: queries.as_ptr(), stride: k }
    }

    #[inline(always)]
    unsafe fn weights(weights: &mut [f32], stride: usize) -> Left {
        Left { x: weights.as_ptr(), stride }
    }

    #[inline(always)]
    unsafe fn add(rows: usize, x: Left, k: usize, panel: *const f16, wide: &mut [f32], sums: Sums) {
        const { assert!(BLOCK * PANEL <= K_BLOCK * LANES) };
        for start in (0..k).step_by(BLOCK) {
            // SAFETY: the contract of `add_products`; rows start .. of the panel are inside it, and columns start .. of `x`;
            // `wide` holds `BLOCK` rows of 32, by the assertion.
            unsafe {
                let x = Left { x: x.x.add(start), ..x };
                let (block, panel) = (BLOCK.min(k - start), panel.add(start * PANEL));
                add_products::<L>(rows, x, block, panel, wide, sums.after(start));
            }
        }
    }
}

/// Attention, with the products of `P`.
///
/// # Safety
/// The machine has the instruction sets of `L` and `P`, and [`check`] holds.
#[inline(always)]
pub(crate) unsafe fn attend<L: Lanes, P: AttentionProducts>(
    group: KvGroup<'_>,
    out: &mut Window<'_>,
    scratch: &mut [f32],
) {
    let KvGroup { queries, heads, head_dim, seen, keys, values } = group;
    let (rows, positions) = (out.rows() * heads, seen + out.rows() - 1);
    let (wide, scratch) = scratch.split_at_mut(K_BLOCK * LANES);
    let (sums, scratch) = scratch.split_at_mut(rows * PANEL);
    let (room, scratch) = scratch.split_at_mut(rows * room_stride(head_dim));
    let stride = row_stride(positions);
    let (scores, scratch) = scratch.split_at_mut(rows * stride);
    let factors = &mut scratch[..rows];
    // SAFETY: the panels have the rows that are read of them, by the contract; the queries have `rows` rows of `head_dim`,
    // the scores `rows` rows of whole panels of positions, the sums `rows` rows of 32.
    unsafe {
        let x = P::queries(&queries[..rows * head_dim], head_dim, room);
        for j in 0..panel_count(positions) {
            let panel = &keys.panels[j * keys.stride..];
            let sums = Sums::fresh(&mut scores[j * PANEL..], stride);
            P::add(rows, x, head_dim, panel.as_ptr().add(PANEL), wide, sums);
        }
        for (r, (row, factor)) in scores.chunks_exact_mut(stride).zip(&mut *factors).enumerate() {
            let (row, future) = row.split_at_mut(seen + r / heads);
            *factor = 1.0 / softmax_lanes::<L>(row);
            future.fill(0.0);
        }
        let x = P::weights(scores, stride);
        for j in 0..panel_count(head_dim) {
            let panel = &values.panels[j * values.stride..];
            P::add(rows, x, positions, panel.as_ptr().add(PANEL), wide, Sums::fresh(sums, PANEL));
            let columns = PANEL.min(head_dim - j * PANEL);
            for (r, (sums, factor)) in sums.chunks_exact(PANEL).zip(&*factors).enumerate() {
                let out = &mut out.row(r / heads)[r % heads * head_dim + j * PANEL..][..columns];
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = sum * factor;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fast::{FastLane, fast_attention};
    use crate::rows::softmax;

    /// Small random numbers, the same for the same seed.
    fn noise(seed: usize, n: usize) -> Vec<f32> {
        let mut s = seed as u32;
        let next = || {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(n).collect()
    }

    #[derive(Clone, Copy)]
    struct Sizes {
        tokens: usize,
        heads: usize,
        d: usize,
        seen: usize,
        /// Positions that there is room for beside those which are seen.
        room: usize,
    }

    fn sizes() -> impl Iterator<Item = Sizes> {
        let sizes = [
            (1, 1, 1, 1),
            (1, 7, 64, 31),
            (1, 7, 64, 300),
            (1, 12, 40, 257),
            (2, 7, 64, 511),
            (7, 7, 64, 250),
            (5, 3, 33, 30),
            (40, 1, 320, 1),
        ];
        sizes
            .into_iter()
            .flat_map(|(tokens, heads, d, seen)| [0, 50].map(|room| Sizes { tokens, heads, d, seen, room }))
    }

    impl Sizes {
        fn rows(self) -> usize {
            self.tokens * self.heads
        }

        fn positions(self) -> usize {
            self.seen + self.tokens - 1 + self.room
        }
    }

    /// Queries `[token][head][d]`, K panels and V panels.
    struct Case {
        sizes: Sizes,
        q: Vec<f32>,
        k: Vec<f16>,
        v: Vec<f16>,
    }

    impl Case {
        fn new(sizes: Sizes) -> Case {
            let panels = |count: usize, k: usize| {
                let numbers = noise(k + count, count * panel_len(k)).into_iter();
                let mut panels: Vec<f16> = numbers.map(|x| f16::from_f32(2.0 * x)).collect();
                panels.chunks_exact_mut(panel_len(k)).for_each(|panel| panel[..PANEL].fill(f16::ZERO));
                panels
            };
            let (d, positions) = (sizes.d, sizes.positions());
            let (k, v) = (panels(panel_count(positions), d), panels(panel_count(d), positions));
            Case { sizes, q: noise(sizes.rows(), sizes.rows() * d), k, v }
        }

        /// What `attention` makes of all tokens, `tile` of them at a time.
        fn run(&self, tile: usize, attention: impl Fn(KvGroup<'_>, &mut Window<'_>, &mut [f32])) -> Vec<f32> {
            let Sizes { tokens, heads, d, seen, .. } = self.sizes;
            let mut out = vec![f32::NAN; self.q.len()];
            for first in (0..tokens).step_by(tile) {
                let tokens = tile.min(tokens - first);
                let group = KvGroup {
                    queries: &self.q[first * heads * d..],
                    heads,
                    head_dim: d,
                    seen: seen + first,
                    keys: Rhs { panels: &self.k, stride: panel_len(d) },
                    values: Rhs { panels: &self.v, stride: panel_len(self.sizes.positions()) },
                };
                let last = seen + first + tokens - 1;
                let mut scratch = vec![f32::NAN; attention_scratch_len(tokens * heads, d, last)];
                let out = &mut out[first * heads * d..];
                attention(group, &mut Window::new(out, tokens, heads * d, heads * d), &mut scratch);
            }
            out
        }

        /// By the contract's words: a chain of multiply-adds for each score and each sum, the softmax of what is seen.
        fn naive(&self) -> Vec<f32> {
            let Sizes { heads, d, seen, .. } = self.sizes;
            let mut out = Vec::new();
            for (r, q) in self.q.chunks_exact(d).enumerate() {
                let mut scores: Vec<f32> = (0..seen + r / heads)
                    .map(|p| {
                        let panel = &self.k[p / PANEL * panel_len(d) + PANEL..];
                        (0..d).fold(0.0, |sum, i| q[i].mul_add(panel[i * PANEL + p % PANEL].to_f32(), sum))
                    })
                    .collect();
                let total = softmax(Isa::PORTABLE, &mut scores);
                out.extend((0..d).map(|j| {
                    let panel = &self.v[j / PANEL * panel_len(self.sizes.positions()) + PANEL..];
                    let sum = scores.iter().enumerate().fold(0.0f32, |sum, (p, weight)| {
                        weight.mul_add(panel[p * PANEL + j % PANEL].to_f32(), sum)
                    });
                    sum * (1.0 / total)
                }));
            }
            out
        }
    }

    fn name(Sizes { tokens, heads, d, seen, .. }: Sizes) -> String {
        format!("{tokens} tokens, {heads} heads of {d}, {seen} positions seen")
    }

    #[test]
    fn every_instruction_set_equals_the_naive_chains() {
        for sizes in sizes() {
            let case = Case::new(sizes);
            let want = case.naive();
            for isa in Isa::variants() {
                let got = case.run(sizes.tokens, |group, out, scratch| attention(isa, group, out, scratch));
                assert!(got == want, "{}: {}", isa.name(), name(sizes));
            }
        }
    }

    /// Lanes that have attention of their own.
    fn lanes() -> impl Iterator<Item = FastLane> {
        Isa::variants().flat_map(FastLane::supported).filter(|lane| lane.attends())
    }

    #[test]
    fn fast_attention_is_near_the_exact_one_and_has_the_same_bits_in_every_tile() {
        for (lane, sizes) in lanes().flat_map(|lane| sizes().map(move |sizes| (lane, sizes))) {
            let case = Case::new(sizes);
            let run = |tile| case.run(tile, |group, out, scratch| fast_attention(lane, group, out, scratch));
            let (got, want) = (run(sizes.tokens), case.naive());
            let square: f64 = want.iter().map(|&x| f64::from(x).powi(2)).sum();
            let error: f64 = got.iter().zip(&want).map(|(x, y)| f64::from(x - y).powi(2)).sum();
            // Queries, keys, weights and values are each rounded to 2^-8 at most.
            assert!((error / square).sqrt() < 4.0 / 256.0, "{}: {}", lane.name(), name(sizes));
            for tile in 1..sizes.tokens {
                assert!(run(tile) == got, "{}: {}, {tile} at a time", lane.name(), name(sizes));
            }
        }
    }

    #[test]
    fn fast_attention_of_what_the_lane_holds_exactly_is_exact() {
        for (lane, sizes) in lanes().flat_map(|lane| sizes().map(move |sizes| (lane, sizes))) {
            let mut case = Case::new(sizes);
            // A score is 0 or -128, a weight 1 or too little to count, a value one of 1 to 7.
            let key = |i: usize| if i.is_multiple_of(5) { -64.0 } else { 0.0 };
            for (r, q) in case.q.chunks_exact_mut(sizes.d).enumerate() {
                q.fill(0.0);
                q[r % sizes.d] = 2.0;
            }
            case.k.iter_mut().enumerate().for_each(|(i, k)| *k = f16::from_f32(key(i)));
            case.v.iter_mut().enumerate().for_each(|(i, v)| *v = f16::from_f32((1 + i % 7) as f32));
            let got = case.run(sizes.tokens, |group, out, scratch| fast_attention(lane, group, out, scratch));
            assert!(got == case.naive(), "{}: {}", lane.name(), name(sizes));
        }
    }
}
