//! The operations of a forward pass: each cuts its work into parts, and hands the parts to the kernels.

use mrt_kernels::f16;
use mrt_kernels::{
    Epilogue, FAST_ROWS, FastLane, FastLhs, Isa, KvGroup, Lhs, Numerics, PANEL, Rhs, Window, fast_len,
    panel_count, panel_len,
};

use crate::kv_cache::{KvShape, v_row};
use crate::pool::{Blocks, Chunks, PerWorker, Pool};

/// Parts a thread, where one row's work is enough for them: the more, the less a join waits for a thread that is slowed
/// down. With more rows parts are smaller, as a panel takes longer.
const PARTS_PER_THREAD: usize = 16;

/// The most panels of a part, where there are other threads: two megabytes or so, a fraction of a millisecond. With half of it
/// two threads read the LM head 3 % slower on Zen 4.
const MAX_PART_PANELS: usize = 32;

/// Panels that a part of up to [`mrt_kernels::streamed_rows`] rows has at least, where each thread has as many: four runs of some length.
const STREAMED_PANELS: usize = 6;

/// Rows of attention scores (query heads of a KV group times tokens) that share one pass over keys and values.
const ATTENTION_ROWS: usize = 48;

/// Looks `tokens` up: row t of `out` (`hidden` wide) is column `tokens[t]` of the embedding's panels.
pub(crate) fn embed(panels: &[f16], tokens: &[u32], hidden: usize, out: &mut [f32], pool: &mut Pool) {
    pool.run_split(Chunks::new(out, hidden), |_, t, row| {
        mrt_kernels::gather_column(panels, tokens[t] as usize, row);
    });
}

/// RMSNorm of each row of `x`.
pub(crate) fn rms_norm(isa: Isa, x: &[f32], weight: &[f16], eps: f32, out: &mut [f32], pool: &mut Pool) {
    let n = weight.len();
    // A row takes a tenth of a microsecond: what decoding needs is done before another thread would have begun.
    let rows = 16;
    pool.run_split(Chunks::new(out, rows * n), |_, i, out| {
        for (x, out) in x[i * rows * n..].chunks_exact(n).zip(out.chunks_exact_mut(n)) {
            mrt_kernels::rms_norm(isa, x, weight, eps, out);
        }
    });
}

/// How products with weights are computed, and the memory that they need.
pub(crate) struct Products<'a> {
    pub isa: Isa,
    pub numerics: Numerics,
    /// Working memory of the threads, `[threads][worker_len]`.
    pub workers: &'a mut [f32],
    pub worker_len: usize,
    /// Activations as a fast lane wants them, `fast_len(batch, inputs)`, and the scale of each row.
    pub packed: &'a mut [u16],
    pub scales: &'a mut [f32],
}

impl Products<'_> {
    /// The fast lane, where it was asked for and is faster with that many rows.
    fn lane(&self, rows: usize) -> Option<FastLane> {
        match self.numerics {
            Numerics::Fast(lane) => Some(lane).filter(|lane| lane.takes(rows)),
            Numerics::Exact => None,
        }
    }
}

/// `out = epilogue(lhs * panels)`, the columns of `out` spread over the threads.
pub(crate) fn linear(
    products: &mut Products<'_>,
    lhs: Lhs<'_>,
    panels: &[f16],
    epilogue: Epilogue,
    out: Window<'_>,
    pool: &mut Pool,
) {
    let lane = products.lane(lhs.rows);
    let rows = match lane {
        // It makes pairs of a panel's weights, once for all rows.
        Some(_) => lhs.rows,
        None => lhs.rows.div_ceil(lhs.rows.div_ceil(mrt_kernels::pass_rows(products.isa))),
    };
    let least = match lane {
        Some(lane) => lane.least_panels(),
        None if lhs.rows <= mrt_kernels::streamed_rows(products.isa) => STREAMED_PANELS,
        None => 1,
    };
    let panels_of_part = panels_of_part(panel_count(out.columns()), least, rows, pool.threads());
    let blocks = Blocks::new(out, rows, panels_of_part * PANEL);
    let across = blocks.across();
    let rhs = Rhs::weights(panels, lhs.k);
    let rhs = |i: usize| rhs.from_panel(i % across * panels_of_part * epilogue.panels_per_output());
    let split = (blocks, PerWorker::new(products.workers, products.worker_len));
    match lane {
        Some(lane) => {
            let lhs = pack(lane, lhs, products.packed, products.scales, pool);
            pool.run_split(split, |_, i, (mut out, scratch)| {
                mrt_kernels::fast_product(lane, lhs, rhs(i), epilogue, &mut out, scratch);
            });
        }
        None => pool.run_split(split, |_, i, (mut out, scratch)| {
            let lhs = Lhs { x: &lhs.x[i / across * rows * lhs.stride..], rows: out.rows(), ..lhs };
            mrt_kernels::panel_product(products.isa, lhs, rhs(i), epilogue, &mut out, scratch);
        }),
    }
}

