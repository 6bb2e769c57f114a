//! out[j] += Σ_r a[r, j] b[r, j]: with a = E H and b = U the gradient of the loss with respect to factors of U's columns.

use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// a, b [rows, ld]; out [cols].
    pub struct ColumnDotParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
    }
}

impl Launch for ColumnDotParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d((self.cols as usize).div_ceil(32))
    }

    fn cost(&self) -> Cost {
        Cost { flops: 2.0 * f64::from(self.rows) * f64::from(self.cols) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        within("a", self.cols, self.ld)?;
        need("a", len[0], self.rows as usize * self.ld as usize)?;
        need("b", len[1], self.rows as usize * self.ld as usize)?;
        need("out", len[2], self.cols as usize)
    }
}

/// Rows that are summed by themselves before their sums are added up, in order, whatever the number of threads.
const ROWS: usize = 64;

pub(super) fn native(p: &ColumnDotParams, _: &Constants, a: &[f32], b: &[f32], out: &mut [f32]) {
    let (rows, cols, ld) = (p.rows as usize, p.cols as usize, p.ld as usize);
    let (a, b) = (&a[..rows * ld], &b[..rows * ld]);
    let parts: Vec<Vec<f32>> = a
        .par_chunks((ROWS * ld).max(1))
        .zip(b.par_chunks((ROWS * ld).max(1)))
        .map(|(a, b)| {
            let mut sums = vec![0.0; cols];
            for (a, b) in a.chunks(ld).zip(b.chunks(ld)) {
                widest(Add { a: &a[..cols], b: &b[..cols], sums: &mut sums });
            }
            sums
        })
        .collect();
    for part in parts {
        out.iter_mut().zip(part).for_each(|(o, s)| *o += s);
    }
}

/// One row.
struct Add<'a> {
    a: &'a [f32],
    b: &'a [f32],
    sums: &'a mut [f32],
}

impl Loop for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for ((s, a), b) in self.sums.iter_mut().zip(self.a).zip(self.b) {
            *s += a * b;
        }
    }
}
