//! AdaRound (Nagel et al., ICML 2020) on a quadratic in closed form, as aespa does it (Kim et al., NeurIPS 2024): whether each weight
//! goes to the code below or above it is learnt by gradient descent, all weights at once.
//!
//! With W' the starting weights and h(v) = clamp(1.2 sigmoid(v) − 0.1, 0, 1), minimise over v
//!   weight · tr(G E H Eᵀ) + lambda Σ (1 − |2h − 1|^beta),  E = s (clamp(floor(W' / s) + h(v) + z, 0, max_code) − z) − target,
//! from h = W' / s − floor(W' / s) by Adam (0.9, 0.999, 1e-8). The second term drives h to 0 or 1; it is left out at first (warm-up),
//! then beta falls linearly. In the end h = 1 where v ≥ 0, else 0. The gradient of the first term is 2 weight G E H: no calibration
//! data, no automatic differentiation. G is applied to E H head by head.
//!
//! W' is usually what error feedback makes of the weights at the moment of their rounding; the target stays the weights themselves.
//!
//! Balance: the published method adds both terms as they are, with H = 2/N Σ x xᵀ and, where rows are coupled, another 2/N in G, so
//! what the regulariser weighs depends on the layer. Our H and G are means, so `quadratic_weight` 2 (4 where rows are coupled) gives
//! the same objective. `normalise` scales the first term so that the codes that were given cost tau per weight, whatever the layer.
//!
//! `blocks` learns some columns at a time while the others stay, which costs far fewer full products: see `blocks.rs`.
//!
//! E H is kept from iteration to iteration, to which the change of E times H is added: once h has reached 0 or 1 for most weights (soon after the
//! warm-up), most changes are exactly zero, and the native engine leaves zeros out of products. Weights at rest are hardly looked at.
//!
//! Shapes: everything [rows, d] f32: v, two moments, E or M, E H (and G E H), besides W' and the target. Cost per iteration: rows · d²
//! multiply-adds in one product, at most, and one pass over 12 floats per weight, 3 where it is at rest. The host waits once in
//! `ITERATIONS_PER_RUN` iterations.

use super::blocks::Blocks;
use super::problem::{Problem, Rounded};
use crate::engine::kernels::adaround_step::{self, AdaroundStepParams};
use crate::engine::kernels::{self, select_rows};
use crate::engine::{Buffer, Engine, Mat, Recording, submit};
use crate::quant::subtract;
use crate::{Error, Result, interrupt};
use serde::Serialize;

/// Few enough that an interrupt is heard soon.
const ITERATIONS_PER_RUN: u32 = 50;
/// Iterations after which E H is made anew: few enough that rounding errors of its changes do not add up. A multiple of those of a run.
const ITERATIONS_PER_PRODUCT: u32 = 200;

/// How to round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AdaRound {
    /// Of each weight.
    pub iterations: u32,
    pub lr: f32,
    /// Weight of the regulariser.
    pub lambda: f32,
    /// The regulariser's exponent after the warm-up and at the end.
    pub beta: [f32; 2],
    /// Part of the iterations that run without the regulariser.
    pub warm_up: f32,
    /// tau: the loss is scaled so that the given codes cost tau per weight on average, instead of by `quadratic_weight`.
    pub normalise: Option<f32>,
    /// Weight of tr(G E H Eᵀ) where it is not normalised.
    pub quadratic_weight: f32,
    /// Keep the given codes of every unit (row, or head where rows are coupled) that would end above them.
    pub keep_better: bool,
    /// Learn columns block by block instead of all at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<Blocks>,
}

impl AdaRound {
    /// As published, for layers whose rows are not coupled.
    pub const PUBLISHED: Self = Self {
        iterations: 2000,
        lr: 0.015,
        lambda: 1.5,
        beta: [20.0, 2.0],
        warm_up: 0.2,
        normalise: None,
        quadratic_weight: 2.0,
        keep_better: false,
        blocks: None,
    };
    /// The same balance for every layer, a higher rate, and nothing gets worse.
    pub const NORMALISED: Self = Self { lr: 0.05, lambda: 1.0, normalise: Some(1e-4), keep_better: true, ..Self::PUBLISHED };
    /// The same, block by block.
    pub const BLOCKS: Self = Self { iterations: 1000, blocks: Some(Blocks::DEFAULT), ..Self::NORMALISED };

    /// The regulariser's weight and exponent in iteration `index` (from 0).
    fn regulariser(&self, index: u32) -> (f32, f32) {
        let start = (self.warm_up * self.iterations as f32) as u32;
        let [first, last] = self.beta;
        if index < start {
            return (0.0, first);
        }
        let progress = (index - start) as f32 / (self.iterations - start).max(1) as f32;
        (self.lambda, first + (last - first) * progress)
    }
}

/// What came of it, by the objective's own loss, not by the scaled one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdaRoundReport {
    pub loss_start: f64,
    pub loss_end: f64,
    /// Codes that differ from those given.
    pub flipped: u64,
    /// Units (rows, or heads where rows are coupled) that kept the codes given.
    pub units_kept_at_start: usize,
}