/// How many of `panels` panels make a part of `rows` rows, `least` of them where each thread has as many.
fn panels_of_part(panels: usize, least: usize, rows: usize, threads: usize) -> usize {
    // One thread waits for nobody, and decodes with 4 to 5 % more of the bandwidth on Zen 3 than in parts.
    if threads == 1 {
        return panels;
    }
    let share = panels.div_ceil(threads);
    let parts = (share / least).clamp(1, PARTS_PER_THREAD * rows);
    share.div_ceil(parts).min(MAX_PART_PANELS)
}

/// Rounds the rows of `lhs` for a fast lane.
fn pack<'a>(
    lane: FastLane,
    lhs: Lhs<'_>,
    packed: &'a mut [u16],
    scales: &'a mut [f32],
    pool: &mut Pool,
) -> FastLhs<'a> {
    let rows = FAST_ROWS;
    let packed = &mut packed[..fast_len(lhs.rows, lhs.k)];
    let scales = &mut scales[..lhs.rows];
    let split = (Chunks::new(packed, fast_len(rows, lhs.k)), Chunks::new(scales, rows));
    pool.run_split(split, |_, i, (out, scales)| {
        let rows = i * rows..i * rows + scales.len();
        mrt_kernels::pack_fast_rows(lane, lhs, rows, out, scales);
    });
    FastLhs { x: packed, scales, k: lhs.k }
}

/// What attention needs to know of a chunk of tokens.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    /// Sizes of the KV cache.
    pub kv: KvShape,
    /// Query heads of a KV head.
    pub group: usize,
    /// Tokens of the chunk.
    pub tokens: usize,
    /// Position of the first token.
    pub start: usize,
}

impl Heads {
    /// Width of a row of Q, K and V.
    fn qkv(&self) -> usize {
        (self.group + 2) * self.kv.heads * self.kv.head_dim
    }

    /// Elements of the queries of one KV group: `[tokens][group][head_dim]`.
    fn q_group(&self) -> usize {
        self.tokens * self.group * self.kv.head_dim
    }

    /// Tokens, and query heads of a group, that share one pass over keys and values: as many as leave work for `threads`
    /// threads, of at most so many rows. Only of a single token are they fewer heads than the group has.
    fn tile(&self, threads: usize, rows: usize) -> (usize, usize) {
        let groups = self.kv.heads * self.tokens;
        let tokens = (groups / threads).clamp(1, tile_tokens(self.group, rows));
        let parts = (threads / groups).clamp(1, self.group);
        (tokens, self.group.div_ceil(parts))
    }
}

fn tile_tokens(group: usize, rows: usize) -> usize {
    (rows / group).max(1)
}

/// Elements of scratch that a worker needs for [`attention`].
pub(crate) fn attention_scratch_len(kv: &KvShape, group: usize, batch: usize) -> usize {
    let rows = tile_tokens(group, ATTENTION_ROWS).min(batch) * group;
    mrt_kernels::attention_scratch_len(rows, kv.head_dim, kv.context)
}

