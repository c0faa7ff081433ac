//! The panel: 32 output columns side by side, a row of biases first, then one row of 64 bytes per k.

use half::f16;

use crate::isa::{Isa, dispatch};
use crate::lanes::Lanes;

/// Columns of a panel.
pub const PANEL: usize = 32;

/// Lanes of the fixed reduction tree; vectors that operations pad are padded to a multiple of this.
pub const LANES: usize = 16;

/// FP16 elements of one panel of `k` inputs: the bias row and `k` rows; `usize::MAX` if there are more.
pub const fn panel_len(k: usize) -> usize {
    k.saturating_add(1).saturating_mul(PANEL)
}

/// Panels of a product with `n` output columns.
pub const fn panel_count(n: usize) -> usize {
    n.div_ceil(PANEL)
}

/// Column `n` of panels of `out.len()` inputs, as f32: an embedding looked up in the LM head's panels.
///
/// # Panics
/// If column `n` is outside `panels`.
pub fn gather_column(panels: &[f16], n: usize, out: &mut [f32]) {
    let panel = panels.chunks_exact(panel_len(out.len())).nth(n / PANEL).expect("a column of the panels");
    for (x, row) in out.iter_mut().zip(panel[PANEL..].chunks_exact(PANEL)) {
        *x = row[n % PANEL].to_f32();
    }
}

/// Writes `x`, the keys of one position (head_dim elements), into lane `lane` of a K panel (head_dim inputs,
/// 32 positions), rounded to FP16 and saturated.
///
/// # Panics
/// If `panel` is not one panel of `x.len()` inputs, `lane` is not below 32, or `x` has more than 1024 elements.
pub fn store_k_lane(isa: Isa, x: &[f32], panel: &mut [f16], lane: usize) {
    let mut narrow = [f16::ZERO; 1024];
    let narrow = &mut narrow[..x.len()];
    store_v_row(isa, x, narrow);
    assert!(panel.len() == panel_len(x.len()) && lane < PANEL);
    for (row, h) in panel[PANEL..].chunks_exact_mut(PANEL).zip(narrow) {
        row[lane] = *h;
    }
}

/// Writes `x` to `row`, rounded to FP16 and saturated: one position's values in a V panel.
///
/// # Panics
/// If the lengths differ.
pub fn store_v_row(isa: Isa, x: &[f32], row: &mut [f16]) {
    assert_eq!(x.len(), row.len());
    dispatch!(isa, narrow(x: &[f32], row: &mut [f16]))
}

#[inline(always)]
unsafe fn narrow<L: Lanes>(x: &[f32], row: &mut [f16]) {
    let (x16, x_rest) = x.as_chunks::<LANES>();
    let (h16, h_rest) = row.as_chunks_mut::<LANES>();
    for (x, h) in x16.iter().zip(h16) {
        // SAFETY: both chunks hold 16 elements; the instruction set is `dispatch!`'s promise.
        unsafe { L::load(x.as_ptr()).narrow(h.as_mut_ptr()) };
    }
    let (mut x, mut h) = ([0.0; LANES], [f16::ZERO; LANES]);
    x[..x_rest.len()].copy_from_slice(x_rest);
    // SAFETY: as above.
    unsafe { L::load(x.as_ptr()).narrow(h.as_mut_ptr()) };
    h_rest.copy_from_slice(&h[..h_rest.len()]);
}
