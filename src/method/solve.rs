//! One linear, from stored weights to codes: target, grid, rounding, and the comparison with round-to-nearest.
//!
//! Both results are scored by the method's own loss and the better one is kept, row by row or, where a row metric couples the rows of
//! a head, head by head: a layer never ends worse than RTN on its own objective. What is independent is solved piece by piece
//! (`pieces`), so a weight may be larger than a buffer of the device.

use super::Settings;
use super::columns::{Columns, FactorRecord};
use super::pieces::{self, Piece, gather_rows};
use super::targets::Targets;
use crate::calib::Gram;
use crate::engine::kernels::{self, select_rows};
use crate::engine::matrix::{self, STRIDE_ALIGN};
use crate::engine::{Engine, Limits, Mat, Pending, Recording, Weight, submit};
use crate::metric::{Heads, Objective, RowMetric};
use crate::quant::{GridShape, HostGrid, Lattice, PackedLinear};
use crate::round::adaround::{AdaRound, AdaRoundReport, adaround};
use crate::round::descent::{Descent, DescentReport, descend};
use crate::round::gptq::RowFactor;
use crate::round::{Problem, Rounded, Rounding, Start, orders, ties};
use crate::scale::{self, ScaleRule};
use crate::{Error, Result};
use std::ops::Range;

/// Bytes of a piece's weights in f32 at most: a handful of matrices of that size are in memory at once. Heads have a hundred times the rows
/// that keep a device busy.
const PIECE: u64 = 64 << 20;

/// The linears that read one input: their metric on the device, factored once.
pub struct Solver {
    settings: Settings,
    shared: Columns,
    targets: Option<Targets>,
}

/// The result for one linear.
pub struct Solved {
    pub packed: PackedLinear,
    /// The quantized values on the device.
    pub w_hat: Weight,
    pub record: SolveRecord,
}

/// How a linear was solved: for the report. Losses are under the method's objective, summed over rows.
#[derive(Clone, Debug, Default)]
pub struct SolveRecord {
    /// Of round-to-nearest on the min/max grid.
    pub loss_rtn: f64,
    /// Of the rounding's start, before refinements.
    pub loss_start: f64,
    pub loss: f64,
    /// Rows whose RTN codes were better and were kept.
    pub rows_from_rtn: usize,
    /// Weights that the last bits of f32 arithmetic rounded, see `round::ties`.
    pub ties: usize,
    /// Rows that start from another column order than the first; `None` where only that was tried.
    pub rows_from_orders: Option<usize>,
    pub factor: Option<FactorRecord>,
    pub adaround: Option<AdaRoundReport>,
    pub descent: Option<DescentReport>,
    /// Seconds for the scale search, and for the rounding with its refinements.
    pub scale_seconds: f64,
    pub round_seconds: f64,
}

/// Codes of some rows, with their grid, and on the host the grid, and the loss and the near ties of each row.
struct Candidate {
    state: Rounded,
    grid: HostGrid,
    loss: Vec<f32>,
    ties: Vec<u32>,
}

impl Candidate {
    /// Runs `rec`, which leaves `state`, and reads back what there is to know of it; `ties` records the near ties.
    fn read(
        engine: &mut dyn Engine,
        mut rec: Recording<'_>,
        problem: &Problem<'_>,
        state: Rounded,
        ties: impl FnOnce(&mut Recording<'_>) -> Pending<u32>,
    ) -> Result<Self> {
        let ties = ties(&mut rec);
        let loss = problem.record_losses(&mut rec, &state);
        let grid = state.grid.download(&mut rec);
        let mut back = engine.run(rec)?;
        Ok(Self { state, grid: grid.take(&mut back)?, loss: loss.take(&mut back)?, ties: back.take(ties)? })
    }
}

impl Solver {
    /// Uploads the metric of an input of width `d` and factors it where the rounding needs that. `gram` is its statistic, if the
    /// method asked for one; `targets` what the linears aim at instead of their weights.
    pub fn new(engine: &mut dyn Engine, settings: Settings, d: usize, gram: Option<Gram>, targets: Option<Targets>) -> Result<Self> {
        if settings.method.calibrates() && gram.is_none() {
            return Err(Error::internal("solver", "the method's statistics were not collected"));
        }
        let shared = Columns::new(engine, &settings, d, gram)?;
        Ok(Self { settings, shared, targets })
    }

    /// α, if targets were moved.
    pub fn alpha(&self) -> Option<f32> {
        self.targets.as_ref().map(|t| t.strength.inputs)
    }

    /// β, if targets were moved by what the residual stream lacks.
    pub fn beta(&self) -> Option<f32> {
        self.targets.as_ref().filter(|t| t.has_residual()).map(|t| t.strength.residual)
    }

    pub fn free(self, engine: &mut dyn Engine) -> Result<()> {
        if let Some(targets) = self.targets {
            targets.free(engine)?;
        }
        self.shared.free(engine)
    }

