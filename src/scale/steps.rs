//! Grids of two levels: from the grid of every group by itself to whole numbers of steps that the groups of a super-block share.
//!
//! Objective per row and super-block: the steps d of scales and e of minima, and counts a_g, b_g of every group, with the least
//! Σ_j h_j (d a_g q_j − e b_g − w_j)² with nearest codes, h the diagonal of the metric. Steps around (largest scale) / (largest count) are
//! tried, then those of minima with the scales as they are (`kernels::step_search`). The steps then stay; the counts follow the codes with
//! the full metric where a rounding refits (`round::refit`).

use crate::engine::kernels::{self, step_search};
use crate::engine::{Buffer, Mat, Recording};
use crate::quant::{Grid, GridShape, Offset};

/// How far steps around the one that just reaches the largest scale are tried.
const SPREAD: f32 = 0.15;

/// Records the rounding of a grid, in place, to one that a lattice with steps has; other lattices' grids stay. `w` are the weights that it is
/// for, `weight` [cols] what their squared errors count.
pub(super) fn counted(rec: &mut Recording<'_>, shape: &GridShape, w: Mat<f32>, weight: Buffer<f32>, grid: Grid, search: bool) -> Grid {
    let per_super = shape.lattice.groups_per_super(shape.cols);
    if per_super == 0 {
        return grid;
    }
    let steps = rec.alloc("steps", shape.steps());
    let counts = shape.lattice.counts();
    let p = step_search::StepSearchParams {
        rows: shape.rows as u32,
        cols: shape.cols as u32,
        ld: w.ld as u32,
        group: shape.group() as u32,
        n_group: shape.n_group() as u32,
        per_super: per_super as u32,
        max_code: shape.lattice.max_code(),
        minima: u32::from(shape.lattice.offset == Offset::Minimum),
        n_try: if search { step_search::MAX_TRIES } else { 1 },
        step_dtype: shape.lattice.dtype.code(),
        count_low: *counts.start() as f32,
        count_high: *counts.end() as f32,
        spread: SPREAD,
    };
    kernels::step_search(rec, p, w.buffer, weight, grid.scale, grid.zero, steps);
    Grid { steps, ..grid }
}
