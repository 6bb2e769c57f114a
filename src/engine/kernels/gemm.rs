//! Safe strided matrix products over the `gemm` crate: the only place that calls it.

use gemm::Parallelism;

/// A matrix inside a slice: element (i, j) lies at `start + i * row + j * col`.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub data: &'a [f32],
    pub start: usize,
    pub row: usize,
    pub col: usize,
}

impl<'a> View<'a> {
    /// The first `cols` elements of row i, where they lie in one piece.
    #[inline(always)]
    pub fn row(&self, i: usize, cols: usize) -> &'a [f32] {
        debug_assert_eq!(self.col, 1, "rows in one piece");
        &self.data[self.start + i * self.row..][..cols]
    }
}

/// C[i, j] = alpha Σ_k A[i, k] B[k, j] + beta C[i, j] for an n x m block of C at `start` with row stride `ldc`, on this thread.
///
/// # Panics
/// When a view does not hold its matrix.
#[allow(clippy::too_many_arguments, reason = "the arguments of a matrix product")]
pub(super) fn product(size: [usize; 3], alpha: f32, a: View<'_>, b: View<'_>, beta: f32, c: &mut [f32], start: usize, ldc: usize) {
    product_with(Parallelism::None, size, alpha, a, b, beta, c, start, ldc);
}

/// The same on all threads, which share what is packed of A and B: for products that are not one of many.
#[allow(clippy::too_many_arguments, reason = "the arguments of a matrix product")]
pub(super) fn shared_product(size: [usize; 3], alpha: f32, a: View<'_>, b: View<'_>, beta: f32, c: &mut [f32], start: usize, ldc: usize) {
    product_with(Parallelism::Rayon(0), size, alpha, a, b, beta, c, start, ldc);
}

#[allow(clippy::too_many_arguments, reason = "the arguments of a matrix product")]
fn product_with(
    parallelism: Parallelism,
    [n, m, k]: [usize; 3],
    alpha: f32,
    a: View<'_>,
    b: View<'_>,
    beta: f32,
    c: &mut [f32],
    start: usize,
    ldc: usize,
) {
    if n == 0 || m == 0 {
        return;
    }
    let inside = |len: usize, start: usize, rows: usize, row: usize, cols: usize, col: usize| {
        rows == 0 || cols == 0 || start + (rows - 1) * row + (cols - 1) * col < len
    };
    let fits = inside(a.data.len(), a.start, n, a.row, k, a.col)
        && inside(b.data.len(), b.start, k, b.row, m, b.col)
        && inside(c.len(), start, n, ldc, m, 1);
    // Launches are checked when they are recorded, so this is a bug; a product left out would be a wrong result that nobody notices.
    assert!(fits, "matrix product outside its slices");
    if k == 0 {
        // With beta 0 the old values are not read: they may be NaN.
        c[start..]
            .chunks_mut(ldc.max(1))
            .take(n)
            .for_each(|row| row[..m].iter_mut().for_each(|v| *v = if beta == 0.0 { 0.0 } else { beta * *v }));
        return;
    }
    // SAFETY: the strides and extents were checked against the slices above, and `c` is borrowed mutably, so the output does
    // not alias the inputs.
    #[allow(unsafe_code, reason = "the gemm crate takes pointers")]
    unsafe {
        gemm::gemm(
            n,
            m,
            k,
            c.as_mut_ptr().add(start),
            1,
            ldc as isize,
            beta != 0.0,
            a.data.as_ptr().add(a.start),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr().add(b.start),
            b.col as isize,
            b.row as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Rows per task: two tasks or more for every core, of a size that hides the other operand's packing, which each task does for itself.
/// The kernels of `gemm` work on six rows at a time.
pub(super) fn rows_per_task(rows: usize) -> usize {
    let most = rows.div_ceil(rayon::current_num_threads()).next_multiple_of(8);
    rows.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(48).clamp(96, 528).min(most.max(8))
}
