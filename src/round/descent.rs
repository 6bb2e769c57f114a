//! Coordinate descent on the codes: every weight in turn moves to the code that lowers the loss most while all others stay.
//!
//! L(E) = Σ_heads tr(G_h E_h H E_hᵀ), E = s (q − z) − target. In one weight's error L is a parabola, so with T = G E H the best change is
//!   δ_rj = −T_rj / (G_rr H_jj), rounded to the grid and clamped; then T += G_:r δ_rj H_j:
//! (CDQuant, Nair and Suggala 2024; QuantEase, Behdin et al. 2023; the row metric is that of aespa and BoA). No move raises L, and
//! what GPTQ leaves is far from a minimum: where H is ill-conditioned several per cent are gained per layer, where rows are coupled
//! half of the loss.
//!
//! Annealing escapes poor minima: noise with a standard deviation of √(T₀ · L̄ / (G_rr H_jj)) is added to the continuous optimum before it
//! is rounded, L̄ the mean loss per weight of the row's unit at the start, T₀ falling linearly to 0 over the first nine tenths of the
//! sweeps. Units (rows, or heads when they are coupled) that end above their start are put back to it.

use super::problem::{Problem, Rounded};
use super::refit::Refit;
use super::sweep::{Walk, unit_losses};
use crate::calib::Gram;
use crate::engine::kernels::{self, select_rows};
use crate::engine::{Buffer, Engine, Recording, submit};
use crate::metric::ColumnMetric;
use crate::quant::HostGrid;
use crate::{Error, Result, interrupt};
use serde::Serialize;

/// A greedy sweep that moves a smaller part of the weights than this is the last.
const CONVERGED: f64 = 1e-4;
/// Part of the sweeps that anneal, when any do.
const HOT: f64 = 0.9;

/// How to descend.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Descent {
    /// At most this many; greedy sweeps stop when hardly a code moves.
    pub sweeps: u32,
    /// T₀ in units of the mean loss per weight; 0 for greedy sweeps only.
    pub temperature: f32,
    /// Refit scales for fixed codes between sweeps.
    pub refit: bool,
    /// Refits also try to move zero points by a code (asymmetric grids, rows independent).
    pub refit_zero: bool,
    /// Names the noise.
    #[serde(skip)]
    pub seed: u64,
    /// Index of the problem's first row in its linear: the noise of a row does not depend on how rows are split.
    #[serde(skip)]
    pub row0: u32,
}

impl Descent {
    pub const DEFAULT: Self = Self { sweeps: 30, temperature: 0.1, refit: true, refit_zero: false, seed: 0, row0: 0 };
}

impl Default for Descent {
    /// Thirty sweeps, T₀ = 0.1, scales refit. Of the demo model's losses after GPTQ (2 bits, per channel) this leaves 0.53 to 0.82, greedy
    /// sweeps alone 0.64 to 0.87; T₀ of 0.05 and 0.2 are one per cent worse, fifteen sweeps three, sixty three better.
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What a descent did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DescentReport {
    /// Codes that moved in each sweep.
    pub moves: Vec<u64>,
    /// Loss of the whole problem, computed from codes and grid.
    pub loss_start: f64,
    pub loss_end: f64,
    /// Units (rows, or heads where rows are coupled), and how many of them were put back to their start.
    pub units: usize,
    pub units_kept_at_start: usize,
    /// Steps that zero points made.
    pub zero_steps: u64,
}

impl DescentReport {
    /// The report of two sets of rows of one linear.
    pub fn merged(self, other: Self) -> Self {
        let (long, short) = if self.moves.len() < other.moves.len() { (other.moves, self.moves) } else { (self.moves, other.moves) };
        let moves = long.iter().enumerate().map(|(i, m)| m + short.get(i).copied().unwrap_or(0)).collect();
        Self {
            moves,
            loss_start: self.loss_start + other.loss_start,
            loss_end: self.loss_end + other.loss_end,
            units: self.units + other.units,
            units_kept_at_start: self.units_kept_at_start + other.units_kept_at_start,
            zero_steps: self.zero_steps + other.zero_steps,
        }
    }

    /// Part of all visits to one of `weights` weights that moved its code.
    pub fn acceptance(&self, weights: f64) -> f64 {
        self.moves.iter().sum::<u64>() as f64 / (weights * self.moves.len().max(1) as f64).max(1.0)
    }

