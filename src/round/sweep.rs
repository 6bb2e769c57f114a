//! One sweep of coordinate descent over all columns, and what it works on.
//!
//! Columns in natural order, 32 at a time (16 with coupled rows): a launch walks them and records the change v = G δ, a product brings it
//! to the panel of 128 columns that holds them, and after the panel two products bring its 128 changes to the columns left and right.
//! Shapes: T [rows, d] f32 and the codes; cost of a sweep: rows · d² multiply-adds in products, rows · d · 32 in the walk.

use super::problem::{Problem, Rounded};
use crate::engine::kernels::{self, descent_block, descent_heads, matmul_nn, row_dot};
use crate::engine::{Buffer, Engine, Mat, Panel, Panels, Pending, Recording, submit};
use crate::quant::subtract;
use crate::{Error, Result};
use std::ops::Range;

/// Columns whose changes are brought to the rest of the matrix at once. Panels of the metric start at multiples of it.
const PANEL: usize = 128;

/// What sweeps work on.
pub(super) struct Walk<'p> {
    problem: &'p Problem<'p>,
    state: Rounded,
    panels: &'p Panels,
    /// T = G E H [rows, d].
    pub gradient: Mat<f32>,
    /// G times the change of E in the columns of a panel [rows, 128].
    change: Mat<f32>,
    /// Mean loss per weight of each row's unit at the start.
    heat: Buffer<f32>,
    /// Codes of each row that moved since the last look.
    moves: Buffer<u32>,
}

impl<'p> Walk<'p> {
    /// Also the loss of every unit at the start.
    pub fn new(engine: &mut dyn Engine, problem: &'p Problem<'p>, state: Rounded) -> Result<(Self, Vec<f64>)> {
        let (rows, cols, unit) = (problem.shape.rows, problem.shape.cols, problem.objective.unit());
        let no_matrix = || Error::internal("coordinate descent", "the metric is no matrix");
        let panels = problem.objective.columns.panels().ok_or_else(no_matrix)?;
        let mut rec = Recording::new();
        let mut walk = Self {
            problem,
            state,
            panels,
            gradient: Mat::alloc(&mut rec, "gradient", rows, cols),
            change: Mat::alloc(&mut rec, "change", rows, PANEL.min(cols)),
            heat: Buffer::none(),
            moves: rec.zeros("moves", rows),
        };
        let pending = walk.losses(&mut rec);
        let losses = unit_losses(engine.run(rec)?.take(pending)?, unit)?;
        let heat = (0..rows).map(|r| (losses[r / unit].max(0.0) / (unit * cols) as f64) as f32).collect::<Vec<_>>();
        walk.heat = submit(engine, |rec| rec.upload("heat", heat))?;
        Ok((walk, losses))
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        self.gradient.free(rec);
        self.change.free(rec);
        rec.free(self.heat);
        rec.free(self.moves);
    }

    /// Records T anew from codes and grid, and returns E.
    fn error(&mut self, rec: &mut Recording<'_>) -> Mat<f32> {
        let Problem { shape, target, objective } = self.problem;
        let w_hat = self.state.grid.dequantize(rec, shape, self.state.codes);
        let error = subtract(rec, w_hat, *target);
        self.gradient.free(rec);
        let eh = objective.columns.times(rec, error);
        self.gradient = match objective.rows {
            None => eh,
            Some(rows) => {
                let geh = rows.times(rec, eh);
                eh.free(rec);
                geh
            }
        };
        error
    }

    /// Records T anew: the rounding errors of many updates are gone.
    pub fn refresh(&mut self, rec: &mut Recording<'_>) {
        self.error(rec).free(rec);
    }

    /// Records T anew, and the download of every row's loss.
    pub fn losses(&mut self, rec: &mut Recording<'_>) -> Pending<f32> {
        let error = self.error(rec);
        let out = rec.alloc("loss", error.rows);
        let (rows, cols) = (error.rows as u32, error.cols as u32);
        let p = row_dot::RowDotParams { rows, cols, ld: error.ld as u32, group: cols, n_group: 1 };
        kernels::row_dot(rec, p, self.gradient.buffer, error.buffer, out);
        let pending = rec.download(out);
        rec.free(out);
        error.free(rec);
        pending
    }

    /// Records the read-back of the counters and their reset.
    pub fn take_moves(&mut self, rec: &mut Recording<'_>) -> Pending<u32> {
        let pending = rec.download(self.moves);
        rec.free(self.moves);
        self.moves = rec.zeros("moves", self.problem.shape.rows);
        pending
    }

