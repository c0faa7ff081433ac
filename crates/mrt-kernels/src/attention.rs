//! Causal attention of some tokens' query heads over one KV head, whose keys and values are panels.
//!
//! Exact, in three steps: all scores of a row, their softmax, the weighted sum of the values as one chain in ascending
//! positions. Positions can therefore not be divided among threads; tokens and KV heads can. What a row does not see has
//! weight 0, which changes no sum: the cache holds finite numbers only.

use crate::isa::{Isa, dispatch};
use crate::lanes::Lanes;
use crate::panel::{LANES, PANEL, panel_count, panel_len};
use crate::product::{K_BLOCK, Left, Rhs, Sums, add_products};
use crate::rows::softmax_lanes;
use crate::window::{Window, span};

/// Positions of a V panel that all rows go through before the next ones: 16 KiB of FP16, or of half the columns widened,
/// which stay in the L1 cache.
const V_BLOCK: usize = 256;

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

/// Elements of scratch that [`attention`] needs for that many rows (tokens times heads of the group) and `positions`
/// that the last token sees.
pub const fn attention_scratch_len(rows: usize, positions: usize) -> usize {
    rows.saturating_mul(row_stride(positions).saturating_add(PANEL + 1)).saturating_add(K_BLOCK * LANES)
}

/// `out[token][head] = sum over positions of softmax(query . key) * value`, `out` having the tokens as rows and the heads
/// of the group side by side as columns. (Vaswani et al., "Attention Is All You Need", 2017.)
///
/// # Panics
/// If `seen` is 0, `out` has other columns than the heads, a slice is shorter than its sizes say, or `scratch` has fewer
/// than [`attention_scratch_len`] elements.
pub fn attention(isa: Isa, group: KvGroup<'_>, out: &mut Window<'_>, scratch: &mut [f32]) {
    let KvGroup { queries, heads, head_dim, seen, keys, values } = group;
    if out.rows() == 0 || out.columns() == 0 {
        return;
    }
    assert!(seen > 0 && heads.checked_mul(head_dim) == Some(out.columns()));
    let (rows, positions) = (out.rows() * heads, seen.saturating_add(out.rows() - 1));
    assert!(rows * head_dim <= queries.len(), "queries shorter than their sizes");
    let keys_len = span(panel_count(positions), keys.stride, panel_len(head_dim));
    let values_len = span(panel_count(head_dim), values.stride, panel_len(positions));
    assert!(keys_len <= keys.panels.len() && values_len <= values.panels.len(), "too few panels");
    assert!(scratch.len() >= attention_scratch_len(rows, positions), "scratch too short");
    dispatch!(isa, attend(group: KvGroup<'_>, out: &mut Window<'_>, scratch: &mut [f32]))
}

