//! Scales for fixed codes: with u = q − z the error E = s u − target is linear in the scales, so L is a quadratic in them.
//!
//! Rows independent: for one group of columns g, b = u_g · T_g, a = u_g H_gg u_gᵀ, ds = −b / a (`kernels::scale_refit`). Per channel u H
//! follows from T = E H and target · H, which is computed once, so a refit costs a pass over memory; with groups X = u_g H_g: is a product
//! per group, rows · d² multiply-adds in all.
//! Rows of a head coupled: all scales (and minima) of a group of a head together, see `joint`.
//!
//! On lattices with minima the code q takes the place of u, and scale and minimum are refit together (`kernels::minimum_refit`): X = q_g H_g:,
//! and 1_g H_g: is the same for all rows.
//!
//! Refits that cost a product run after every fourth sweep only, as do steps of zero points (`zeros`) where they are asked for.

use super::joint::Joint;
use super::problem::{Problem, Rounded};
use super::zeros::Zeros;
use crate::engine::kernels::{self, matmul_nn, minimum_refit, scale_refit};
use crate::engine::{Buffer, Engine, Mat, Recording, submit};
use crate::quant::{Grid, Offset};
use crate::{Error, Result};
use std::ops::Range;

/// Sweeps between refits that cost a product.
const EVERY: u32 = 4;

/// What refits of minima need.
struct Minima {
    /// Zero points of zero: with unit scales codes stand for themselves.
    zeros: Buffer<f32>,
    /// A row of ones.
    ones: Mat<f32>,
}

pub(super) struct Refit {
    /// target · H where rows are independent and have one scale each.
    folded: Option<Mat<f32>>,
    /// A grid of unit scales: what codes stand for in steps.
    ones: Buffer<f32>,
    minima: Option<Minima>,
    /// G on the host, [rows, d_head], or empty.
    g: Vec<f32>,
    zeros: Option<Zeros>,
}

impl Refit {
    /// `zeros`: zero points too. Those of symmetric grids are fixed, and those of coupled rows stay: a step would have to be judged
    /// jointly with the steps of all rows of the head.
    pub fn new(engine: &mut dyn Engine, problem: &Problem<'_>, zeros: bool) -> Result<Self> {
        let (objective, shape) = (&problem.objective, &problem.shape);
        let has_minima = shape.lattice.offset == Offset::Minimum;
        let mut rec = Recording::new();
        let folded = match objective.rows {
            None if problem.shape.n_group() == 1 && !has_minima => Some(objective.columns.times(&mut rec, problem.target)),
            _ => None,
        };
        let ones = rec.upload("unit scale", vec![1.0f32; shape.scales()]);
        let minima = has_minima.then(|| Minima {
            zeros: rec.zeros("zero", shape.scales()),
            ones: Mat::upload(&mut rec, "ones", 1, shape.cols, vec![1.0; shape.cols]),
        });
        let g = objective.rows.map(|rows| rows.g.download(&mut rec));
        let mut back = engine.run(rec)?;
        let g = g.map_or_else(|| Ok(Vec::new()), |g| g.take(&mut back))?;
        let movable = matches!(shape.lattice.offset, Offset::Zero { .. });
        let zeros = zeros && movable && objective.rows.is_none();
        let zeros = if zeros { Some(Zeros::new(engine, problem)?) } else { None };
        Ok(Self { folded, ones, minima, g, zeros })
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        if let Some(folded) = self.folded {
            folded.free(rec);
        }
        rec.free(self.ones);
        if let Some(minima) = self.minima {
            rec.free(minima.zeros);
            minima.ones.free(rec);
        }
        if let Some(zeros) = self.zeros {
            zeros.free(rec);
        }
    }

    /// What follows sweep number `sweep`; `gradient` T is brought up to date. Returns how many zero points moved.
    pub fn after(&self, engine: &mut dyn Engine, sweep: u32, problem: &Problem<'_>, state: &Rounded, gradient: Mat<f32>) -> Result<u64> {
        self.scales(engine, sweep, problem, state, gradient)?;
        match &self.zeros {
            Some(zeros) if sweep % EVERY == EVERY - 1 => zeros.step(engine, problem, state, self.ones, gradient),
            _ => Ok(0),
        }
    }

    fn scales(&self, engine: &mut dyn Engine, sweep: u32, problem: &Problem<'_>, state: &Rounded, gradient: Mat<f32>) -> Result<()> {
        let shape = &problem.shape;
        if self.folded.is_none() && sweep % EVERY != EVERY - 1 {
            return Ok(());
        }
        if let Some(minima) = &self.minima {
            return minima.refit(engine, problem, state, self, gradient);
        }
        let unit_grid = Grid::without_steps(self.ones, state.grid.zero);
        let u = submit(engine, |rec| unit_grid.dequantize(rec, shape, state.codes))?;
        if let Some(wh) = self.folded {
            submit(engine, |rec| independent(rec, problem, state, u, wh, gradient, 0, true))?;
        } else {
            for group in 0..shape.n_group() {
                let x = submit(engine, |rec| group_product(rec, problem, u, columns_of(problem, group)))??;
                if problem.objective.rows.is_some() {
                    Joint { problem, state, g: &self.g, gradient, group }.scales(engine, u, x)?;
                } else {
                    submit(engine, |rec| independent(rec, problem, state, u, x, gradient, group, false))?;
                }
                submit(engine, |rec| x.free(rec))?;
            }
        }
        submit(engine, |rec| u.free(rec))
    }
}

