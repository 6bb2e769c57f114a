//! Products whose left operand is mostly zeros, on the native engine: C[i, :] += alpha Σ_k A[i, k] B[k, :] over the k where A[i, k] is not zero.
//!
//! Coordinate descent moves a few weights in a hundred per sweep, so the changes it brings to the other columns are nearly all zeros. One
//! product of a weight and a row of B costs about three times a dense one's share, since it is bound by the first and second cache instead of
//! by arithmetic; below [`SPARSE`] the zeros that are left out outweigh that.

use super::gemm::View;
use super::simd::{Loop, widest};

/// Up to this part of A may be non-zero.
const SPARSE: f64 = 0.2;
/// Columns of B and C at a time: a row of C stays in the first cache. Long pieces are what a processor reads ahead; pieces so narrow that all of
/// B stays in the second cache were two to five times slower.
const COLUMNS: usize = 4096;

/// Are so few elements of some rows of an n x k matrix not zero that it is worth a closer look?
pub(super) fn seems_so(a: View<'_>, [n, k]: [usize; 2]) -> bool {
    const SAMPLE: usize = 8;
    let rows = (0..n).step_by(n.div_ceil(SAMPLE).max(1));
    let most = SPARSE * (rows.len() * k) as f64;
    rows.map(|i| a.row(i, k).iter().filter(|v| **v != 0.0).count()).sum::<usize>() as f64 <= most
}

/// The elements of a matrix that are not zero: their columns and values row by row, and where each row ends.
pub(super) struct Sparse {
    elements: Vec<(u32, f32)>,
    ends: Vec<usize>,
}

impl Sparse {
    /// An n x k matrix whose rows lie in one piece, unless so much of it is not zero that a dense product is faster.
    ///
    /// # Panics
    /// When the view does not hold its matrix.
    pub fn of(a: View<'_>, [n, k]: [usize; 2]) -> Option<Self> {
        let most = (SPARSE * (n * k) as f64) as usize;
        let mut sparse = Self { elements: Vec::with_capacity(most + k), ends: Vec::with_capacity(n) };
        for i in 0..n {
            widest(Pick { row: a.row(i, k), out: &mut sparse.elements });
            if sparse.elements.len() > most {
                return None;
            }
            sparse.ends.push(sparse.elements.len());
        }
        Some(sparse)
    }

    /// C += alpha A B for the first m columns of B and C, with row stride `ldc`, on this thread. Rows of B lie in one piece.
    ///
    /// # Panics
    /// When a view does not hold its matrix.
    pub fn add_product(&self, m: usize, alpha: f32, b: View<'_>, c: &mut [f32], ldc: usize) {
        for first in (0..m).step_by(COLUMNS) {
            let last = (first + COLUMNS).min(m);
            let mut start = 0;
            for (i, end) in self.ends.iter().enumerate() {
                if start < *end {
                    let row = &mut c[i * ldc..][first..last];
                    widest(Row { elements: &self.elements[start..*end], alpha, b, first, c: row });
                }
                start = *end;
            }
        }
    }
}

/// Elements of a row that are not zero.
struct Pick<'a> {
    row: &'a [f32],
    out: &'a mut Vec<(u32, f32)>,
}

impl Loop for Pick<'_> {
    type Output = ();

    /// Sixteen at a time: most of those are zeros altogether.
    #[inline(always)]
    fn call(self) {
        let Pick { row, out } = self;
        for (at, lanes) in row.chunks(16).enumerate() {
            if lanes.iter().fold(0, |any, v| any | v.to_bits() << 1) == 0 {
                continue;
            }
            for (j, v) in lanes.iter().enumerate() {
                if *v != 0.0 {
                    out.push(((at * 16 + j) as u32, *v));
                }
            }
        }
    }
}

/// One row of C, from column `first` on.
struct Row<'a> {
    elements: &'a [(u32, f32)],
    alpha: f32,
    b: View<'a>,
    first: usize,
    c: &'a mut [f32],
}

impl Loop for Row<'_> {
    type Output = ();

    /// Four rows of B at a time: C is read and written once for them.
    #[inline(always)]
    fn call(self) {
        let Row { elements, alpha, b, first, c } = self;
        let m = c.len();
        let (fours, rest) = elements.as_chunks::<4>();
        for four in fours {
            let [a0, a1, a2, a3] = four.map(|(_, a)| alpha * a);
            let [b0, b1, b2, b3] = four.map(|(j, _)| &b.row(j as usize, first + m)[first..]);
            for i in 0..m {
                c[i] += (a0 * b0[i] + a1 * b1[i]) + (a2 * b2[i] + a3 * b3[i]);
            }
        }
        for (j, a) in rest {
            let a = alpha * a;
            for (c, b) in c.iter_mut().zip(&b.row(*j as usize, first + m)[first..]) {
                *c += a * b;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: usize = 11;
    const K: usize = 75;
    const LD: usize = 80;

    /// [N, K] with one element in `every` not zero, spread over columns; rows are `LD` apart and what lies between them is not zero.
    fn operand(every: usize) -> Vec<f32> {
        let at = |i: usize, j: usize| if j >= K || (7 * i + j).is_multiple_of(every) { 1.0 + (i * LD + j) as f32 / 64.0 } else { 0.0 };
        (0..N * LD).map(|index| at(index / LD, index % LD)).collect()
    }

    fn view(data: &[f32], row: usize) -> View<'_> {
        View { data, start: 0, row, col: 1 }
    }

    #[test]
    fn what_is_not_zero_is_multiplied_and_nothing_else() {
        let m = 37;
        let (a, b): (_, Vec<f32>) = (operand(9), (0..K * m).map(|i| (i % 23) as f32 - 11.0).collect());
        assert!(seems_so(view(&a, LD), [N, K]));
        let sparse = Sparse::of(view(&a, LD), [N, K]).expect("one in nine is few");
        assert_eq!(sparse.elements.len(), (0..N * LD).filter(|i| i % LD < K && a[*i] != 0.0).count());
        let mut c = vec![2.0f32; N * m];
        sparse.add_product(m, -0.5, view(&b, m), &mut c, m);
        for (i, row) in c.chunks(m).enumerate() {
            for (j, c) in row.iter().enumerate() {
                let wanted = 2.0 - 0.5 * (0..K).map(|k| f64::from(a[i * LD + k]) * f64::from(b[k * m + j])).sum::<f64>();
                assert!((f64::from(*c) - wanted).abs() <= 1e-5 * (1.0 + wanted.abs()), "[{i}, {j}]: {c} instead of {wanted}");
            }
        }
    }

    #[test]
    fn where_too_much_is_not_zero_the_product_stays_dense() {
        let a = operand(3);
        assert!(!seems_so(view(&a, LD), [N, K]));
        assert!(Sparse::of(view(&a, LD), [N, K]).is_none());
    }
}