    /// Sweeps that ran.
    pub fn sweeps(&self) -> usize {
        self.moves.len()
    }
}

/// Lowers the loss of `state` under `problem` in place; no unit ends above its start.
///
/// # Errors
/// `Kind::Numeric` when a loss is not finite; `Kind::Internal` when rows are no whole heads, or heads larger than
/// `descent_heads::MAX_HEAD`; what the engine returns.
pub fn descend(engine: &mut dyn Engine, problem: &Problem<'_>, state: &mut Rounded, options: &Descent) -> Result<DescentReport> {
    let (rows, cols, unit) = (problem.shape.rows, problem.shape.cols, problem.objective.unit());
    if unit == 0 || !rows.is_multiple_of(unit) {
        return Err(Error::internal("coordinate descent", format!("{rows} rows are no whole heads of {unit}")));
    }
    if rows == 0 || cols == 0 {
        return Ok(DescentReport::default());
    }
    // A product with the identity is a waste, but plain rounding to nearest needs no descent, so nobody asks for it.
    let dense = match problem.objective.columns.panels() {
        Some(_) => None,
        None => Some(identity(engine, cols)?),
    };
    let mut problem = *problem;
    if let Some(dense) = &dense {
        problem.objective.columns = dense;
    }
    let report = descend_on(engine, &problem, state, options);
    if let Some(dense) = dense {
        submit(engine, |rec| dense.free(rec))?;
    }
    report
}

fn identity(engine: &mut dyn Engine, d: usize) -> Result<ColumnMetric> {
    let h = (0..d * d).map(|i| if i / d == i % d { 1.0 } else { 0.0 }).collect();
    let gram = Gram { d, n_tok: 1, h };
    let limits = engine.limits();
    let mut rec = Recording::new();
    let metric = ColumnMetric::layer(&mut rec, gram, 0.0, limits);
    engine.run(rec)?;
    Ok(metric)
}

fn descend_on(engine: &mut dyn Engine, problem: &Problem<'_>, state: &mut Rounded, options: &Descent) -> Result<DescentReport> {
    let weights = (problem.shape.rows * problem.shape.cols) as f64;
    let start = Start::of(engine, state)?;
    let (mut walk, losses) = Walk::new(engine, problem, *state)?;
    let refit = if options.refit { Some(Refit::new(engine, problem, options.refit_zero)?) } else { None };
    let hot = if options.temperature > 0.0 { (HOT * f64::from(options.sweeps)) as u32 } else { 0 };
    let mut report = DescentReport { loss_start: losses.iter().sum(), units: losses.len(), ..Default::default() };
    for sweep in 0..options.sweeps {
        interrupt::check()?;
        let temperature = if sweep < hot { options.temperature * (hot - sweep) as f32 / hot as f32 } else { 0.0 };
        let mut rec = Recording::new();
        if hot > 0 && sweep == hot {
            walk.refresh(&mut rec);
        }
        walk.sweep(&mut rec, options.row0, key(options.seed, sweep), temperature);
        let moves = walk.take_moves(&mut rec);
        let moved: u64 = engine.run(rec)?.take(moves)?.into_iter().map(u64::from).sum();
        report.moves.push(moved);
        let stepped = match &refit {
            Some(refit) => refit.after(engine, sweep, problem, state, walk.gradient)?,
            None => 0,
        };
        report.zero_steps += stepped;
        if sweep >= hot && stepped == 0 && (moved as f64) < CONVERGED * weights && !engine.estimates() {
            break;
        }
    }
    let mut rec = Recording::new();
    let after = walk.losses(&mut rec);
    let after = unit_losses(engine.run(rec)?.take(after)?, problem.objective.unit())?;
    let worse: Vec<bool> = losses.iter().zip(&after).map(|(start, after)| after >= start).collect();
    report.units_kept_at_start = worse.iter().filter(|worse| **worse).count();
    report.loss_end = losses.iter().zip(&after).map(|(start, after)| after.min(*start)).sum();
    submit(engine, |rec| {
        walk.free(rec);
        if let Some(refit) = refit {
            refit.free(rec);
        }
    })?;
    start.restore(engine, problem, state, &worse)?;
    Ok(report)
}

/// Names the noise of a sweep: SplitMix64 of seed and sweep.
fn key(seed: u64, sweep: u32) -> u32 {
    let x = seed.wrapping_add((u64::from(sweep) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) >> 32) as u32
}

/// Codes and grid before the descent.
struct Start {
    codes: Buffer<u32>,
    grid: HostGrid,
}

impl Start {
    fn of(engine: &mut dyn Engine, state: &Rounded) -> Result<Self> {
        let mut rec = Recording::new();
        let codes = rec.alloc("codes before", state.codes.buffer.len());
        rec.copy(state.codes.buffer, codes);
        let grid = state.grid.download(&mut rec);
        Ok(Self { codes, grid: grid.take(&mut engine.run(rec)?)? })
    }

    /// Puts the units that got worse back.
    fn restore(self, engine: &mut dyn Engine, problem: &Problem<'_>, state: &mut Rounded, worse: &[bool]) -> Result<()> {
        let (shape, unit) = (problem.shape, problem.objective.unit());
        if worse.contains(&true) {
            let pick: Vec<u32> = (0..shape.rows).map(|r| u32::from(worse[r / unit])).collect();
            let mut rec = Recording::new();
            let pending = state.grid.download(&mut rec);
            let mut grid = pending.take(&mut engine.run(rec)?)?;
            (0..shape.rows).filter(|r| pick[*r] != 0).for_each(|r| grid.copy_row(&self.grid, r, shape.rows));
            submit(engine, |rec| {
                let pick = rec.upload("pick", pick);
                let p = select_rows::SelectRowsParams { rows: shape.rows as u32, ld: state.codes.ld as u32 };
                kernels::select_rows(rec, p, pick, self.codes, state.codes.buffer);
                rec.free(pick);
                // Descents leave steps as they are.
                replace(rec, state.grid.scale, grid.scale);
                replace(rec, state.grid.zero, grid.zero);
            })?;
        }
        submit(engine, |rec| rec.free(self.codes))
    }
}

/// Records the overwriting of a whole buffer.
pub(super) fn replace(rec: &mut Recording<'_>, buffer: Buffer<f32>, values: Vec<f32>) {
    let fresh = rec.upload("new values", values);
    rec.copy(fresh, buffer);
    rec.free(fresh);
}