    /// Records one sweep over all columns.
    pub fn sweep(&self, rec: &mut Recording<'_>, row0: u32, key: u32, temperature: f32) {
        let width = if self.problem.objective.rows.is_some() { descent_heads::MAX_WIDTH } else { descent_block::MAX_WIDTH } as usize;
        for panel in self.panels.iter() {
            let end = panel.range().end;
            for first in panel.range().step_by(PANEL) {
                let last = (first + PANEL).min(end);
                for block in (first..last).step_by(width) {
                    let block = block..(block + width).min(last);
                    self.walk(rec, panel, first, block.clone(), row0, key, temperature);
                    self.update(rec, panel, first, block, first..last);
                }
                self.update(rec, panel, first, first..last, 0..first);
                self.update(rec, panel, first, first..last, last..self.problem.shape.cols);
            }
        }
    }

    /// Columns `block` of the panel whose changes are recorded from column `first` on.
    #[allow(clippy::too_many_arguments, reason = "a block and a sweep's noise")]
    fn walk(&self, rec: &mut Recording<'_>, panel: &Panel, first: usize, block: Range<usize>, row0: u32, key: u32, temperature: f32) {
        let Self { state, gradient, change, heat, moves, .. } = self;
        let shape = &self.problem.shape;
        let [cols, ld, col0, width] = [shape.cols, gradient.ld, block.start, block.len()].map(|v| v as u32);
        let [h_row, h_col, ld_h] = [block.start - panel.start, block.start, panel.mat.ld].map(|v| v as u32);
        let [ld_change, change_col] = [change.ld, block.start - first].map(|v| v as u32);
        let [group, n_group] = [shape.group(), shape.n_group()].map(|v| v as u32);
        let max_code = shape.lattice.max_code();
        if let Some(metric) = self.problem.objective.rows {
            let [n_head, d_head, ld_g] = [shape.rows / metric.d_head, metric.d_head, metric.g.ld].map(|v| v as u32);
            #[rustfmt::skip]
            let p = descent_heads::DescentHeadsParams {
                n_head, d_head, ld_g, cols, ld, col0, width, h_row, h_col, ld_h, ld_change, change_col, group, n_group, max_code,
                row0, key, temperature,
            };
            let g = metric.g.buffer;
            return kernels::descent_heads(
                rec,
                p,
                g,
                panel.mat.buffer,
                state.grid.scale,
                *heat,
                gradient.buffer,
                state.codes.buffer,
                change.buffer,
                *moves,
            );
        }
        #[rustfmt::skip]
        let p = descent_block::DescentBlockParams {
            rows: shape.rows as u32, cols, ld, col0, width, h_row, h_col, ld_h, ld_change, change_col, group, n_group, max_code,
            row0, key, temperature,
        };
        kernels::descent_block(
            rec,
            p,
            panel.mat.buffer,
            state.grid.scale,
            *heat,
            gradient.buffer,
            state.codes.buffer,
            change.buffer,
            *moves,
        );
    }

    /// T[:, to] += change of the columns `source` · H[source, to].
    fn update(&self, rec: &mut Recording<'_>, panel: &Panel, first: usize, source: Range<usize>, to: Range<usize>) {
        if to.is_empty() {
            return;
        }
        let p = matmul_nn::MatmulNnParams {
            n: self.gradient.rows as u32,
            m: to.len() as u32,
            k: source.len() as u32,
            lda: self.change.ld as u32,
            ldb: panel.mat.ld as u32,
            ldc: self.gradient.ld as u32,
            a_offset: (source.start - first) as u32,
            b_offset: ((source.start - panel.start) * panel.mat.ld + to.start) as u32,
            c_offset: to.start as u32,
            alpha: 1.0,
            beta: 1.0,
        };
        kernels::matmul_nn(rec, p, self.change.buffer, panel.mat.buffer, self.gradient.buffer);
    }
}

/// Sums of a row's losses over the rows of a unit.
pub(super) fn unit_losses(rows: Vec<f32>, unit: usize) -> Result<Vec<f64>> {
    let sums: Vec<f64> = rows.chunks(unit).map(|rows| rows.iter().map(|l| f64::from(*l)).sum()).collect();
    if sums.iter().all(|l| l.is_finite()) {
        Ok(sums)
    } else {
        Err(Error::numeric("loss of a descent", "is not finite: weights or statistics overflow f32"))
    }
}
