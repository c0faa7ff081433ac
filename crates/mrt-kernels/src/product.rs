//! The matrix product with panels on the right-hand side. Of a few rows, which wait for memory, see [`gemv`](crate::gemv) and
//! [`streams`](crate::streams).
//!
//! Each output is one chain `y = fma(x[k], w[k], y)` in ascending k that starts from the bias. However the work is
//! cut (into tiles of rows, blocks of k, columns for threads), no chain is reordered; a partial sum that waits
//! in memory is an f32 like the register it came from. So every cut gives the same bits.

use std::marker::PhantomData;

use half::f16;

use crate::gemv::{GEMV_ROWS, gemv};
use crate::isa::{Isa, dispatch};
use crate::lanes::{Element, Lanes};
use crate::panel::{LANES, PANEL, panel_count, panel_len};
use crate::rows::swiglu;
use crate::streams::streamed_product;
use crate::window::{Window, span};

/// Rows of a panel that all rows of the left-hand side pass over before the next ones: 64 KiB of FP16 or of half the
/// columns widened, 128 KiB of all, which stay in the L2 cache. Shorter blocks would fit the L1 cache, but load and store the
/// sums more often.
pub(crate) const K_BLOCK: usize = 1024;

/// Rows of a panel that the L1 cache holds beside all else: 16 KiB.
const NEAR_ROWS: usize = 256;

/// Rows of 16 sums that keep the multipliers busy: a multiply-add takes 4 cycles, and those of a row begin in one.
const BUSY_ROWS: usize = 4;

/// The left-hand side of a product: `rows` rows of `k` activations, `stride` elements apart.
#[derive(Clone, Copy)]
pub struct Lhs<'a> {
    /// The matrix, row-major, from its first row on.
    pub x: &'a [f32],
    /// Rows (tokens, or heads of tokens in attention).
    pub rows: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Elements of a row that take part.
    pub k: usize,
}

/// The right-hand side of a product: panels, `stride` FP16 elements apart, of at least `k` inputs each.
///
/// A weight matrix has `stride = panel_len(k)`. A V panel of the KV cache has room for more positions than are in
/// use, so its stride is longer.
#[derive(Clone, Copy)]
pub struct Rhs<'a> {
    /// The panels, from the first one on.
    pub panels: &'a [f16],
    /// Elements from one panel to the next.
    pub stride: usize,
}

impl<'a> Rhs<'a> {
    /// The panels of a weight matrix of `k` inputs.
    pub fn weights(panels: &'a [f16], k: usize) -> Self {
        Rhs { panels, stride: panel_len(k) }
    }

    /// The same, from panel `first` on.
    ///
    /// # Panics
    /// If there are fewer panels.
    pub fn from_panel(self, first: usize) -> Self {
        Rhs { panels: &self.panels[first.saturating_mul(self.stride)..], ..self }
    }
}

/// What happens to the sums of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// `y = sum`
    Store,
    /// `y += sum`: the residual connection.
    Add,
    /// `y = silu(gate) * up`, where the panels alternate between gate and up; `y` has half as many columns as the
    /// panels.
    SwiGlu,
}

impl Epilogue {
    /// Panels that make 32 columns of the result.
    pub const fn panels_per_output(self) -> usize {
        match self {
            Epilogue::Store | Epilogue::Add => 1,
            Epilogue::SwiGlu => 2,
        }
    }
}

/// Rows that are best passed over the panels together on that instruction set, if a product has more.
pub fn pass_rows(isa: Isa) -> usize {
    dispatch!(isa, pass_rows_of() -> usize)
}

/// [`pass_rows`]; it demands nothing.
unsafe fn pass_rows_of<L: Lanes>() -> usize {
    L::PASS_ROWS
}

/// Panels that scratch has sums for: two make an output of SwiGLU, a fast lane works on several at a time.
pub(crate) const SUMS: usize = 8;

/// Elements of scratch that [`panel_product`] needs for that many rows.
pub const fn product_scratch_len(rows: usize) -> usize {
    rows.saturating_mul(SUMS * PANEL).saturating_add(K_BLOCK * PANEL)
}