impl AdaRoundReport {
    /// The report of two sets of rows of one linear.
    pub fn merged(self, other: Self) -> Self {
        Self {
            loss_start: self.loss_start + other.loss_start,
            loss_end: self.loss_end + other.loss_end,
            flipped: self.flipped + other.flipped,
            units_kept_at_start: self.units_kept_at_start + other.units_kept_at_start,
        }
    }
}

/// Replaces the codes of `state`, whose grid stays. `start` is W' [rows, cols] in natural column order; `None` is the target.
///
/// # Errors
/// `Kind::Numeric` when a loss is not finite; `Kind::Internal` when rows are no whole heads or shapes differ; what the engine returns.
pub fn adaround(
    engine: &mut dyn Engine,
    problem: &Problem<'_>,
    state: &mut Rounded,
    start: Option<Mat<f32>>,
    options: &AdaRound,
) -> Result<AdaRoundReport> {
    let (shape, target, unit) = (problem.shape, problem.target, problem.objective.unit());
    let start = start.unwrap_or(target);
    if unit == 0 || !shape.rows.is_multiple_of(unit) {
        return Err(Error::internal("AdaRound", format!("{} rows are no whole heads of {unit}", shape.rows)));
    }
    if [start.rows, start.cols, start.ld] != [target.rows, target.cols, target.ld] || state.codes.ld != target.ld {
        return Err(Error::internal("AdaRound", "the matrices it starts from have different shapes"));
    }
    if shape.rows == 0 || shape.cols == 0 {
        return Ok(AdaRoundReport::default());
    }
    let mut rec = Recording::new();
    let given = rec.download(state.codes.buffer);
    let w_hat = state.grid.dequantize(&mut rec, &shape, state.codes);
    let before = losses(&mut rec, problem, w_hat);
    let mut back = engine.run(rec)?;
    let given = back.take(given)?;
    let before = unit_losses(back.take(before)?, unit)?;
    let loss_start: f64 = before.iter().sum();
    if loss_start <= 0.0 {
        return Ok(AdaRoundReport::default());
    }
    let weight = match options.normalise {
        Some(tau) => f64::from(tau) * (shape.rows * shape.cols) as f64 / loss_start,
        None => f64::from(options.quadratic_weight),
    };

    let w_hat = Learner::new(engine, problem, *state, start, weight)?.run(engine, options)?;
    let mut rec = Recording::new();
    let (codes, exact) = state.grid.nearest(&mut rec, &shape, w_hat);
    w_hat.free(&mut rec);
    let after = losses(&mut rec, problem, exact);
    let after = unit_losses(engine.run(rec)?.take(after)?, unit)?;

    let kept: Vec<bool> = before.iter().zip(&after).map(|(before, after)| options.keep_better && before <= after).collect();
    let mut rec = Recording::new();
    let pick = rec.upload("pick", (0..shape.rows).map(|r| u32::from(kept[r / unit])).collect::<Vec<_>>());
    let p = select_rows::SelectRowsParams { rows: shape.rows as u32, ld: codes.ld as u32 };
    kernels::select_rows(&mut rec, p, pick, state.codes.buffer, codes.buffer);
    rec.copy(codes.buffer, state.codes.buffer);
    let taken = rec.download(codes.buffer);
    rec.free(pick);
    codes.free(&mut rec);
    let taken = engine.run(rec)?.take(taken)?;
    let rows = given.chunks(target.ld).zip(taken.chunks(target.ld)).take(shape.rows);
    let differ = |(a, b): (&[u32], &[u32])| a[..shape.cols].iter().zip(&b[..shape.cols]).filter(|(a, b)| a != b).count() as u64;
    Ok(AdaRoundReport {
        loss_start,
        loss_end: before.iter().zip(&after).zip(&kept).map(|((before, after), kept)| if *kept { before } else { after }).sum(),
        flipped: rows.map(differ).sum(),
        units_kept_at_start: kept.iter().filter(|kept| **kept).count(),
    })
}

/// Records the loss of each row of the quantized values `w_hat`, which are given back.
fn losses(rec: &mut Recording<'_>, problem: &Problem<'_>, w_hat: Mat<f32>) -> crate::engine::Pending<f32> {
    let error = subtract(rec, w_hat, problem.target);
    let out = problem.objective.losses(rec, error);
    let pending = rec.download(out);
    error.free(rec);
    rec.free(out);
    pending
}

/// Sums of a row's losses over the rows of a unit.
fn unit_losses(rows: Vec<f32>, unit: usize) -> Result<Vec<f64>> {
    let sums: Vec<f64> = rows.chunks(unit).map(|rows| rows.iter().map(|l| f64::from(*l)).sum()).collect();
    if sums.iter().all(|l| l.is_finite()) {
        Ok(sums)
    } else {
        Err(Error::numeric("loss of AdaRound", "is not finite: weights or statistics overflow f32"))
    }
}

/// What iterations work on.
pub(super) struct Learner<'p> {
    pub(super) problem: &'p Problem<'p>,
    state: Rounded,
    start: Mat<f32>,
    /// Of tr(G E H Eᵀ).
    weight: f64,
    v: Buffer<f32>,
    moment: Buffer<f32>,
    square: Buffer<f32>,
    /// E between visits of blocks; within an iteration of all columns M, then the change of E.
    pub(super) e: Mat<f32>,
}