impl Minima {
    /// Scale and minimum of every group.
    fn refit(&self, engine: &mut dyn Engine, problem: &Problem<'_>, state: &Rounded, all: &Refit, gradient: Mat<f32>) -> Result<()> {
        let shape = &problem.shape;
        let codes_alone = Grid::without_steps(all.ones, self.zeros);
        let q = submit(engine, |rec| codes_alone.dequantize(rec, shape, state.codes))?;
        for group in 0..shape.n_group() {
            let columns = columns_of(problem, group);
            let (qh, h) = submit(engine, |rec| {
                let qh = group_product(rec, problem, q, columns.clone())?;
                Ok((qh, group_product(rec, problem, self.ones, columns.clone())?))
            })??;
            if problem.objective.rows.is_some() {
                Joint { problem, state, g: &all.g, gradient, group }.minima(engine, [q, qh], [self.ones, h])?;
            }
            submit(engine, |rec| {
                if problem.objective.rows.is_none() {
                    self.independent(rec, problem, state, [q, qh, h], gradient, group);
                }
                qh.free(rec);
                h.free(rec);
            })?;
        }
        submit(engine, |rec| q.free(rec))
    }

    /// Records one group's scales and minima of independent rows.
    fn independent(
        &self,
        rec: &mut Recording<'_>,
        problem: &Problem<'_>,
        state: &Rounded,
        [q, qh, h]: [Mat<f32>; 3],
        gradient: Mat<f32>,
        group: usize,
    ) {
        let (shape, columns) = (&problem.shape, columns_of(problem, group));
        let p = minimum_refit::MinimumRefitParams {
            rows: shape.rows as u32,
            cols: shape.cols as u32,
            ld: q.ld as u32,
            col0: columns.start as u32,
            width: columns.len() as u32,
            group: group as u32,
            n_group: shape.n_group() as u32,
            scale_dtype: shape.lattice.parameter_dtype().code(),
            per_super: shape.lattice.groups_per_super(shape.cols) as u32,
            count_high: *shape.lattice.counts().end() as f32,
        };
        let Grid { scale, zero, steps } = state.grid;
        kernels::minimum_refit(rec, p, q.buffer, qh.buffer, h.buffer, steps, scale, zero, gradient.buffer);
    }
}

pub(super) fn columns_of(problem: &Problem<'_>, group: usize) -> Range<usize> {
    let width = problem.shape.group();
    group * width..((group + 1) * width).min(problem.shape.cols)
}

/// Records one group's scales of independent rows.
#[allow(clippy::too_many_arguments, reason = "the operands of one launch")]
fn independent(
    rec: &mut Recording<'_>,
    problem: &Problem<'_>,
    state: &Rounded,
    u: Mat<f32>,
    uh: Mat<f32>,
    gradient: Mat<f32>,
    group: usize,
    folded: bool,
) {
    let (shape, columns) = (&problem.shape, columns_of(problem, group));
    let p = scale_refit::ScaleRefitParams {
        rows: shape.rows as u32,
        cols: shape.cols as u32,
        ld: u.ld as u32,
        col0: columns.start as u32,
        width: columns.len() as u32,
        group: group as u32,
        n_group: shape.n_group() as u32,
        scale_dtype: shape.lattice.parameter_dtype().code(),
        folded: u32::from(folded),
        per_super: shape.lattice.groups_per_super(shape.cols) as u32,
        count_low: *shape.lattice.counts().start() as f32,
        count_high: *shape.lattice.counts().end() as f32,
    };
    kernels::scale_refit(rec, p, u.buffer, uh.buffer, state.grid.steps, state.grid.scale, gradient.buffer);
}

/// Records u[:, columns] · H[columns, :].
pub(super) fn group_product(rec: &mut Recording<'_>, problem: &Problem<'_>, u: Mat<f32>, columns: Range<usize>) -> Result<Mat<f32>> {
    let metric = problem.objective.columns;
    if columns.len() == problem.shape.cols {
        return Ok(metric.times(rec, u));
    }
    let found = metric.panels().and_then(|panels| panels.holding(columns.start));
    let panel = found.ok_or_else(|| Error::internal("scale refit", "no panel of the metric holds the group"))?;
    let x = Mat::alloc(rec, "u H", u.rows, u.cols);
    let p = matmul_nn::MatmulNnParams {
        n: u.rows as u32,
        m: u.cols as u32,
        k: columns.len() as u32,
        lda: u.ld as u32,
        ldb: panel.mat.ld as u32,
        ldc: x.ld as u32,
        a_offset: columns.start as u32,
        b_offset: ((columns.start - panel.start) * panel.mat.ld) as u32,
        c_offset: 0,
        alpha: 1.0,
        beta: 0.0,
    };
    kernels::matmul_nn(rec, p, u.buffer, panel.mat.buffer, x.buffer);
    Ok(x)
}
