//! The product of the fast lane of AMX-BF16: see [`amx`](crate::amx). While the tiles multiply with a block of one panel, the vector
//! units make pairs of the next block, and finish the sums that are complete.

use std::arch::x86_64::__m512i;
use std::ops::Range;
use std::ptr;

use half::f16;

use crate::amx::{Lanes16, Meanwhile, Rows, Start, TILE_ROWS, Tiles, multiply};
use crate::bf16;
use crate::fast::{FAST_STEP as STEP, FastLhs};
use crate::lanes::Lanes;
use crate::panel::{LANES, PANEL, panel_count};
use crate::product::{Epilogue, K_BLOCK, Rhs, SUMS, Sums, finish};
use crate::window::Window;

/// Steps of 32 inputs that all rows pass over before the next ones: their pairs are 32 KiB, which stay in the L1 cache, as activations
/// are loaded past it.
const BLOCK_STEPS: usize = 16;

/// Bytes of activations that stay in the L2 cache. If there are more, the rows pass over one block of several panels before the next.
const NEAR_BYTES: usize = 1 << 20;

/// Rows before one is finished at which its place in the result is prefetched.
const AHEAD_ROWS: usize = 8;

/// See [`crate::fast_product`].
///
/// # Safety
/// The machine has AMX-BF16 and AVX512-BF16; [`check_product`](crate::product::check_product) holds, and `lhs` is as long as it
/// says.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(crate) unsafe fn product(
    lhs: FastLhs<'_>,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &mut Window<'_>,
    scratch: &mut [f32],
) {
    const BUFFER: usize = BLOCK_STEPS * STEP * LANES;
    const { assert!(2 * BUFFER <= K_BLOCK * PANEL) };
    let (pairs, sums) = scratch.split_at_mut(K_BLOCK * PANEL);
    let buffers = [0, BUFFER].map(|at| pairs[at..].as_mut_ptr().cast::<__m512i>());
    let order = Order::new(&lhs, panel_count(y.columns()), epilogue);
    let x = Rows::packed(lhs.x.as_ptr(), lhs.k);
    let (sums, pairing, finishing) = (sums.as_mut_ptr(), Pairing::NONE, Finishing::NONE);
    let mut vectors = Vectors { order, rhs, epilogue, y, sums, pairing, finishing };
    // SAFETY: the contract above. A buffer has room for the pairs of a block, and `order` uses sums of no more than SUMS panels.
    unsafe {
        let _tiles = Tiles::new();
        let mut next = Some(Block::default());
        vectors.begin_pairs(Block::default(), buffers[0]);
        vectors.pair(usize::MAX);
        for i in 0.. {
            let Some(block) = next else { break };
            next = order.after(block);
            if let Some(next) = next {
                vectors.begin_pairs(next, buffers[(i + 1) % 2]);
            }
            let start = match block.number {
                0 => Start::bias(&rhs.panels[block.panel * rhs.stride..]),
                _ => Start::Sums,
            };
            let x = x.skip_steps(block.number * order.block_steps);
            let sums = Sums { y: vectors.sums_of(block.panel), stride: PANEL, fresh: false };
            multiply(order.rows, x, order.steps_of(block), buffers[i % 2], &start, sums, &mut vectors);
            vectors.pair(usize::MAX);
            if block.number + 1 == order.blocks && (block.panel + 1).is_multiple_of(order.per_output) {
                vectors.finish(usize::MAX);
                vectors.begin_finish(block.panel);
            }
        }
        vectors.finish(usize::MAX);
    }
}

/// Inputs `number * block_steps * 32 ..` of a panel, no more than a block has.
#[derive(Clone, Copy, Default)]
struct Block {
    panel: usize,
    number: usize,
}

/// In which order the blocks of all panels are multiplied: group by group of panels, in a group the first block of each, then the second.
#[derive(Clone, Copy)]
struct Order {
    rows: usize,
    panels: usize,
    /// Panels of 32 columns of the result.
    per_output: usize,
    /// Inputs.
    k: usize,
    /// Steps of a block; the last may have fewer.
    block_steps: usize,
    /// Blocks of a panel.
    blocks: usize,
    /// Panels of a group.
    group: usize,
    /// Rows of pairs to make between two steps, so that those of a block are made while another is multiplied.
    pairs_a_step: usize,
    /// Rows to finish between two steps, so that all are before others are complete.
    rows_a_step: usize,
}

impl Order {
    fn new(lhs: &FastLhs<'_>, outputs: usize, epilogue: Epilogue) -> Self {
        let (rows, k, per_output) = (lhs.scales.len(), lhs.k, epilogue.panels_per_output());
        let panels = outputs * per_output;
        let steps = k.div_ceil(STEP);
        let blocks = steps.div_ceil(BLOCK_STEPS).max(1);
        let block_steps = steps.div_ceil(blocks);
        let near = rows.saturating_mul(k) <= NEAR_BYTES / size_of::<u16>();
        let most = if near { per_output } else { SUMS - per_output };
        let group = panels.div_ceil(panels.div_ceil(most)).next_multiple_of(per_output);
        let steps_of_rows = (rows.div_ceil(2 * TILE_ROWS) * block_steps).max(1);
        let blocks_to_finish = if near { per_output * blocks } else { per_output };
        Order {
            rows,
            panels,
            per_output,
            k,
            block_steps,
            blocks,
            group,
            pairs_a_step: (block_steps * STEP / 2).div_ceil(steps_of_rows),
            rows_a_step: rows.div_ceil(steps_of_rows * blocks_to_finish),
        }
    }

