//! Scales for fixed codes: with u = q − z the error E = s u − target is linear in the scales, so L is a quadratic in them.
//!
//! Rows independent: for one group of columns g, b = u_g · T_g, a = u_g H_gg u_gᵀ, ds = −b / a (`kernels::scale_refit`). Per channel u H
//! follows from T = E H and target · H, which is computed once, so a refit costs a pass over memory; with groups X = u_g H_g: is a product
//! per group, rows · d² multiply-adds in all.
//! Rows of a head coupled: all d_head scales of a group jointly, (G ∘ (U_g H_gg U_gᵀ)) ds = −rowsum(U_g ∘ T_g), in f64 on the host:
//! d_head³ / 3 per head and group; T += G diag(ds) X. The solution is rounded to stored scales and taken where it lowers the exact
//! quadratic, halved up to three times, else dropped.
//!
//! On lattices with minima the code q takes the place of u, and scale and minimum are refit together (`kernels::minimum_refit`): X = q_g H_g:,
//! and 1_g H_g: is the same for all rows. Where rows of a head are coupled such grids stay as they were found.
//!
//! Refits that cost a product run after every fourth sweep only, as do steps of zero points (`zeros`) where they are asked for.

use super::descent::replace;
use super::problem::{Problem, Rounded};
use super::zeros::Zeros;
use crate::engine::kernels::scale_refit::StoredScale;
use crate::engine::kernels::{self, matmul_nn, matmul_nt, minimum_refit, row_dot, scale_refit};
use crate::engine::{Buffer, Engine, Mat, Recording, submit};
use crate::quant::{Grid, GridShape, HostGrid, Offset};
use crate::{Error, Result};
use faer::prelude::Solve;
use faer::{Mat as Dense, Side};
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
            // A joint step of a head's rows would have to round all of their minima.
            return if problem.objective.rows.is_none() { minima.refit(engine, problem, state, self.ones, gradient) } else { Ok(()) };
        }
        let unit_grid = Grid::without_steps(self.ones, state.grid.zero);
        let u = submit(engine, |rec| unit_grid.dequantize(rec, shape, state.codes))?;
        if let Some(wh) = self.folded {
            submit(engine, |rec| independent(rec, problem, state, u, wh, gradient, 0, true))?;
        } else {
            for group in 0..shape.n_group() {
                let x = submit(engine, |rec| group_product(rec, problem, u, columns_of(problem, group)))??;
                if problem.objective.rows.is_some() {
                    self.coupled(engine, problem, state, u, x, gradient, group)?;
                } else {
                    submit(engine, |rec| independent(rec, problem, state, u, x, gradient, group, false))?;
                }
                submit(engine, |rec| x.free(rec))?;
            }
        }
        submit(engine, |rec| u.free(rec))
    }

    /// The scales of one group of all heads. `x` is u_g H_g:.
    #[allow(clippy::too_many_arguments, reason = "the operands of one step")]
    fn coupled(
        &self,
        engine: &mut dyn Engine,
        problem: &Problem<'_>,
        state: &Rounded,
        u: Mat<f32>,
        x: Mat<f32>,
        gradient: Mat<f32>,
        group: usize,
    ) -> Result<()> {
        let (shape, Some(metric)) = (&problem.shape, problem.objective.rows) else { return Ok(()) };
        let (d_head, n_group) = (metric.d_head, shape.n_group());
        let mut rec = Recording::new();
        let squares = Mat::alloc(&mut rec, "u H uᵀ", shape.rows, d_head);
        let columns = columns_of(problem, group);
        let p = matmul_nt::MatmulNtParams {
            n: d_head as u32,
            m: d_head as u32,
            k: columns.len() as u32,
            lda: x.ld as u32,
            ldw: u.ld as u32,
            ldc: squares.ld as u32,
            a_offset: columns.start as u32,
            w_offset: columns.start as u32,
            a_batch: (d_head * x.ld) as u32,
            w_batch: (d_head * u.ld) as u32,
            c_batch: (d_head * squares.ld) as u32,
            batches: (shape.rows / d_head) as u32,
            alpha: 1.0,
            ..Default::default()
        };
        kernels::matmul_nt(&mut rec, p, x.buffer, u.buffer.as_stored(), Buffer::none(), squares.buffer);
        let slopes = rec.alloc("u T", shape.scales());
        let p = row_dot::RowDotParams {
            rows: shape.rows as u32,
            cols: shape.cols as u32,
            ld: u.ld as u32,
            group: shape.group() as u32,
            n_group: n_group as u32,
        };
        kernels::row_dot(&mut rec, p, u.buffer, gradient.buffer, slopes);
        let (uhu, b, grid) = (squares.download(&mut rec), rec.download(slopes), state.grid.download(&mut rec));
        squares.free(&mut rec);
        rec.free(slopes);
        let mut back = engine.run(rec)?;
        let (uhu, b, HostGrid { mut scale, steps, .. }) = (uhu.take(&mut back)?, back.take(b)?, grid.take(&mut back)?);
        let stored: Vec<StoredScale> = (0..shape.rows).map(|row| stored_scale(shape, &steps, row, group)).collect();

        let mut moved = self.g.clone();
        for (head, moved) in moved.chunks_mut(d_head * d_head).enumerate() {
            let rows = head * d_head..(head + 1) * d_head;
            let square = rows.start * d_head..rows.end * d_head;
            let quadratic = Dense::from_fn(d_head, d_head, |i, j| {
                let at = square.start + i * d_head + j;
                f64::from(self.g[at]) * f64::from(uhu[at])
            });
            let slope: Vec<f64> = rows.clone().map(|r| f64::from(b[r * n_group + group])).collect();
            let before: Vec<f32> = rows.clone().map(|r| scale[r * n_group + group]).collect();
            let after = joint(&quadratic, &slope, &before, &stored[rows.clone()]).unwrap_or_else(|| before.clone());
            for (r, after) in rows.zip(&after) {
                scale[r * n_group + group] = *after;
            }
            // G diag(ds), so that T += G diag(ds) X is one product.
            for row in moved.chunks_mut(d_head) {
                for ((g, after), before) in row.iter_mut().zip(&after).zip(&before) {
                    *g *= after - before;
                }
            }
        }
        let mut rec = Recording::new();
        replace(&mut rec, state.grid.scale, scale);
        let moved = Mat::upload(&mut rec, "row metric times change", shape.rows, d_head, moved);
        for row0 in (0..shape.rows).step_by(d_head) {
            let p = matmul_nn::MatmulNnParams {
                n: d_head as u32,
                m: shape.cols as u32,
                k: d_head as u32,
                lda: moved.ld as u32,
                ldb: x.ld as u32,
                ldc: gradient.ld as u32,
                a_offset: (row0 * moved.ld) as u32,
                b_offset: (row0 * x.ld) as u32,
                c_offset: (row0 * gradient.ld) as u32,
                alpha: 1.0,
                beta: 1.0,
            };
            kernels::matmul_nn(&mut rec, p, moved.buffer, x.buffer, gradient.buffer);
        }
        moved.free(&mut rec);
        engine.run(rec)?;
        Ok(())
    }
}