/// `y[r][n] = epilogue(bias[n] + sum over k of x[r][k] w[k][n])` for all rows of `lhs` and all columns of `y`.
///
/// # Panics
/// If `y` and `lhs` differ in rows, a slice is shorter than its sizes say, or `scratch` has fewer than
/// [`product_scratch_len`]`(lhs.rows)` elements.
pub fn panel_product(
    isa: Isa,
    lhs: Lhs<'_>,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &mut Window<'_>,
    scratch: &mut [f32],
) {
    if !check_product(lhs.rows, lhs.k, rhs, epilogue, y, scratch) {
        return;
    }
    assert!(span(lhs.rows, lhs.stride, lhs.k) <= lhs.x.len(), "left-hand side shorter than its sizes");
    dispatch!(isa, exact(lhs: Lhs<'_>, rhs: Rhs<'_>, epilogue: Epilogue, y: &mut Window<'_>, scratch: &mut [f32]))
}

/// Demands what every product demands of its slices but the left-hand side; whether there is something to compute.
pub(crate) fn check_product(
    rows: usize,
    k: usize,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &Window<'_>,
    scratch: &[f32],
) -> bool {
    assert_eq!(y.rows(), rows);
    let panels = panel_count(y.columns()) * epilogue.panels_per_output();
    assert!(span(panels, rhs.stride, panel_len(k)) <= rhs.panels.len(), "too few panels");
    assert!(scratch.len() >= product_scratch_len(rows), "scratch too short");
    rows > 0 && panels > 0
}

/// How the sums of a panel come about.
pub(crate) trait PanelSums {
    /// All sums of one panel: `sums[r][0..32]` for each row.
    ///
    /// # Safety
    /// The machine has the instruction set; `panel` has the bias row and all rows of k; `wide` holds
    /// `K_BLOCK * PANEL` elements and `sums` `PANEL` for each row.
    unsafe fn panel_sums(&self, panel: &[f16], wide: &mut [f32], sums: &mut [f32]);
}

/// [`panel_product`], whose assertions are this function's safety contract.
#[inline(always)]
unsafe fn exact<L: Lanes>(
    lhs: Lhs<'_>,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &mut Window<'_>,
    scratch: &mut [f32],
) {
    // SAFETY: the same contract.
    unsafe {
        if lhs.rows <= L::STREAMED_ROWS {
            streamed_product::<L>(lhs, rhs, epilogue, y, scratch);
        } else if lhs.rows <= GEMV_ROWS {
            gemv::<L>(lhs, rhs, epilogue, y);
        } else {
            product::<L>(&Exact(lhs, PhantomData::<L>), rhs, epilogue, y, scratch);
        }
    }
}

/// Goes through the panels, one or two for 32 columns of `y`.
///
/// # Safety
/// The machine has `L`'s and the sums' instruction set, and [`check_product`] holds.
#[inline(always)]
pub(crate) unsafe fn product<L: Lanes>(
    lhs: &impl PanelSums,
    rhs: Rhs<'_>,
    epilogue: Epilogue,
    y: &mut Window<'_>,
    scratch: &mut [f32],
) {
    let (wide, sums) = scratch.split_at_mut(K_BLOCK * PANEL);
    let rows = y.rows();
    let tile_len = rows * PANEL;
    let panels_per_output = epilogue.panels_per_output();
    for (j, start) in (0..y.columns()).step_by(PANEL).enumerate() {
        let columns = PANEL.min(y.columns() - start);
        // The lines of the results come into the L2 cache while their sums are computed. On Zen 4 prefill is 1 % faster so with
        // one thread.
        for r in 0..rows {
            let row = y.row(r)[start..].as_ptr();
            L::prefetch_l2(row.cast());
            L::prefetch_l2(row.wrapping_add(LANES).cast());
        }
        // SAFETY: all panels are there, and `scratch` holds the block and two tiles of `rows * PANEL` sums.
        unsafe {
            for (i, sums) in sums.chunks_exact_mut(tile_len).take(panels_per_output).enumerate() {
                lhs.panel_sums(&rhs.panels[(j * panels_per_output + i) * rhs.stride..], wide, sums);
            }
            let (sums, up) = sums.split_at_mut(tile_len);
            for r in 0..rows {
                let row = &mut y.row(r)[start..start + columns];
                finish::<L>(&mut sums[r * PANEL..][..PANEL], &up[r * PANEL..][..PANEL], epilogue, row);
            }
        }
    }
}

/// Applies the epilogue to one row of 32 sums and writes as many as `y` holds. Works in `sums`.
///
/// # Safety
/// The machine has `L`'s instruction set; `sums` and, for SwiGLU, `up` hold 32 elements.
#[inline(always)]
pub(crate) unsafe fn finish<L: Lanes>(sums: &mut [f32], up: &[f32], epilogue: Epilogue, y: &mut [f32]) {
    // SAFETY: each has two vectors; the instruction set is the caller's promise.
    unsafe {
        let mut row = load_row::<L>(sums.as_ptr());
        if epilogue == Epilogue::SwiGlu {
            let up = load_row::<L>(up.as_ptr());
            row = [swiglu(row[0], up[0]), swiglu(row[1], up[1])];
        }
        if let Some(y) = y.as_mut_array::<PANEL>() {
            if epilogue == Epilogue::Add {
                let old = load_row::<L>(y.as_ptr());
                row = [old[0].add(row[0]), old[1].add(row[1])];
            }
            store_row(row, y.as_mut_ptr());
            return;
        }
        store_row(row, sums.as_mut_ptr());
    }
    for (y, sum) in y.iter_mut().zip(sums) {
        *y = if epilogue == Epilogue::Add { *y + *sum } else { *sum };
    }
}

/// 32 numbers.
///
/// # Safety
/// The machine has `L`'s instruction set; as many can be read.
#[inline(always)]
unsafe fn load_row<L: Lanes>(x: *const f32) -> [L; 2] {
    // SAFETY: the contract above.
    unsafe { [L::load(x), L::load(x.add(LANES))] }
}

/// Writes 32 numbers.
///
/// # Safety
/// There is room for as many.
#[inline(always)]
unsafe fn store_row<L: Lanes>(row: [L; 2], x: *mut f32) {
    // SAFETY: the contract above; the values prove the instruction set.
    unsafe {
        row[0].store(x);
        row[1].store(x.add(LANES));
    }
}

/// Fills the sums of each row with the biases of `panel`.
///
/// # Safety
/// The machine has `L`'s instruction set; `panel` has the bias row.
#[inline(always)]
pub(crate) unsafe fn start_from_bias<L: Lanes>(panel: &[f16], sums: &mut [f32]) {
    // SAFETY: the contract above; a row of sums has two vectors.
    unsafe {
        let bias = [L::widen(panel.as_ptr()), L::widen(panel.as_ptr().add(LANES))];
        for row in sums.as_chunks_mut::<PANEL>().0 {
            store_row(bias, row.as_mut_ptr());
        }
    }
}

/// The sums of the numerics contract.
struct Exact<'a, L>(Lhs<'a>, PhantomData<L>);

impl<L: Lanes> PanelSums for Exact<'_, L> {
    #[inline(always)]
    unsafe fn panel_sums(&self, panel: &[f16], wide: &mut [f32], sums: &mut [f32]) {
        let lhs = self.0;
        // SAFETY: the contract of the trait; `lhs` is as long as it says.
        unsafe {
            start_from_bias::<L>(panel, sums);
            let x = Left { x: lhs.x.as_ptr(), stride: lhs.stride };
            let sums = Sums::of(sums, PANEL);
            add_products::<L>(lhs.rows, x, lhs.k, panel.as_ptr().add(PANEL), wide, sums);
        }
    }
}