    /// Solves one linear whose weight is on the device, for a lattice.
    pub fn solve(&self, engine: &mut dyn Engine, weight: &Weight, lattice: Lattice, heads: Heads<'_>) -> Result<Solved> {
        let mut record = SolveRecord::default();
        let mut pieces = Vec::new();
        match heads {
            Heads::None => self.rows(engine, (weight, lattice), 0..weight.rows, &self.shared, None, &mut pieces, &mut record)?,
            Heads::Rows { d_head, g } => {
                self.rows(engine, (weight, lattice), 0..weight.rows, &self.shared, Some((d_head, g)), &mut pieces, &mut record)?;
            }
            Heads::Columns { d_head, h, g } => {
                for (head, h) in h.iter().enumerate() {
                    let columns = Columns::new(engine, &self.settings, weight.cols, Some(h.clone()))?;
                    let size = d_head * d_head;
                    let g = g.map(|g| (d_head, &g[head * size..(head + 1) * size]));
                    self.rows(engine, (weight, lattice), head * d_head..(head + 1) * d_head, &columns, g, &mut pieces, &mut record)?;
                    columns.free(engine)?;
                }
            }
        }
        let (packed, w_hat) = pieces::join(engine, pieces, lattice, weight)?;
        Ok(Solved { packed, w_hat, record })
    }

    /// Solves rows under one column metric, as many at a time as fit a buffer.
    #[allow(clippy::too_many_arguments, reason = "which rows of what under which metrics, and where results go")]
    fn rows(
        &self,
        engine: &mut dyn Engine,
        (weight, lattice): (&Weight, Lattice),
        rows: Range<usize>,
        columns: &Columns,
        heads: Option<(usize, &[f32])>,
        pieces: &mut Vec<Piece>,
        record: &mut SolveRecord,
    ) -> Result<()> {
        let unit = heads.map_or(1, |(d_head, _)| d_head);
        let align = if unit.is_multiple_of(STRIDE_ALIGN) { unit } else { unit * STRIDE_ALIGN };
        let limits = Limits { max_buffer: engine.limits().max_buffer.min(PIECE), ..engine.limits() };
        for range in matrix::row_panels(rows.len(), matrix::stride(weight.cols) * size_of::<f32>(), align, limits) {
            let range = rows.start + range.start..rows.start + range.end;
            let g = heads.map(|(d_head, g)| {
                let of = |row: usize| (row - rows.start) * d_head;
                (d_head, &g[of(range.start)..of(range.end)])
            });
            pieces.push(self.piece(engine, (weight, lattice), range, columns, g, record)?);
        }
        Ok(())
    }

    fn piece(
        &self,
        engine: &mut dyn Engine,
        (weight, lattice): (&Weight, Lattice),
        rows: Range<usize>,
        columns: &Columns,
        heads: Option<(usize, &[f32])>,
        record: &mut SolveRecord,
    ) -> Result<Piece> {
        let method = self.settings.method;
        let shape = GridShape { lattice, rows: rows.len(), cols: weight.cols };
        let mut rec = Recording::new();
        let w = gather_rows(&mut rec, weight, rows.clone(), columns.metric.natural);
        let row_metric = heads.map(|(d_head, g)| RowMetric::upload(&mut rec, d_head, g));
        let target = self.targets.as_ref().map(|targets| targets.moved(&mut rec, w, rows.start));
        engine.run(rec)?;
        let objective = Objective { columns: &columns.metric, rows: row_metric.as_ref() };
        let problem = Problem { shape, target: target.unwrap_or(w), objective };

        let rtn = self.rtn(engine, &problem, w)?;
        record.loss_rtn += sum(&rtn.loss);
        record.factor = columns.record.or(record.factor);
        let plain = method.scale == ScaleRule::MinMax && method.rounding == Rounding::NEAREST && target.is_none();
        let piece = if plain {
            record.loss_start += sum(&rtn.loss);
            self.finish(engine, &problem, rtn, None, record)?
        } else {
            let found = self.rounded(engine, &problem, columns, heads, rows.start, record)?;
            self.finish(engine, &problem, found, Some(rtn), record)?
        };
        submit(engine, |rec| {
            w.free(rec);
            if let Some(target) = target {
                target.free(rec);
            }
            if let Some(rows) = row_metric {
                rows.free(rec);
            }
        })?;
        Ok(piece)
    }

    /// Round-to-nearest of the weights themselves on their min/max grid.
    fn rtn(&self, engine: &mut dyn Engine, problem: &Problem<'_>, w: Mat<f32>) -> Result<Candidate> {
        let grid = scale::search(engine, ScaleRule::MinMax, &problem.shape, w, problem.objective.columns)?;
        let mut rec = Recording::new();
        let (codes, w_hat) = grid.nearest(&mut rec, &problem.shape, w);
        w_hat.free(&mut rec);
        Candidate::read(engine, rec, problem, Rounded { codes, grid }, |rec| ties::of_nearest(rec, &problem.shape, grid, w))
    }

