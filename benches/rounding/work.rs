//! One rounding problem: runs chains on it.

use super::chains::{CHAINS, Step};
use super::measure::Measured;
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::{Engine, Mat, Recording, submit};
use aespa_gpu::quant::{Grid, subtract};
use aespa_gpu::round::gptq::{DeviceFactor, RoundedGptq, RowFactor};
use aespa_gpu::round::{AdaRound, Descent, Problem, Rounded, adaround, descend, orders};
use aespa_gpu::{Error, Result, interrupt};
use std::time::Instant;

/// One rounding problem.
pub struct Work<'a> {
    pub engine: &'a mut CpuEngine,
    pub problem: Problem<'a>,
    pub grid: Grid,
    pub factors: &'a [DeviceFactor],
    pub row_factor: Option<RowFactor>,
    pub first: usize,
}

impl Work<'_> {
    /// Chains that are not chosen have no numbers (NaN); one that another starts from is chosen with it.
    pub fn chains(&mut self, chosen: &[bool], measured: &mut Measured) -> Result<()> {
        let mut states: Vec<Option<Rounded>> = Vec::new();
        // Of each chain: all seconds, those in products.
        let mut seconds: Vec<[f64; 2]> = Vec::new();
        // What GPTQ made of each weight at the moment of its rounding: AdaRound starts there.
        let mut compensated = None;
        for (chain, chosen) in CHAINS.iter().zip(chosen) {
            interrupt::check()?;
            if !chosen {
                states.push(None);
                seconds.push([f64::NAN; 2]);
                continue;
            }
            let given = match chain.from.map(|from| states[from]) {
                Some(Some(from)) => self.copied(from.grid, Some(from.codes))?,
                Some(None) => return Err(Error::internal(chain.name, "starts from a chain that was not run")),
                None => self.copied(self.grid, None)?,
            };
            let (start, products) = (Instant::now(), self.products());
            let state = self.step(chain.step, given, &mut compensated)?;
            let own = [start.elapsed().as_secs_f64(), self.products() - products];
            let before = chain.from.map_or([0.0; 2], |from| seconds[from]);
            seconds.push([own[0] + before[0], own[1] + before[1]]);
            states.push(Some(state));
        }
        for (i, state) in states.iter().enumerate() {
            measured.loss[i] += state.as_ref().map_or(Ok(f64::NAN), |state| self.loss(state))?;
            measured.seconds[i] += seconds[i][0];
            measured.products[i] += seconds[i][1];
        }
        submit(self.engine, |rec| {
            states.into_iter().flatten().for_each(|state| state.free(rec));
            if let Some(compensated) = compensated {
                compensated.free(rec);
            }
        })
    }

    /// Seconds in matrix products so far.
    fn products(&self) -> f64 {
        let kernels = &self.engine.profile().kernels;
        ["matmul_nn", "matmul_nt"].iter().filter_map(|name| kernels.get(name)).map(|k| k.seconds).sum()
    }

    fn step(&mut self, step: Step, (grid, codes): (Grid, Option<Mat<u32>>), compensated: &mut Option<Mat<f32>>) -> Result<Rounded> {
        let Problem { shape, target, objective } = self.problem;
        let given = || codes.map(|codes| Rounded { codes, grid }).ok_or_else(|| Error::internal("chain", "has nothing to start from"));
        match step {
            Step::Nearest => {
                let codes = submit(self.engine, |rec| {
                    let (codes, w_hat) = grid.nearest(rec, &shape, target);
                    w_hat.free(rec);
                    codes
                })?;
                Ok(Rounded { codes, grid })
            }
            Step::Gptq => {
                let rounded = self.orders(grid, 1)?;
                *compensated = Some(rounded.compensated);
                Ok(Rounded { codes: rounded.codes, grid })
            }
            Step::Orders(n) => {
                let rounded = self.orders(grid, n)?;
                Ok(Rounded { codes: submit(self.engine, |rec| rounded.into_codes(rec))?, grid })
            }
            Step::AdaRound(options) => {
                // The published objective has another factor 2 in its row metric.
                let coupled = if objective.rows.is_some() { 2.0 } else { 1.0 };
                let options = AdaRound { quadratic_weight: coupled * options.quadratic_weight, ..options };
                let mut state = given()?;
                adaround(self.engine, &self.problem, &mut state, *compensated, &options)?;
                Ok(state)
            }
            Step::Descent(options) => {
                let options = Descent { row0: self.first as u32, ..options };
                let mut state = given()?;
                descend(self.engine, &self.problem, &mut state, &options)?;
                Ok(state)
            }
        }
    }

    fn orders(&mut self, grid: Grid, n: usize) -> Result<RoundedGptq> {
        let best = orders::round(self.engine, &self.problem, grid, &self.factors[..n], self.row_factor.as_ref())?;
        Ok(best.rounded)
    }

    /// What a step may change.
    fn copied(&mut self, grid: Grid, codes: Option<Mat<u32>>) -> Result<(Grid, Option<Mat<u32>>)> {
        submit(self.engine, |rec| {
            let fresh = Grid::without_steps(rec.alloc("scale", grid.scale.len()), rec.alloc("zero", grid.zero.len()));
            rec.copy(grid.scale, fresh.scale);
            rec.copy(grid.zero, fresh.zero);
            let codes = codes.map(|from| {
                let to = Mat::alloc(rec, "codes", from.rows, from.cols);
                rec.copy(from.buffer, to.buffer);
                to
            });
            (fresh, codes)
        })
    }

    fn loss(&mut self, state: &Rounded) -> Result<f64> {
        let Problem { shape, target, objective } = self.problem;
        let mut rec = Recording::new();
        let w_hat = state.grid.dequantize(&mut rec, &shape, state.codes);
        let error = subtract(&mut rec, w_hat, target);
        let losses = objective.losses(&mut rec, error);
        error.free(&mut rec);
        let pending = rec.download(losses);
        rec.free(losses);
        let loss: f64 = self.engine.run(rec)?.take(pending)?.into_iter().map(f64::from).sum();
        if loss.is_finite() { Ok(loss) } else { Err(Error::numeric("loss", "is not finite")) }
    }
}
