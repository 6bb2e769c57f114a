//! Near ties: weights whose two nearest codes are so nearly equally good that the last bits of f32 arithmetic choose between them. Two
//! engines, or two instruction sets, round sums differently and may choose differently there; error feedback and descent then carry the
//! difference through the rest of the row.
//!
//! What is rounded is a place y on the grid, in steps; the choice is between the codes around it where y lies in the middle. y comes from
//! sums over the d columns: of products with errors of at most half a step, each rounded by eps = 2⁻²⁴. Relative to the diagonal of the
//! metric, sums of absolute values are some tens (d ≤ 4096, equilibrated off-diagonal entries of a few per cent), so y is good to some
//! 1e-6 to 1e-5 of a step, and `TOLERANCE` is above it for any layer. Places that are spread evenly have 2 · `TOLERANCE` of all weights
//! that near to the middle, which is what GPTQ shows (1.5e-4 to 2e-4 on the demo model); descent leaves thirty times fewer: what is that
//! undecided has mostly been moved.

use super::problem::{Problem, Rounded};
use crate::engine::kernels::{self, axpy, near_ties, rescale};
use crate::engine::{Buffer, Mat, Pending, Recording};
use crate::quant::{Grid, GridShape, subtract};

/// In steps of the grid.
pub const TOLERANCE: f32 = 1e-4;

/// Records the near ties of each row when `value` [rows, cols] is rounded to nearest.
pub fn of_nearest(rec: &mut Recording<'_>, shape: &GridShape, grid: Grid, value: Mat<f32>) -> Pending<u32> {
    let ties = rec.alloc("ties", shape.rows);
    let p = near_ties::NearTiesParams {
        rows: shape.rows as u32,
        cols: shape.cols as u32,
        ld: value.ld as u32,
        group: shape.group() as u32,
        n_group: shape.n_group() as u32,
        max_code: shape.lattice.max_code(),
        tolerance: TOLERANCE,
    };
    kernels::near_ties(rec, p, value.buffer, grid.scale, grid.zero, ties);
    let pending = rec.download(ties);
    rec.free(ties);
    pending
}

/// Records the near ties of each row when every weight is moved to its best code while all others stay, as a sweep of the descent would:
/// the best value is ŵ − T / (G_rr H_jj), T = G E H.
pub fn of_visit(rec: &mut Recording<'_>, problem: &Problem<'_>, state: &Rounded) -> Pending<u32> {
    let Problem { shape, target, objective } = problem;
    let w_hat = state.grid.dequantize(rec, shape, state.codes);
    let error = subtract(rec, w_hat, *target);
    let mut gradient = objective.columns.times(rec, error);
    error.free(rec);
    if let Some(rows) = objective.rows {
        let coupled = rows.times(rec, gradient);
        gradient.free(rec);
        gradient = coupled;
    }
    let step = Mat::alloc(rec, "step to the best value", shape.rows, shape.cols);
    let ones = objective.rows.is_none().then(|| rec.upload("ones", vec![1.0f32; shape.rows]));
    let inverse_g = objective.rows.map(|rows| rows.inverse).or(ones).unwrap_or_else(Buffer::none);
    let p = rescale::RescaleParams {
        rows: shape.rows as u32,
        cols: shape.cols as u32,
        row0: 0,
        ld_source: gradient.ld as u32,
        ld_out: step.ld as u32,
    };
    kernels::rescale(rec, p, inverse_g, objective.columns.inverse, gradient.buffer.as_stored(), step.buffer);
    if let Some(ones) = ones {
        rec.free(ones);
    }
    gradient.free(rec);
    let best = state.grid.dequantize(rec, shape, state.codes);
    kernels::axpy(rec, axpy::AxpyParams { n: best.buffer.len() as u32, alpha: -1.0 }, step.buffer, best.buffer);
    step.free(rec);
    let pending = of_nearest(rec, shape, state.grid, best);
    best.free(rec);
    pending
}
