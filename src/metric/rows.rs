//! The row metric G of a linear whose rows belong to heads: rows of one head are coupled, heads are not.

use crate::engine::kernels::{self, matmul_nn};
use crate::engine::{Buffer, Mat, Recording};

/// Symmetric positive G_h [d_head, d_head] of consecutive heads, one below the other.
#[derive(Clone, Copy, Debug)]
pub struct RowMetric {
    pub d_head: usize,
    /// [n_head · d_head, d_head]
    pub g: Mat<f32>,
    /// 1 / G_rr [n_head · d_head], 0 where that is 0.
    pub inverse: Buffer<f32>,
}

impl RowMetric {
    /// `g` is [n_head, d_head, d_head].
    pub fn upload<'a>(rec: &mut Recording<'a>, d_head: usize, g: &'a [f32]) -> Self {
        let rows = g.len() / d_head.max(1);
        let inverse = (0..rows).map(|r| g[r * d_head + r % d_head]).map(|g| if g > 0.0 { 1.0 / g } else { 0.0 });
        let inverse = rec.upload("row metric", inverse.collect::<Vec<_>>());
        Self { d_head, g: Mat::upload(rec, "row metric", rows, d_head, g), inverse }
    }

    /// Records G_h M_h of every head, [rows, d].
    pub fn times(&self, rec: &mut Recording<'_>, m: Mat<f32>) -> Mat<f32> {
        let out = Mat::alloc(rec, "row metric times error", m.rows, m.cols);
        for head in 0..self.g.rows / self.d_head {
            let row0 = head * self.d_head;
            let p = matmul_nn::MatmulNnParams {
                n: self.d_head as u32,
                m: m.cols as u32,
                k: self.d_head as u32,
                lda: self.g.ld as u32,
                ldb: m.ld as u32,
                ldc: out.ld as u32,
                a_offset: (row0 * self.g.ld) as u32,
                b_offset: (row0 * m.ld) as u32,
                c_offset: (row0 * out.ld) as u32,
                alpha: 1.0,
                beta: 0.0,
            };
            kernels::matmul_nn(rec, p, self.g.buffer, m.buffer, out.buffer);
        }
        out
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        self.g.free(rec);
        rec.free(self.inverse);
    }
}
