//! A window of a row-major matrix that operations write into.

use std::marker::PhantomData;
use std::ops::Range;

/// Elements from the beginning of the first of `count` runs of `len` elements, which start `stride` elements apart, to the
/// end of the last; `usize::MAX` if there are more.
pub(crate) const fn span(count: usize, stride: usize, len: usize) -> usize {
    match count.checked_sub(1) {
        Some(others) => others.saturating_mul(stride).saturating_add(len),
        None => 0,
    }
}

/// `rows` × `columns` elements of a row-major f32 matrix whose rows are `stride` elements apart.
///
/// It borrows its elements mutably, like a slice; unlike a slice, it can be cut into columns too, so that threads
/// can each fill their own columns of the same rows.
pub struct Window<'a> {
    first: *mut f32,
    rows: usize,
    columns: usize,
    stride: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: a window is an exclusive borrow of plain numbers; it may go to, and be looked at from, another thread
// like `&mut [f32]`.
unsafe impl Send for Window<'_> {}
// SAFETY: as above; all writing needs `&mut Window`, or the promise of `Window::part`.
unsafe impl Sync for Window<'_> {}

impl<'a> Window<'a> {
    /// The first `columns` elements of each of `rows` rows of `matrix`, which start `stride` elements apart.
    ///
    /// # Panics
    /// If the last row ends outside `matrix`, or `columns > stride` where there is more than one row.
    pub fn new(matrix: &'a mut [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(rows <= 1 || columns <= stride, "rows overlap: {columns} columns, stride {stride}");
        assert!(span(rows, stride, columns) <= matrix.len(), "window outside its matrix");
        Window { first: matrix.as_mut_ptr(), rows, columns, stride, matrix: PhantomData }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Row `r`, `columns` elements.
    ///
    /// # Panics
    /// If `r >= rows`.
    #[inline(always)]
    pub fn row(&mut self, r: usize) -> &mut [f32] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        // SAFETY: `new` checked that every row of the window lies inside the borrowed matrix; `&mut self` makes this
        // the only access to the window, and no two windows share an element (`part`).
        unsafe { std::slice::from_raw_parts_mut(self.first.add(r * self.stride), self.columns) }
    }

    /// The window of those rows and columns of this one.
    ///
    /// # Safety
    /// While the result lives, no other window made by this function from `self` shares an element with it, and
    /// `self` itself is not written through.
    ///
    /// # Panics
    /// If a range is outside the window.
    pub unsafe fn part(&self, rows: Range<usize>, columns: Range<usize>) -> Window<'a> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(columns.start <= columns.end && columns.end <= self.columns, "columns {columns:?}");
        // Rows or columns may be empty and start one past the end, where the pointer must not go.
        let first = if rows.is_empty() { 0 } else { rows.start * self.stride + columns.start };
        // SAFETY: `first` is zero, or an element of the window or the end of one of its rows, by the assertions.
        let first = unsafe { self.first.add(first) };
        Window { first, rows: rows.len(), columns: columns.len(), stride: self.stride, matrix: PhantomData }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic = "window outside its matrix"]
    fn sizes_that_overflow_are_refused() {
        // 3 * stride + 1 is 3 in 64 bits.
        Window::new(&mut [0.0; 8], 4, 1, usize::MAX / 3 + 1);
    }

    #[test]
    fn parts_write_their_own_columns() {
        let mut m = vec![0.0; 3 * 8];
        let w = Window::new(&mut m, 3, 7, 8);
        // SAFETY: the two ranges are disjoint, and `w` is not used to write.
        let (mut a, mut b) = unsafe { (w.part(0..3, 0..3), w.part(0..3, 3..7)) };
        for r in 0..3 {
            a.row(r).fill(1.0);
            b.row(r).fill(2.0);
        }
        assert_eq!(m[8..16], [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 0.0]);
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn a_window_outside_its_matrix_is_refused() {
        Window::new(&mut [0.0; 15], 2, 8, 8);
    }
}