/// Rows of the left-hand side, `stride` elements apart.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub x: *const f32,
    pub stride: usize,
}

impl Left {
    /// All rows but the first `r`.
    ///
    /// # Safety
    /// There are at least as many.
    #[inline(always)]
    pub unsafe fn skip_rows(self, r: usize) -> Self {
        // SAFETY: the contract above.
        Left { x: unsafe { self.x.add(r * self.stride) }, ..self }
    }
}

/// Rows of sums, `stride` elements apart.
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    pub y: *mut f32,
    pub stride: usize,
    /// Whether they begin from 0, whatever is in memory.
    pub fresh: bool,
}

impl Sums {
    /// Sums that go on from those in memory.
    pub fn of(sums: &mut [f32], stride: usize) -> Self {
        Sums { y: sums.as_mut_ptr(), stride, fresh: false }
    }

    /// Sums that begin from 0.
    pub fn fresh(sums: &mut [f32], stride: usize) -> Self {
        Sums { fresh: true, ..Self::of(sums, stride) }
    }

    /// The same once `inputs` of their products are added.
    pub fn after(self, inputs: usize) -> Self {
        Sums { fresh: self.fresh && inputs == 0, ..self }
    }

    /// The same from column `n` on.
    ///
    /// # Safety
    /// There are at least as many columns.
    #[inline(always)]
    pub unsafe fn skip_columns(self, n: usize) -> Self {
        // SAFETY: the contract above.
        Sums { y: unsafe { self.y.add(n) }, ..self }
    }