    fn after(&self, Block { panel, number }: Block) -> Option<Block> {
        let first = panel / self.group * self.group;
        let end = self.panels.min(first + self.group);
        if panel + 1 < end {
            Some(Block { panel: panel + 1, number })
        } else if number + 1 < self.blocks {
            Some(Block { panel: first, number: number + 1 })
        } else {
            (end < self.panels).then_some(Block { panel: end, number: 0 })
        }
    }

    fn steps_of(&self, block: Block) -> usize {
        self.block_steps.min(self.k.div_ceil(STEP) - block.number * self.block_steps)
    }
}

/// The work of the vector units.
struct Vectors<'a, 'b, 'c> {
    order: Order,
    rhs: Rhs<'a>,
    epilogue: Epilogue,
    y: &'b mut Window<'c>,
    /// Sums of some panels, `[slots][rows][32]`: those of a group, and of the output before it while it is not finished.
    sums: *mut f32,
    pairing: Pairing,
    finishing: Finishing,
}

/// Rows of a panel that are made pairs.
struct Pairing {
    from: *const f16,
    /// As many as there are from there on.
    rows: usize,
    /// What will be made pairs next.
    ahead: *const f16,
    to: *mut __m512i,
    /// Rows of pairs that are made, of all.
    done: usize,
    end: usize,
}

/// 32 columns of the result, or fewer, whose sums are complete.
struct Finishing {
    sums: *mut f32,
    /// Of the second panel, if two make an output.
    up: *const f32,
    columns: Range<usize>,
    /// Rows that are finished, of all.
    done: usize,
    end: usize,
}

impl Finishing {
    const NONE: Finishing =
        Finishing { sums: ptr::null_mut(), up: ptr::null(), columns: 0..0, done: 0, end: 0 };
}

impl Pairing {
    const NONE: Pairing =
        Pairing { from: ptr::null(), rows: 0, ahead: ptr::null(), to: ptr::null_mut(), done: 0, end: 0 };
}

impl Vectors<'_, '_, '_> {
    /// The sums of a panel.
    fn sums_of(&self, panel: usize) -> *mut f32 {
        let slots = self.order.group + self.order.per_output;
        self.sums.wrapping_add(panel % slots * self.order.rows * PANEL)
    }

    /// The rows of a block.
    fn weights_of(&self, block: Block) -> *const f16 {
        let row = 1 + block.number * self.order.block_steps * STEP;
        self.rhs.panels[block.panel * self.rhs.stride + row * PANEL..].as_ptr()
    }

    /// From now on `pair` makes pairs of `block`, at `to`.
    fn begin_pairs(&mut self, block: Block, to: *mut __m512i) {
        self.pairing = Pairing {
            from: self.weights_of(block),
            rows: self.order.k - block.number * self.order.block_steps * STEP,
            ahead: self.weights_of(self.order.after(block).unwrap_or(block)),
            to,
            done: 0,
            end: self.order.steps_of(block) * STEP / 2,
        };
    }

    /// Makes up to `count` more rows of pairs.
    ///
    /// # Safety
    /// The machine has AVX512-BF16; the last [`begin_pairs`](Self::begin_pairs) was told of room for the block.
    #[inline(always)]
    unsafe fn pair(&mut self, count: usize) {
        let Pairing { from, rows, ahead, to, done, end } = self.pairing;
        let count = count.min(end - done);
        for i in done..done + count {
            let row = 2 * i;
            // SAFETY: the contract above; i < end.
            unsafe {
                Lanes16::prefetch_l2(ahead.wrapping_add(row * PANEL).cast());
                Lanes16::prefetch_l2(ahead.wrapping_add((row + 1) * PANEL).cast());
                bf16::pair(from.wrapping_add(row * PANEL), rows.saturating_sub(row), to.add(row));
            }
        }
        self.pairing.done += count;
    }

    /// From now on `finish` finishes the sums of that panel, the last of an output.
    fn begin_finish(&mut self, last: usize) {
        let per_output = self.order.per_output;
        let first = last + 1 - per_output;
        let start = first / per_output * PANEL;
        self.finishing = Finishing {
            sums: self.sums_of(first),
            up: self.sums_of(last),
            columns: start..self.y.columns().min(start + PANEL),
            done: 0,
            end: self.order.rows,
        };
    }

    /// Applies the epilogue to up to `count` more rows.
    ///
    /// # Safety
    /// The machine has AVX-512; the sums that [`begin_finish`](Self::begin_finish) was told of are complete.
    #[inline(always)]
    unsafe fn finish(&mut self, count: usize) {
        let Finishing { sums, up, done, end, .. } = self.finishing;
        let count = count.min(end - done);
        for r in done..done + count {
            let columns = self.finishing.columns.clone();
            let later = self.y.row((r + AHEAD_ROWS).min(end - 1))[columns.start..].as_ptr();
            Lanes16::prefetch_l2(later.cast());
            Lanes16::prefetch_l2(later.wrapping_add(LANES).cast());
            let y = &mut self.y.row(r)[columns];
            // SAFETY: the sums have as many rows of 32; where there is but one panel, its row is read before it is written.
            unsafe {
                let up = *up.add(r * PANEL).cast::<[f32; PANEL]>();
                let sums = &mut *sums.add(r * PANEL).cast::<[f32; PANEL]>();
                finish::<Lanes16>(sums, &up, self.epilogue, y);
            }
        }
        self.finishing.done += count;
    }
}

impl Meanwhile for Vectors<'_, '_, '_> {
    #[inline(always)]
    unsafe fn step(&mut self) {
        // SAFETY: the contract of the trait and of `product`.
        unsafe {
            self.pair(self.order.pairs_a_step);
            self.finish(self.order.rows_a_step);
        }
    }
}