    /// The method's grid and rounding.
    #[allow(clippy::too_many_arguments, reason = "a problem, its metrics on device and host, and its record")]
    fn rounded(
        &self,
        engine: &mut dyn Engine,
        problem: &Problem<'_>,
        columns: &Columns,
        row_metric: Option<(usize, &[f32])>,
        row0: usize,
        record: &mut SolveRecord,
    ) -> Result<Candidate> {
        let method = self.settings.method;
        let start = std::time::Instant::now();
        let grid = scale::search(engine, method.scale, &problem.shape, problem.target, problem.objective.columns)?;
        record.scale_seconds += start.elapsed().as_secs_f64();
        let start = std::time::Instant::now();
        let damping = method.damping.value()?;
        let v = row_metric.map(|(d_head, g)| RowFactor::host(g, d_head, damping).map(|v| (d_head, v))).transpose()?;
        let row_factor = submit(engine, |rec| v.as_ref().map(|(d_head, v)| RowFactor::upload(rec, *d_head, v)))?;
        let (codes, compensated) = match (method.rounding.start, columns.factors.as_slice()) {
            (Start::Gptq, factors @ [_, ..]) => {
                let best = orders::round(engine, problem, grid, factors, row_factor.as_ref())?;
                if factors.len() > 1 {
                    *record.rows_from_orders.get_or_insert(0) += best.rows_from_others;
                }
                (best.rounded.codes, Some(best.rounded.compensated))
            }
            _ => {
                let codes = submit(engine, |rec| {
                    let (codes, w_hat) = grid.nearest(rec, &problem.shape, problem.target);
                    w_hat.free(rec);
                    codes
                })?;
                (codes, None)
            }
        };
        if let Some(factor) = row_factor {
            submit(engine, |rec| factor.free(rec))?;
        }
        let mut state = Rounded { codes, grid };
        let nearest = compensated.unwrap_or(problem.target);
        let found = if method.rounding.refines() {
            record.loss_start += sum(&problem.losses(engine, &state)?);
            None
        } else {
            let ties = |rec: &mut Recording<'_>| ties::of_nearest(rec, &problem.shape, grid, nearest);
            let found = Candidate::read(engine, Recording::new(), problem, state, ties)?;
            record.loss_start += sum(&found.loss);
            Some(found)
        };
        if let Some(options) = &method.rounding.adaround {
            // The published objective has another factor 2 in its row metric.
            let coupled = if row_metric.is_some() { 2.0 } else { 1.0 };
            let options = AdaRound { quadratic_weight: coupled * options.quadratic_weight, ..*options };
            let report = adaround(engine, problem, &mut state, compensated, &options)?;
            record.adaround = Some(record.adaround.take().unwrap_or_default().merged(report));
        }
        if let Some(compensated) = compensated {
            submit(engine, |rec| compensated.free(rec))?;
        }
        if let Some(options) = &method.rounding.descent {
            let options = Descent { row0: row0 as u32, seed: self.settings.seed, ..*options };
            let report = descend(engine, problem, &mut state, &options)?;
            record.descent = Some(record.descent.take().unwrap_or_default().merged(report));
        }
        let found = match found {
            Some(found) => found,
            None => Candidate::read(engine, Recording::new(), problem, state, |rec| ties::of_visit(rec, problem, &state))?,
        };
        record.round_seconds += start.elapsed().as_secs_f64();
        Ok(found)
    }

    /// Takes the rows (or heads) of `rtn` where they are better, packs, and makes the quantized values.
    fn finish(
        &self,
        engine: &mut dyn Engine,
        problem: &Problem<'_>,
        mut chosen: Candidate,
        rtn: Option<Candidate>,
        record: &mut SolveRecord,
    ) -> Result<Piece> {
        let shape = &problem.shape;
        let unit = problem.objective.unit();
        let mut rec = Recording::new();
        match rtn {
            Some(rtn) => {
                let mut pick = vec![0u32; shape.rows];
                for (i, (own, rtn)) in chosen.loss.chunks(unit).zip(rtn.loss.chunks(unit)).enumerate() {
                    let better = sum(rtn) < sum(own);
                    record.loss += if better { sum(rtn) } else { sum(own) };
                    if better {
                        pick[i * unit..][..unit].fill(1);
                    }
                }
                let ties = chosen.ties.iter().zip(&rtn.ties).zip(&pick).map(|((own, rtn), pick)| if *pick != 0 { rtn } else { own });
                record.ties += ties.map(|t| *t as usize).sum::<usize>();
                for r in (0..shape.rows).filter(|r| pick[*r] != 0) {
                    chosen.grid.copy_row(&rtn.grid, r, shape.rows);
                    record.rows_from_rtn += 1;
                }
                let pick = rec.upload("pick", pick);
                let codes = chosen.state.codes;
                let p = select_rows::SelectRowsParams { rows: shape.rows as u32, ld: codes.ld as u32 };
                kernels::select_rows(&mut rec, p, pick, rtn.state.codes.buffer, codes.buffer);
                rec.free(pick);
                rtn.state.free(&mut rec);
            }
            None => {
                record.loss += sum(&chosen.loss);
                record.ties += chosen.ties.iter().map(|t| *t as usize).sum::<usize>();
            }
        }
        chosen.state.grid.free(&mut rec);
        Piece::pack(engine, rec, shape, chosen.state.codes, chosen.grid)
    }
}

fn sum(loss: &[f32]) -> f64 {
    loss.iter().map(|l| f64::from(*l)).sum()
}