    /// All rows but the first `r`.
    ///
    /// # Safety
    /// There are at least as many.
    #[inline(always)]
    pub unsafe fn skip_rows(self, r: usize) -> Self {
        // SAFETY: the contract above.
        Sums { y: unsafe { self.y.add(r * self.stride) }, ..self }
    }

    /// The first `16 * G` sums of `R` rows, or as many zeros.
    ///
    /// # Safety
    /// The machine has `L`'s instruction set; the rows are there.
    #[inline(always)]
    pub unsafe fn load<L: Lanes, const R: usize, const G: usize>(self) -> [[L; G]; R] {
        // SAFETY: the contract above; r < R, g < G.
        unsafe {
            let mut acc = [[L::splat(0.0); G]; R];
            if self.fresh {
                return acc;
            }
            for (r, row) in acc.iter_mut().enumerate() {
                for (g, sum) in row.iter_mut().enumerate() {
                    *sum = L::load(self.y.add(r * self.stride + g * LANES));
                }
            }
            acc
        }
    }

    /// Writes what `load` reads.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    pub unsafe fn store<L: Lanes, const R: usize, const G: usize>(self, acc: &[[L; G]; R]) {
        for (r, row) in acc.iter().enumerate() {
            for (g, sum) in row.iter().enumerate() {
                // SAFETY: the contract above; r < R, g < G.
                unsafe { sum.store(self.y.add(r * self.stride + g * LANES)) };
            }
        }
    }
}

/// Rows of a panel that will be read next, to be prefetched. Of the tiles over one block each fetches a part, so that all of
/// it comes at an even rate.
#[derive(Clone, Copy)]
struct Ahead {
    /// Any address.
    panel: *const f16,
    /// Whether they go into the L1 cache; if not, into L2.
    near: bool,
    part: usize,
    parts: usize,
}

impl Ahead {
    fn all(panel: *const f16, near: bool) -> Self {
        Ahead { panel, near, part: 0, parts: 1 }
    }

    /// Part `i` of `n` of this part.
    fn part(self, i: usize, n: usize) -> Self {
        Ahead { part: self.part * n + i, parts: self.parts * n, ..self }
    }

    fn halves(self) -> [Self; 2] {
        [self.part(0, 2), self.part(1, 2)]
    }
}

/// Continues the chains of `rows` rows of 32 sums with `k` inputs: adds the products of `x` with `k` rows of a panel.
///
/// # Safety
/// The machine has `L`'s instruction set; `x` has `rows` rows of `k` elements, `panel` has `k` rows, `sums` has `rows` rows
/// of 32; `wide` holds the smaller of `k` and `K_BLOCK` rows of 32.
#[inline(always)]
pub(crate) unsafe fn add_products<L: Lanes>(
    rows: usize,
    x: Left,
    k: usize,
    panel: *const f16,
    wide: &mut [f32],
    sums: Sums,
) {
    // By the contract the machine has this instruction set. It is chosen again to get one function for each: the tiles are most
    // of this crate's code.
    dispatch!(Isa(L::KIND), add_blocks(rows: usize, x: Left, k: usize, panel: *const f16, wide: &mut [f32], sums: Sums))
}