/// [`attention`], whose assertions are this function's safety contract.
#[inline(always)]
unsafe fn attend<L: Lanes>(group: KvGroup<'_>, out: &mut Window<'_>, scratch: &mut [f32]) {
    let KvGroup { queries, heads, head_dim, seen, keys, values } = group;
    let (rows, positions) = (out.rows() * heads, seen + out.rows() - 1);
    let (wide, scratch) = scratch.split_at_mut(K_BLOCK * LANES);
    let (sums, scratch) = scratch.split_at_mut(rows * PANEL);
    let stride = row_stride(positions);
    let (scores, scratch) = scratch.split_at_mut(rows * stride);
    let factors = &mut scratch[..rows];
    scores.fill(0.0);
    // SAFETY: the panels have the rows that are read of them, by the contract; the queries have `rows` rows of `head_dim`,
    // the scores `rows` rows of whole panels of positions, the sums `rows` rows of 32.
    unsafe {
        let x = Left { x: queries.as_ptr(), stride: head_dim };
        for j in 0..panel_count(positions) {
            let panel = &keys.panels[j * keys.stride..];
            let sums = Sums { y: scores.as_mut_ptr().add(j * PANEL), stride };
            add_products::<L>(rows, x, head_dim, panel.as_ptr().add(PANEL), wide, sums);
        }
        for (r, (row, factor)) in scores.chunks_exact_mut(stride).zip(&mut *factors).enumerate() {
            let (row, future) = row.split_at_mut(seen + r / heads);
            *factor = 1.0 / softmax_lanes::<L>(row);
            future.fill(0.0);
        }
        for j in 0..panel_count(head_dim) {
            let panel = &values.panels[j * values.stride..];
            sums.fill(0.0);
            for start in (0..positions).step_by(V_BLOCK) {
                let x = Left { x: scores.as_ptr().add(start), stride };
                let panel = panel.as_ptr().add((1 + start) * PANEL);
                let sums = Sums { y: sums.as_mut_ptr(), stride: PANEL };
                add_products::<L>(rows, x, V_BLOCK.min(positions - start), panel, wide, sums);
            }
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
    use half::f16;

    use super::*;
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

    /// Queries `[token][head][d]`, K panels and V panels with room for `positions` positions.
    struct Case {
        q: Vec<f32>,
        k: Vec<f16>,
        v: Vec<f16>,
    }

    fn case(rows: usize, d: usize, positions: usize) -> Case {
        let panels = |count: usize, k: usize| {
            let mut panels: Vec<f16> =
                noise(k + count, count * panel_len(k)).into_iter().map(|x| f16::from_f32(2.0 * x)).collect();
            panels.chunks_exact_mut(panel_len(k)).for_each(|panel| panel[..PANEL].fill(f16::ZERO));
            panels
        };
        let (k, v) = (panels(panel_count(positions), d), panels(panel_count(d), positions));
        Case { q: noise(rows, rows * d), k, v }
    }

    /// By the contract's words: a chain of multiply-adds for each score and each sum, the softmax of what is seen.
    fn naive(case: &Case, heads: usize, d: usize, seen: usize, positions: usize) -> Vec<f32> {
        let mut out = Vec::new();
        for (r, q) in case.q.chunks_exact(d).enumerate() {
            let seen = seen + r / heads;
            let mut scores: Vec<f32> = (0..seen)
                .map(|p| {
                    let panel = &case.k[p / PANEL * panel_len(d) + PANEL..];
                    (0..d).fold(0.0, |sum, i| q[i].mul_add(panel[i * PANEL + p % PANEL].to_f32(), sum))
                })
                .collect();
            let total = softmax(Isa::PORTABLE, &mut scores);
            out.extend((0..d).map(|j| {
                let panel = &case.v[j / PANEL * panel_len(positions) + PANEL..];
                let sum = scores.iter().enumerate().fold(0.0f32, |sum, (p, weight)| {
                    weight.mul_add(panel[p * PANEL + j % PANEL].to_f32(), sum)
                });
                sum * (1.0 / total)
            }));
        }
        out
    }

    #[test]
    fn every_instruction_set_equals_the_naive_chains() {
        for (tokens, heads, d, seen) in [
            (1, 1, 1, 1),
            (1, 7, 64, 31),
            (1, 7, 64, 300),
            (1, 12, 40, 257),
            (2, 7, 64, 511),
            (6, 7, 64, 250),
            (5, 3, 33, 30),
            (40, 1, 320, 1),
        ] {
            let (rows, last) = (tokens * heads, seen + tokens - 1);
            for room in [0, 50] {
                let case = case(rows, d, last + room);
                let want = naive(&case, heads, d, seen, last + room);
                for isa in Isa::supported() {
                    let group = KvGroup {
                        queries: &case.q,
                        heads,
                        head_dim: d,
                        seen,
                        keys: Rhs { panels: &case.k, stride: panel_len(d) },
                        values: Rhs { panels: &case.v, stride: panel_len(last + room) },
                    };
                    let mut out = vec![f32::NAN; rows * d];
                    let mut scratch = vec![f32::NAN; attention_scratch_len(rows, last)];
                    let mut window = Window::new(&mut out, tokens, heads * d, heads * d);
                    attention(isa, group, &mut window, &mut scratch);
                    assert!(out == want, "{} tokens {tokens} heads {heads} d {d} seen {seen}", isa.name());
                }
            }
        }
    }
}