/// Rotates Q and K of each token (`cos` and `sin`: `[tokens][head_dim / 2]`), writes the rotated queries, already
/// multiplied by 1 / sqrt(head_dim), to `q` as `[kv head][token][head of the group][head_dim]`, and keys and values
/// to the cache.
pub(crate) fn rope_and_store(
    isa: Isa,
    heads: Heads,
    qkv: &[f32],
    (cos, sin): (&[f32], &[f32]),
    q: &mut [f32],
    (k, v): (&mut [f16], &mut [f16]),
    pool: &mut Pool,
) {
    let Heads { kv, group, tokens, start } = heads;
    let d = kv.head_dim;
    let q_scale = 1.0 / (d as f32).sqrt();
    let split = (
        Chunks::new(&mut q[..kv.heads * heads.q_group()], heads.q_group()),
        (Chunks::new(k, kv.k_head_len()), Chunks::new(v, kv.v_head_len())),
    );
    pool.run_split(split, |_, g, (q, (k, v))| {
        let mut rotated = [0.0; 512];
        let rotated = &mut rotated[..d];
        for t in 0..tokens {
            let row = &qkv[t * heads.qkv()..][..heads.qkv()];
            let (cos, sin) = (&cos[t * d / 2..][..d / 2], &sin[t * d / 2..][..d / 2]);
            for h in 0..group {
                let out = &mut q[(t * group + h) * d..][..d];
                mrt_kernels::rope(isa, &row[(g * group + h) * d..][..d], cos, sin, q_scale, out);
            }
            let (row_k, row_v) = row[group * kv.heads * d..].split_at(kv.heads * d);
            mrt_kernels::rope(isa, &row_k[g * d..][..d], cos, sin, 1.0, rotated);
            let position = start + t;
            let panel = &mut k[position / PANEL * panel_len(d)..][..panel_len(d)];
            mrt_kernels::store_k_lane(isa, rotated, panel, position % PANEL);
            for (j, values) in row_v[g * d..][..d].chunks(PANEL).enumerate() {
                mrt_kernels::store_v_row(isa, values, v_row(&kv, v, j, position));
            }
        }
    });
}

/// Causal attention of a chunk's queries (as [`rope_and_store`] leaves them) over the cached keys and values of one
/// layer. `out` is `[tokens][head][head_dim]`, the heads of a group side by side.
pub(crate) fn attention(
    products: &mut Products<'_>,
    heads: Heads,
    q: &[f32],
    (k, v): (&[f16], &[f16]),
    out: &mut [f32],
    pool: &mut Pool,
) {
    let isa = products.isa;
    let Heads { kv, group, tokens, start } = heads;
    let lane = products.lane(tokens).filter(|lane| lane.attends());
    let (d, group_width) = (kv.head_dim, group * kv.head_dim);
    // More rows where the lane wants them, as far as there is room: what they need grows with the positions.
    let room = |&rows: &usize| {
        mrt_kernels::attention_scratch_len(rows.max(group), d, start + tokens) <= products.worker_len
    };
    let most = lane.map_or(0, FastLane::attention_rows);
    let rows = (ATTENTION_ROWS..=most).rev().find(room).unwrap_or(ATTENTION_ROWS);
    let (tile, part_heads) = heads.tile(pool.threads(), rows);
    // Where parts may be smaller than a group, each group is a row, so that no part has heads of two.
    let (rows, width) =
        if tile == 1 { (tokens * kv.heads, group_width) } else { (tokens, kv.heads * group_width) };
    let blocks = Blocks::new(Window::new(out, rows, width, width), tile, part_heads * d);
    let parts = group.div_ceil(part_heads);
    let workers = PerWorker::new(products.workers, products.worker_len);
    pool.run_split((blocks, workers), |_, i, (mut out, scratch)| {
        let (tile_and_group, head) = (i / parts, i % parts * part_heads);
        let (first, g) = (tile_and_group / kv.heads * tile, tile_and_group % kv.heads);
        let group = KvGroup {
            queries: &q[g * heads.q_group() + first * group_width + head * d..],
            heads: out.columns() / d,
            head_dim: d,
            seen: start + first + 1,
            keys: Rhs { panels: &k[g * kv.k_head_len()..][..kv.k_head_len()], stride: panel_len(d) },
            values: Rhs { panels: &v[g * kv.v_head_len()..][..kv.v_head_len()], stride: kv.v_panel_len() },
        };
        match lane {
            Some(lane) => mrt_kernels::fast_attention(lane, group, &mut out, scratch),
            None => mrt_kernels::attention(isa, group, &mut out, scratch),
        }
    });
}