/// [`add_products`], block by block.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn add_blocks<L: Lanes>(
    rows: usize,
    x: Left,
    k: usize,
    panel: *const f16,
    wide: &mut [f32],
    sums: Sums,
) {
    // SAFETY: the contract above. Rows start .. start + block of the panel are inside it because start + block <= k,
    // and so are columns start .. start + block of each row of `x`; direct <= rows.
    unsafe {
        let near = k <= NEAR_ROWS;
        let direct = if near { direct_rows::<L>(rows) } else { 0 };
        if direct == rows {
            let ahead = Ahead::all(panel.wrapping_add(L::PREFETCH_ROWS * PANEL), true);
            tile_rows::<L, _, 2>(rows, x, k, Ready(panel), ahead, sums);
            return;
        }
        for start in (0..k).step_by(K_BLOCK) {
            let block = K_BLOCK.min(k - start);
            let (x, panel, sums) =
                (Left { x: x.x.add(start), ..x }, panel.add(start * PANEL), sums.after(start));
            // What comes next, of this panel or the one after it, is fetched from memory meanwhile.
            let mut ahead = Ahead::all(panel.wrapping_add(block * PANEL), near);
            if direct > 0 {
                tile_rows::<L, _, 2>(direct, x, block, Ready(panel), ahead.part(0, 2), sums);
                ahead = ahead.part(1, 2);
            }
            let (rows, x, sums) = (rows - direct, x.skip_rows(direct), sums.skip_rows(direct));
            if L::WIDE_TILES {
                add_columns::<L, 2>(rows, x, block, panel, wide, ahead, sums);
                continue;
            }
            for (half, ahead) in ahead.halves().into_iter().enumerate() {
                let (panel, sums) = (panel.add(half * LANES), sums.skip_columns(half * LANES));
                add_columns::<L, 1>(rows, x, block, panel, wide, ahead, sums);
            }
        }
    }
}

/// Of `rows` rows over a panel in the L1 cache, those that go first in a tile of all 32 columns: all that fit, or as many as
/// leave no tile of 16 columns with fewer than [`BUSY_ROWS`]. With AVX2 attention of one token with 7 query heads to a KV head
/// is 8 % faster so on Zen 3.
fn direct_rows<L: Lanes>(rows: usize) -> usize {
    if rows <= L::DIRECT_ROWS {
        return rows;
    }
    let lowest = rows / rows.div_ceil(L::TILE_ROWS);
    if rows < L::WIDENED_ROWS && lowest < BUSY_ROWS { L::DIRECT_ROWS } else { 0 }
}

/// Where the register tile finds a block of `16 * G` columns.
trait Columns: Copy {
    type Element: Element;

    /// Inputs `i` and following.
    ///
    /// # Safety
    /// The machine has `L`'s instruction set; the block has `n` more inputs from there.
    unsafe fn inputs<L: Lanes, const G: usize>(self, i: usize, n: usize) -> *const Self::Element;
}

/// Columns as they are.
#[derive(Clone, Copy)]
struct Ready<E>(*const E);

impl<E: Element> Columns for Ready<E> {
    type Element = E;

    #[inline(always)]
    unsafe fn inputs<L: Lanes, const G: usize>(self, i: usize, _n: usize) -> *const E {
        // SAFETY: the contract of the trait.
        unsafe { self.0.add(i * E::stride::<G>()) }
    }
}

/// Columns of a panel, which are widened to f32 in `wide` as they are asked for.
#[derive(Clone, Copy)]
struct Widening {
    columns: *const f16,
    wide: *mut f32,
}

impl Columns for Widening {
    type Element = f32;

    #[inline(always)]
    unsafe fn inputs<L: Lanes, const G: usize>(self, i: usize, n: usize) -> *const f32 {
        // SAFETY: the contract of the trait; `wide` has room for all of the block.
        unsafe {
            for i in i..i + n {
                for g in 0..G {
                    L::widen(self.columns.add(i * PANEL + g * LANES))
                        .store(self.wide.add((i * G + g) * LANES));
                }
            }
            self.wide.add(i * G * LANES)
        }
    }
}

/// Adds the products of all rows of `x` with `16 * G` columns of one block, in tiles of nearly equal height: each converts FP16 for
/// itself, or all but the first read what was widened.
///
/// # Safety
/// As [`tile`], for all rows; `wide` has room for `16 * G` numbers for each input.
#[inline(always)]
unsafe fn add_columns<L: Lanes, const G: usize>(
    rows: usize,
    x: Left,
    k: usize,
    columns: *const f16,
    wide: &mut [f32],
    ahead: Ahead,
    sums: Sums,
) {
    let widening = Widening { columns, wide: wide.as_mut_ptr() };
    let wide = Ready(widening.wide.cast_const());
    let widened = rows >= L::WIDENED_ROWS;
    let count = rows.div_ceil(L::TILE_ROWS);
    // SAFETY: the contract above; first .. end are rows of `x` and of the sums.
    unsafe {
        if widened && !L::WIDENED_BY_TILE {
            widening.inputs::<L, G>(0, k);
        }
        for t in 0..count {
            let (first, end) = (t * rows / count, (t + 1) * rows / count);
            let (height, x, sums) = (end - first, x.skip_rows(first), sums.skip_rows(first));
            let ahead = ahead.part(t, count);
            if !widened {
                tile_rows::<L, _, G>(height, x, k, Ready(columns), ahead, sums);
            } else if L::WIDENED_BY_TILE && t == 0 {
                tile_rows::<L, _, G>(height, x, k, widening, ahead, sums);
            } else {
                tile_rows::<L, _, G>(height, x, k, wide, ahead, sums);
            }
        }
    }
}

