//! Products of one to three rows, which wait for memory: panel by panel, so that it is read in order. The sums stay in
//! registers from the bias to the epilogue, as memory idles while anything else is done. On Zen 4, that and fetching panels past the
//! L2 cache let one thread decode 4 % faster.

use std::hint::black_box;

use half::f16;

use crate::lanes::Lanes;
use crate::panel::{LANES, PANEL};
use crate::product::{Epilogue, Left, Lhs, Rhs, finish};
use crate::rows::swiglu;
use crate::window::Window;

/// The most rows. With AVX-512, one pass over a panel is as fast as two with four, and slower with more.
pub(crate) const GEMV_ROWS: usize = 3;

/// [`panel_product`](crate::panel_product) for at most [`GEMV_ROWS`] rows.
///
/// # Safety
/// Its assertions hold, and the machine has `L`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn gemv<L: Lanes>(lhs: Lhs<'_>, rhs: Rhs<'_>, epilogue: Epilogue, y: &mut Window<'_>) {
    // SAFETY: the same contract.
    unsafe {
        match lhs.rows {
            1 => gemv_rows::<L, 1>(lhs, rhs, epilogue, y),
            2 => gemv_rows::<L, 2>(lhs, rhs, epilogue, y),
            _ => gemv_rows::<L, GEMV_ROWS>(lhs, rhs, epilogue, y),
        }
    }
}

/// [`gemv`] for `R` rows.
///
/// # Safety
/// As there; `lhs` has `R` rows.
#[inline(always)]
unsafe fn gemv_rows<L: Lanes, const R: usize>(
    lhs: Lhs<'_>,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &mut Window<'_>,
) {
    let x = Left { x: lhs.x.as_ptr(), stride: lhs.stride };
    for (j, start) in (0..y.columns()).step_by(PANEL).enumerate() {
        let end = y.columns().min(start + PANEL);
        let panels = &rhs.panels[j * epilogue.panels_per_output() * rhs.stride..];
        // SAFETY: the contract above.
        unsafe {
            let sums = panel_sums::<L, R>(x, lhs.k, panels);
            let [sums, up] = match epilogue {
                Epilogue::Store | Epilogue::Add => [sums; 2],
                Epilogue::SwiGlu => {
                    // Three rows of sums take so many of NEON's registers that others have to wait in memory.
                    let gate = if R == 1 { sums } else { black_box(sums) };
                    [gate, panel_sums::<L, R>(x, lhs.k, &panels[rhs.stride..])]
                }
            };
            for (r, (sums, up)) in sums.into_iter().zip(up).enumerate() {
                finish_row(sums, up, epilogue, &mut y.row(r)[start..end]);
            }
        }
    }
}

/// [`finish`] for sums in registers: with a detour through memory, one thread decodes 4 % slower on Zen 4. With more rows it is the
/// other way round: prefill was 1 to 3 % slower with these stores of whole vectors.
///
/// # Safety
/// The machine has `L`'s instruction set.
#[inline(always)]
unsafe fn finish_row<L: Lanes>(sums: [L; 2], up: [L; 2], epilogue: Epilogue, y: &mut [f32]) {
    if y.len() < PANEL {
        let [mut sums, up] = [sums, up].map(|row| row.map(L::to_array));
        // SAFETY: the same contract; both hold 32 elements.
        unsafe { finish::<L>(sums.as_flattened_mut(), up.as_flattened(), epilogue, y) };
        return;
    }
    for ((y, sum), up) in y.as_chunks_mut::<LANES>().0.iter_mut().zip(sums).zip(up) {
        let y = y.as_mut_ptr();
        // SAFETY: the contract above; a chunk holds 16 elements.
        unsafe {
            let result = match epilogue {
                Epilogue::Store => sum,
                Epilogue::Add => L::load(y).add(sum),
                Epilogue::SwiGlu => swiglu(sum, up),
            };
            result.store(y);
        }
    }
}

/// All sums of a panel, 32 for each row of `x`.
///
/// # Safety
/// The machine has `L`'s instruction set; `x` has `R` rows of `k` elements; `panel` has the bias row and `k` more.
#[inline(always)]
unsafe fn panel_sums<L: Lanes, const R: usize>(x: Left, k: usize, panel: &[f16]) -> [[L; 2]; R] {
    // SAFETY: the contract above; i < k.
    unsafe {
        let bias = panel.as_ptr();
        let mut acc = [[L::widen(bias), L::widen(bias.add(LANES))]; R];
        let panel = bias.add(PANEL);
        let ahead = panel.wrapping_add(L::PREFETCH_ROWS * PANEL);
        let whole = k / L::K_STEP * L::K_STEP;
        for i in (0..whole).step_by(L::K_STEP) {
            for i in i..i + L::K_STEP {
                L::prefetch_once(ahead.wrapping_add(i * PANEL).cast());
            }
            L::tile_steps(&mut acc, x.x.add(i), x.stride, panel.add(i * PANEL));
        }
        for i in whole..k {
            L::tile_step(&mut acc, x.x.add(i), x.stride, panel.add(i * PANEL));
        }
        acc
    }
}