impl Minima {
    /// Scale and minimum of every group. `unit` are scales of one.
    fn refit(&self, engine: &mut dyn Engine, problem: &Problem<'_>, state: &Rounded, unit: Buffer<f32>, gradient: Mat<f32>) -> Result<()> {
        let shape = &problem.shape;
        let codes_alone = Grid::without_steps(unit, self.zeros);
        let q = submit(engine, |rec| codes_alone.dequantize(rec, shape, state.codes))?;
        for group in 0..shape.n_group() {
            let columns = columns_of(problem, group);
            submit(engine, |rec| {
                let qh = group_product(rec, problem, q, columns.clone())?;
                let h = group_product(rec, problem, self.ones, columns.clone())?;
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
                qh.free(rec);
                h.free(rec);
                Ok(())
            })??;
        }
        submit(engine, |rec| q.free(rec))
    }
}

pub(super) fn columns_of(problem: &Problem<'_>, group: usize) -> Range<usize> {
    let width = problem.shape.group();
    group * width..((group + 1) * width).min(problem.shape.cols)
}

/// How the scale of a group of a row is stored. `steps` are those of all rows.
fn stored_scale(shape: &GridShape, steps: &[f32], row: usize, group: usize) -> StoredScale {
    let (lattice, counts) = (shape.lattice, shape.lattice.counts());
    let step = match lattice.groups_per_super(shape.cols) {
        0 => 0.0,
        per_super => steps[(row * lattice.n_super(shape.cols) + group / per_super) * 2],
    };
    let [low, high] = [*counts.start() as f32, *counts.end() as f32];
    StoredScale { dtype: lattice.parameter_dtype().code(), step, low, high }
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

/// Scales that lower 2 ds b + dsᵀ A ds, all of one head; `None` where no step along the solution of A ds = −b does.
fn joint(a: &Dense<f64>, b: &[f64], scale: &[f32], stored: &[StoredScale]) -> Option<Vec<f32>> {
    let n = b.len();
    // Rows that do not count (their codes are all zero, or G is zero there) keep their scale.
    let dead = |i: usize| a[(i, i)] <= 0.0;
    let matrix = Dense::from_fn(n, n, |i, j| match i == j {
        true if dead(i) => 1.0,
        // Far below what f32 statistics tell, so that a factorisation exists.
        true => a[(i, j)] * (1.0 + 1e-6),
        false if dead(i) || dead(j) => 0.0,
        false => a[(i, j)],
    });
    let rhs = Dense::from_fn(n, 1, |i, _| if dead(i) { 0.0 } else { -b[i] });
    let full = matrix.llt(Side::Lower).ok()?.solve(&rhs);
    (0..4).map(|halved| 0.5f64.powi(halved)).find_map(|part| {
        let exact = |i: usize| (f64::from(scale[i]) + part * full[(i, 0)]) as f32;
        // No scale changes its sign.
        let keeps_sign = |i: usize| dead(i) || exact(i) * scale[i].signum() > 0.0;
        let after: Vec<f32> = (0..n).map(|i| if dead(i) { scale[i] } else { stored[i].nearest(exact(i)) }).collect();
        let ds: Vec<f64> = after.iter().zip(scale).map(|(after, before)| f64::from(*after) - f64::from(*before)).collect();
        let change: f64 = (0..n).map(|i| ds[i] * (2.0 * b[i] + (0..n).map(|j| a[(i, j)] * ds[j]).sum::<f64>())).sum();
        let fine = (0..n).all(keeps_sign) && after.iter().all(|s| s.is_finite());
        (fine && change < 0.0).then_some(after)
    })
}
