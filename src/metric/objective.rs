//! The loss of one rounding problem: L(E) = Σ_h tr(G_h E_h H E_hᵀ), gradient 2 G E H.

use super::{ColumnMetric, RowMetric};
use crate::engine::kernels::{self, row_dot};
use crate::engine::{Buffer, Mat, Recording};

/// The metrics of a set of rows: all rows of a linear, or those of one head.
#[derive(Clone, Copy, Debug)]
pub struct Objective<'m> {
    pub columns: &'m ColumnMetric,
    /// Its heads are the rows of the problem, in order; `None` is G = I.
    pub rows: Option<&'m RowMetric>,
}

impl Objective<'_> {
    /// Rows that the loss couples: those of a head, or each by itself.
    pub fn unit(&self) -> usize {
        self.rows.map_or(1, |rows| rows.d_head)
    }

    /// Records the loss [rows]: entry r is (G E H Eᵀ)_rr, so that the sum over a unit is the unit's loss.
    pub fn losses(&self, rec: &mut Recording<'_>, e: Mat<f32>) -> Buffer<f32> {
        let Some(rows) = self.rows else { return self.columns.losses(rec, e, e.cols) };
        let eh = self.columns.times(rec, e);
        let geh = rows.times(rec, eh);
        eh.free(rec);
        let out = rec.alloc("loss", e.rows);
        let (rows, cols) = (e.rows as u32, e.cols as u32);
        let p = row_dot::RowDotParams { rows, cols, ld: e.ld as u32, group: cols.max(1), n_group: 1 };
        kernels::row_dot(rec, p, geh.buffer, e.buffer, out);
        geh.free(rec);
        out
    }
}