impl<'p> Learner<'p> {
    fn new(engine: &mut dyn Engine, problem: &'p Problem<'p>, state: Rounded, start: Mat<f32>, weight: f64) -> Result<Self> {
        submit(engine, |rec| {
            let e = Mat::alloc(rec, "error", start.rows, start.cols);
            let mut state_of = |label| rec.alloc(label, e.buffer.len());
            let (v, moment, square) = (state_of("rounding variables"), state_of("first moment"), state_of("second moment"));
            let learner = Self { problem, state, start, weight, v, moment, square, e };
            learner.launch(rec, AdaroundStepParams { phase: adaround_step::BEGIN, ..learner.params() });
            learner
        })
    }

    /// The rounded values.
    fn run(mut self, engine: &mut dyn Engine, options: &AdaRound) -> Result<Mat<f32>> {
        match (options.blocks, self.problem.objective.columns.panels()) {
            (Some(blocks), Some(panels)) => self.run_blocks(engine, options, blocks, panels)?,
            // Under the identity columns do not couple, and all of them are one block.
            _ => self.run_whole(engine, options)?,
        }
        submit(engine, |rec| {
            self.launch(rec, AdaroundStepParams { phase: adaround_step::END, ..self.params() });
            [self.v, self.moment, self.square].into_iter().for_each(|buffer| rec.free(buffer));
            self.e
        })
    }

    fn run_whole(&mut self, engine: &mut dyn Engine, options: &AdaRound) -> Result<()> {
        let end_of = |first: u32, length: u32| options.iterations.min(first + length);
        for stretch in (0..options.iterations).step_by(ITERATIONS_PER_PRODUCT as usize) {
            let eh = submit(engine, |rec| {
                self.launch(rec, AdaroundStepParams { phase: adaround_step::ERROR, ..self.params() });
                self.problem.objective.columns.times(rec, self.e)
            })?;
            for first in (stretch..end_of(stretch, ITERATIONS_PER_PRODUCT)).step_by(ITERATIONS_PER_RUN as usize) {
                interrupt::check()?;
                let last = end_of(first, ITERATIONS_PER_RUN);
                submit(engine, |rec| (first..last).for_each(|index| self.iterate(rec, options, index, eh)))?;
            }
            submit(engine, |rec| eh.free(rec))?;
        }
        Ok(())
    }

    /// One iteration, after which E H is up to date again.
    fn iterate(&mut self, rec: &mut Recording<'_>, options: &AdaRound, index: u32, eh: Mat<f32>) {
        let objective = self.problem.objective;
        match objective.rows {
            None => rec.copy(eh.buffer, self.e.buffer),
            Some(rows) => {
                self.e.free(rec);
                self.e = rows.times(rec, eh);
            }
        }
        // The gradient becomes the change of the error in place.
        self.launch(rec, AdaroundStepParams { phase: adaround_step::CHANGE, ..self.step(options, index) });
        objective.columns.add_times(rec, self.e, eh);
    }

    /// Iteration `index` of all columns.
    pub(super) fn step(&self, options: &AdaRound, index: u32) -> AdaroundStepParams {
        let (lambda, beta) = options.regulariser(index);
        let t = f64::from(index) + 1.0;
        AdaroundStepParams {
            phase: adaround_step::STEP,
            lambda,
            beta,
            rate: (f64::from(options.lr) / (1.0 - 0.9f64.powf(t))) as f32,
            root: (1.0 - 0.999f64.powf(t)).sqrt().recip() as f32,
            ..self.params()
        }
    }

    pub(super) fn params(&self) -> AdaroundStepParams {
        let shape = self.problem.shape;
        AdaroundStepParams {
            rows: shape.rows as u32,
            cols: shape.cols as u32,
            ld: self.e.ld as u32,
            ld_e: self.e.ld as u32,
            group: shape.group() as u32,
            n_group: shape.n_group() as u32,
            max_code: shape.lattice.max_code(),
            quadratic: (2.0 * self.weight) as f32,
            ..Default::default()
        }
    }

    fn launch(&self, rec: &mut Recording<'_>, p: AdaroundStepParams) {
        self.launch_on(rec, p, self.e.buffer);
    }

    pub(super) fn launch_on(&self, rec: &mut Recording<'_>, p: AdaroundStepParams, e: Buffer<f32>) {
        let (start, target, grid) = (self.start.buffer, self.problem.target.buffer, self.state.grid);
        kernels::adaround_step(rec, p, start, target, grid.scale, grid.zero, self.v, self.moment, self.square, e);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_regulariser_waits_and_then_sharpens() {
        let options = AdaRound { iterations: 100, ..AdaRound::PUBLISHED };
        assert_eq!((options.regulariser(0), options.regulariser(19)), ((0.0, 20.0), (0.0, 20.0)));
        assert_eq!((options.regulariser(20), options.regulariser(60)), ((1.5, 20.0), (1.5, 11.0)));
        assert!(options.regulariser(99).1 < 2.3);
    }
}