/// [`tile`] with a height known only at run time, at most `L::TILE_ROWS`.
///
/// # Safety
/// As `tile`, for that many rows.
#[inline(always)]
unsafe fn tile_rows<L: Lanes, B: Columns, const G: usize>(
    rows: usize,
    x: Left,
    k: usize,
    b: B,
    ahead: Ahead,
    sums: Sums,
) {
    macro_rules! heights {
        ($($r:literal)+) => {
            match rows {
                // The guard lets the compiler drop the tiles that this instruction set never uses.
                $($r if $r <= if G == 2 { L::DIRECT_ROWS } else { L::TILE_ROWS } =>
                    // SAFETY: the same contract.
                    unsafe { tile::<L, B, $r, G>(x, k, b, ahead, sums) },)+
                _ => unreachable!("a tile of {rows} rows"),
            }
        };
    }
    heights!(1 2 3 4 5 6 7 8 9 10 11 12)
}

/// The register tile: adds the products of `k` inputs to `R` rows of `16 * G` sums, and prefetches its part of the `k` rows
/// of a panel at `ahead`.
///
/// # Safety
/// The machine has `L`'s instruction set; `x` has `R` rows of `k` elements; `b` has `k` inputs; `sums` has `R` rows of `16 * G`
/// elements.
#[inline(always)]
unsafe fn tile<L: Lanes, B: Columns, const R: usize, const G: usize>(
    x: Left,
    k: usize,
    b: B,
    ahead: Ahead,
    sums: Sums,
) {
    let Left { x, stride: x_stride } = x;
    // SAFETY: the contract above; i < k.
    unsafe {
        let mut acc = sums.load::<L, R, G>();
        let whole = k / L::K_STEP * L::K_STEP;
        let (mut ahead_row, mut wait) = (k * ahead.part / ahead.parts, 0);
        for i in (0..whole).step_by(L::K_STEP) {
            if wait == 0 {
                for _ in 0..L::K_STEP {
                    let row = ahead.panel.wrapping_add(ahead_row * PANEL).cast();
                    if ahead.near {
                        L::prefetch(row)
                    } else {
                        L::prefetch_l2(row)
                    }
                    ahead_row += 1;
                }
                wait = ahead.parts;
            }
            wait -= 1;
            L::tile_steps(&mut acc, x.add(i), x_stride, b.inputs::<L, G>(i, L::K_STEP));
        }
        for i in whole..k {
            L::tile_step(&mut acc, x.add(i), x_stride, b.inputs::<L, G>(i, 1));
        }
        sums.store(&acc);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A product of small random numbers: `x`, panels and the naive result.
    fn case(rows: usize, k: usize, n: usize) -> (Vec<f32>, Vec<f16>, Vec<f32>) {
        let mut s = (rows * 31 + k * 7 + n) as u32;
        let mut next = || {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let x: Vec<f32> = (0..rows * k).map(|_| next() * 3.0).collect();
        let mut panels = vec![f16::ZERO; panel_count(n) * panel_len(k)];
        for j in 0..n {
            for i in 0..=k {
                panels[j / PANEL * panel_len(k) + i * PANEL + j % PANEL] = f16::from_f32(next());
            }
        }
        let mut y = vec![0.0; rows * n];
        for r in 0..rows {
            for j in 0..n {
                let panel = &panels[j / PANEL * panel_len(k)..];
                let bias = panel[j % PANEL].to_f32();
                y[r * n + j] = (0..k)
                    .fold(bias, |y, i| x[r * k + i].mul_add(panel[(i + 1) * PANEL + j % PANEL].to_f32(), y));
            }
        }
        (x, panels, y)
    }

    fn run(
        isa: Isa,
        x: &[f32],
        panels: &[f16],
        rows: usize,
        k: usize,
        n: usize,
        epilogue: Epilogue,
    ) -> Vec<f32> {
        let mut y: Vec<f32> = (0..rows * n).map(|i| i as f32 * 0.01).collect();
        let mut scratch = vec![f32::NAN; product_scratch_len(rows)];
        let lhs = Lhs { x, rows, stride: k, k };
        let mut window = Window::new(&mut y, rows, n, n);
        panel_product(isa, lhs, Rhs::weights(panels, k), epilogue, &mut window, &mut scratch);
        y
    }

    #[test]
    fn every_instruction_set_equals_the_naive_chain() {
        for isa in Isa::variants() {
            for rows in [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 25, 49] {
                for (k, n) in [(1, 1), (5, 33), (64, 64), (257, 40), (600, 100), (39, 224), (70, 300)] {
                    let (x, panels, want) = case(rows, k, n);
                    let got = run(isa, &x, &panels, rows, k, n, Epilogue::Store);
                    assert!(got == want, "{} rows {rows} k {k} n {n}", isa.name());
                    let got = run(isa, &x, &panels, rows, k, n, Epilogue::Add);
                    let want: Vec<f32> = want.iter().enumerate().map(|(i, y)| i as f32 * 0.01 + y).collect();
                    assert!(got == want, "{} add, rows {rows} k {k} n {n}", isa.name());
                }
            }
        }
    }

    #[test]
    #[should_panic = "left-hand side shorter than its sizes"]
    fn sizes_that_overflow_are_refused() {
        let (x, panels) = ([0.0; 3], vec![f16::ZERO; panel_len(1)]);
        let (mut y, mut scratch) = ([0.0; 4], vec![0.0; product_scratch_len(4)]);
        // 3 * stride + 1 is 3 in 64 bits.
        let lhs = Lhs { x: &x, rows: 4, stride: usize::MAX / 3 + 1, k: 1 };
        let rhs = Rhs::weights(&panels, 1);
        panel_product(
            Isa::PORTABLE,
            lhs,
            rhs,
            Epilogue::Store,
            &mut Window::new(&mut y, 4, 1, 1),
            &mut scratch,
        );
    }

    #[test]
    fn swiglu_pairs_panels() {
        for (rows, k, n) in [(9, 70, 45), (1, 70, 45), (2, 37, 200), (1, 64, 300), (8, 130, 300)] {
            // gate 0..32, up 32..64, gate 64..96, up 96..128, ...
            let width = 2 * PANEL * panel_count(n);
            let (x, panels, sums) = case(rows, k, width);
            for isa in Isa::variants() {
                let got = run(isa, &x, &panels, rows, k, n, Epilogue::SwiGlu);
                let portable = run(Isa::PORTABLE, &x, &panels, rows, k, n, Epilogue::SwiGlu);
                assert!(got == portable, "{} rows {rows} k {k} n {n}", isa.name());
                for r in 0..rows {
                    for j in 0..n {
                        let column = r * width + j / 32 * 64 + j % 32;
                        let (gate, up) = (f64::from(sums[column]), f64::from(sums[column + 32]));
                        let want = gate / (1.0 + (-gate).exp()) * up;
                        assert!((f64::from(got[r * n + j]) - want).abs() <= 1e-5 * want.abs().max(1.0));
                    }
                }
            }
        }
    }

    #[test]
    fn a_window_of_panels_and_rows_gives_the_same_bits() {
        let (rows, k, n) = (10, 100, 96);
        let (x, panels, want) = case(rows, k, n);
        let mut scratch = vec![0.0; product_scratch_len(rows)];
        for isa in Isa::variants() {
            for first_row in 0..rows {
                let mut y = vec![0.0; (rows - first_row) * n];
                let lhs = Lhs { x: &x[first_row * k..], rows: rows - first_row, stride: k, k };
                let whole = Window::new(&mut y, rows - first_row, n, n);
                for panel in 0..3 {
                    // SAFETY: one part at a time, and `whole` is not written through.
                    let mut part =
                        unsafe { whole.part(0..rows - first_row, panel * PANEL..(panel + 1) * PANEL) };
                    let rhs = Rhs::weights(&panels, k).from_panel(panel);
                    panel_product(isa, lhs, rhs, Epilogue::Store, &mut part, &mut scratch);
                }
                assert!(y == want[first_row * n..], "{}", isa.name());
            }
        }
    }
}
