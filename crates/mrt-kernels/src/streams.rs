//! Products of a few rows, which wait for memory: several panels at a time.
//!
//! A core that reads one sequence of addresses does not get all the bandwidth that it can have: on Zen 3 one thread reads
//! 20 GB/s so, 25 from two places in turn and 26 from four. So the panels are cut into four runs, and a block of a panel
//! of the first run is followed by the same block of the second, third and fourth. No chain of sums is reordered.

use half::f16;

use crate::isa::{Isa, dispatch};
use crate::lanes::Lanes;
use crate::panel::{LANES, PANEL, panel_count};
use crate::product::{Epilogue, Left, Lhs, Rhs, Sums, finish, start_from_bias};
use crate::window::Window;

/// Runs of panels. With two, GEMV has a tenth less of the bandwidth on Zen 3, with three some percent.
const STREAMS: usize = 4;

/// Rows up to which products read four panels at a time on that instruction set; 0 if they never do. Parts of fewer panels
/// are slower then.
pub fn streamed_rows(isa: Isa) -> usize {
    dispatch!(isa, rows() -> usize)
}

/// [`streamed_rows`]; it demands nothing.
unsafe fn rows<L: Lanes>() -> usize {
    L::STREAMED_ROWS
}

/// [`panel_product`](crate::panel_product) for at most [`Lanes::STREAMED_ROWS`] rows.
///
/// # Safety
/// Its assertions hold, and the machine has `L`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn streamed_product<L: Lanes>(
    lhs: Lhs<'_>,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &mut Window<'_>,
    scratch: &mut [f32],
) {
    let outputs = panel_count(y.columns());
    let run = outputs.div_ceil(STREAMS);
    let panels_per_output = epilogue.panels_per_output();
    let apart = run * panels_per_output * rhs.stride;
    let tile_len = lhs.rows * PANEL;
    let (sums, rest) = scratch.split_at_mut(STREAMS * tile_len);
    let up = &mut rest[..STREAMS * tile_len];
    for j in 0..run {
        // The last runs may be shorter.
        let streams = (outputs - j).div_ceil(run);
        // SAFETY: the contract above; the last of the panels belongs to output j + (streams - 1) * run < outputs.
        unsafe {
            for (i, sums) in [&mut *sums, &mut *up].into_iter().take(panels_per_output).enumerate() {
                let panels = &rhs.panels[(j * panels_per_output + i) * rhs.stride..];
                match streams {
                    1 => panel_sums::<L, 1>(lhs, panels, apart, sums),
                    2 => panel_sums::<L, 2>(lhs, panels, apart, sums),
                    3 => panel_sums::<L, 3>(lhs, panels, apart, sums),
                    _ => panel_sums::<L, STREAMS>(lhs, panels, apart, sums),
                }
            }
            for s in 0..streams {
                let start = (j + s * run) * PANEL;
                let columns = PANEL.min(y.columns() - start);
                for r in 0..lhs.rows {
                    let (at, row) = ((s * lhs.rows + r) * PANEL, &mut y.row(r)[start..start + columns]);
                    finish::<L>(&mut sums[at..][..PANEL], &up[at..][..PANEL], epilogue, row);
                }
            }
        }
    }
}

/// All sums of `S` panels, which are `apart` elements apart: `sums[s][r][0..32]`.
///
/// # Safety
/// The machine has `L`'s instruction set; `lhs` is as long as it says and has at most [`Lanes::STREAMED_ROWS`] rows; the panels are
/// there, with `lhs.k` inputs; `sums` has `S * lhs.rows` rows of 32.
#[inline(always)]
unsafe fn panel_sums<L: Lanes, const S: usize>(lhs: Lhs<'_>, panels: &[f16], apart: usize, sums: &mut [f32]) {
    let tile_len = lhs.rows * PANEL;
    // SAFETY: the contract above; start < k.
    unsafe {
        for (s, sums) in sums.chunks_exact_mut(tile_len).take(S).enumerate() {
            start_from_bias::<L>(&panels[s * apart..], sums);
        }
        // A multiple of S, so that no line of the next blocks is left out.
        let block_len = L::stream_block(lhs.rows) / S * S;
        for start in (0..lhs.k).step_by(block_len) {
            let block = block_len.min(lhs.k - start);
            let x = Left { x: lhs.x.as_ptr().add(start), stride: lhs.stride };
            let panel = panels.as_ptr().add((1 + start) * PANEL);
            for s in 0..S {
                // Each block fetches its share of the next one of every run.
                let next = panel.wrapping_add((block_len + s * (block_len / S)) * PANEL);
                let panel = panel.add(s * apart);
                let sums = Sums::of(&mut sums[s * tile_len..], PANEL);
                macro_rules! heights {
                    ($($r:literal)+) => {
                        match lhs.rows {
                            $($r if $r <= L::DIRECT_ROWS.min(L::STREAMED_ROWS) => {
                                add_block::<L, $r, 2, S>(x, block, panel, next, apart, sums);
                            })+
                            $($r if $r <= L::STREAMED_ROWS => {
                                // The registers hold half of the sums: first the low columns, then, of lines in L1, the high ones.
                                add_block::<L, $r, 1, S>(x, block, panel, next, apart, sums);
                                let (panel, sums) = (panel.add(LANES), sums.skip_columns(LANES));
                                add_block::<L, $r, 1, 0>(x, block, panel, next, apart, sums);
                            })+
                            rows => unreachable!("{rows} streamed rows"),
                        }
                    };
                }
                heights!(1 2 3 4 5 6 7 8);
            }
        }
    }
}

/// Adds the products of `k` inputs to `R` rows of `16 * G` sums, and fetches lines at `next`, of `S` runs in turn,
/// as many as it multiplies; none if `S` is 0.
///
/// # Safety
/// The machine has `L`'s instruction set; `x` has `R` rows of `k` elements; `panel` has `k` rows of `16 * G` elements,
/// `PANEL` apart, and `sums` has `R`.
#[inline(always)]
unsafe fn add_block<L: Lanes, const R: usize, const G: usize, const S: usize>(
    x: Left,
    k: usize,
    panel: *const f16,
    next: *const f16,
    apart: usize,
    sums: Sums,
) {
    // SAFETY: the contract above; i and i + j are below k.
    unsafe {
        let mut acc = sums.load::<L, R, G>();
        let step = S.max(1);
        let whole = k / step * step;
        for i in (0..whole).step_by(step) {
            for j in 0..step {
                if S > 0 {
                    L::prefetch(next.wrapping_add(j * apart + i / step * PANEL).cast());
                }
                L::tile_step(&mut acc, x.x.add(i + j), x.stride, panel.add((i + j) * PANEL));
            }
        }
        for i in whole..k {
            L::tile_step(&mut acc, x.x.add(i), x.stride, panel.add(i * PANEL));
        }
        sums.store(&acc);
    }
}
