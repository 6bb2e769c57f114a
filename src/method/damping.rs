//! How much to damp a metric: λ of H + λ diag(H), fixed or by a split-half test.
//!
//! H is an estimate, and codes that play the errors of columns against each other trust its off-diagonal part. The test rounds a sample of
//! rows under the damped H of one half of the windows and looks at their loss under the plain H of the other half,
//!   λ = argmin_λ Σ_(k, l) Σ_rows e_k(λ) H_l e_k(λ)ᵀ,  e_k(λ) the errors under H_k + λ diag(H_k),  (k, l) = (1, 2), (2, 1),
//! each linear's sums relative to those of the first λ. Rows are rounded to nearest on searched grids and then by coordinate descent.
//!
//! It follows the number of tokens: SmolLM2-135M at 3 bits per channel with 16 windows of 512 takes 0.3 to 1, and has perplexities of 43.6
//! and 74.6 at home and abroad (λ = 0.1, ten sweeps: 45.2, 74.5; 0.3: 43.8, 74.6; 1: 43.6, 72.2); the demo model with 128 windows, which
//! is three times as many tokens per channel or more, loses at 2 bits with 0.3 (42.47 becomes 42.61 at home) and with 1 (43.15), and not with the test
//! (42.50).
//!
//! Cost per input: [`ROWS`] d² multiply-adds per sweep, λ and half; two H on the device at a time.

use super::Settings;
use super::pieces::gather_rows;
use crate::calib::{Gram, Statistic};
use crate::engine::{Engine, Recording, Weight, submit};
use crate::metric::{ColumnMetric, Objective};
use crate::quant::{GridShape, Lattice};
use crate::round::{Descent, Problem, Rounded, descend};
use crate::{Error, Result, scale};
use serde::Serialize;
use std::str::FromStr;

/// Rows of each linear that the test rounds.
const ROWS: usize = 32;
/// What it chooses from.
const LADDER: [f64; 4] = [0.03, 0.1, 0.3, 1.0];
const DESCENT: Descent = Descent { sweeps: 10, ..Descent::DEFAULT };

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Damping {
    /// By a split-half test for every input.
    SplitHalf,
    #[serde(untagged)]
    Fixed(f64),
}

impl Damping {
    /// # Errors
    /// Internal where the test has not been made.
    pub(super) fn value(self) -> Result<f64> {
        match self {
            Self::Fixed(value) => Ok(value),
            Self::SplitHalf => Err(Error::internal("damping", "has not been chosen yet")),
        }
    }
}

impl FromStr for Damping {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        if s == "auto" {
            return Ok(Self::SplitHalf);
        }
        s.parse().map(Self::Fixed).map_err(|_| "is neither a number nor auto".to_owned())
    }
}

/// The λ of the split-half test for the linears `weights` of one input, which will lie on the lattices beside them; `None` without two halves.
///
/// # Errors
/// What the scale search, the descent or the engine say.
pub fn damping_of(
    engine: &mut dyn Engine,
    settings: &Settings,
    statistic: &Statistic,
    weights: &[(&Weight, Lattice)],
) -> Result<Option<f64>> {
    let Some(halves) = statistic.halves() else { return Ok(None) };
    let mut losses = vec![[0.0f64; LADDER.len()]; weights.len()];
    for (own, other) in [(0, 1), (1, 0)] {
        let judge = uploaded(engine, &halves[other].gram, 0.0)?;
        for (index, lambda) in LADDER.into_iter().enumerate() {
            let metric = uploaded(engine, &halves[own].gram, lambda)?;
            for (losses, weight) in losses.iter_mut().zip(weights) {
                losses[index] += transferred(engine, settings, *weight, &metric, &judge)?;
            }
            submit(engine, |rec| metric.free(rec))?;
        }
        submit(engine, |rec| judge.free(rec))?;
    }
    let mut score = [0.0f64; LADDER.len()];
    for losses in &losses {
        for (score, loss) in score.iter_mut().zip(losses) {
            *score += if losses[0] > 0.0 { loss / losses[0] } else { 1.0 };
        }
    }
    let best = (0..LADDER.len()).min_by(|a, b| score[*a].total_cmp(&score[*b]));
    Ok(best.map(|i| LADDER[i]))
}

fn uploaded(engine: &mut dyn Engine, gram: &Gram, damping: f64) -> Result<ColumnMetric> {
    let limits = engine.limits();
    let mut rec = Recording::new();
    let metric = ColumnMetric::layer(&mut rec, gram.clone(), damping as f32, limits);
    engine.run(rec)?;
    Ok(metric)
}

/// The loss under `judge` of a sample of rows rounded under `metric`.
fn transferred(
    engine: &mut dyn Engine,
    settings: &Settings,
    (weight, lattice): (&Weight, Lattice),
    metric: &ColumnMetric,
    judge: &ColumnMetric,
) -> Result<f64> {
    let rows = ROWS.min(weight.rows);
    let start = (weight.rows - rows) / 2;
    let w = submit(engine, |rec| gather_rows(rec, weight, start..start + rows, metric.natural))?;
    let shape = GridShape { lattice, rows, cols: weight.cols };
    let problem = Problem { shape, target: w, objective: Objective { columns: metric, rows: None } };
    let grid = scale::search(engine, settings.method.scale, &shape, w, metric)?;
    let mut state = submit(engine, |rec| {
        let (codes, w_hat) = grid.nearest(rec, &shape, w);
        w_hat.free(rec);
        Rounded { codes, grid }
    })?;
    descend(engine, &problem, &mut state, &Descent { seed: settings.seed, ..DESCENT })?;
    let judged = Problem { objective: Objective { columns: judge, rows: None }, ..problem };
    let losses = judged.losses(engine, &state)?;
    submit(engine, |rec| {
        state.free(rec);
        w.free(rec);
    })?;
    Ok(losses.into_iter().map(f64::from).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_auto_are_read_and_written() {
        assert_eq!("auto".parse(), Ok(Damping::SplitHalf));
        assert_eq!("0.3".parse(), Ok(Damping::Fixed(0.3)));
        assert!("much".parse::<Damping>().is_err());
        let json = [Damping::SplitHalf, Damping::Fixed(0.5)].map(|d| serde_json::to_string(&d).unwrap());
        assert_eq!(json, ["\"split-half\"", "0.5"]);
    }
}
