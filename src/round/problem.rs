//! What every rounding works on, and what it leaves.

use crate::engine::{Downloads, Engine, Mat, Pending, Recording};
use crate::metric::Objective;
use crate::quant::{Grid, GridShape, subtract};
use crate::{Error, Result};

/// Rows to round: find codes such that E = s (q − z) − target has the least loss under the objective.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'m> {
    pub shape: GridShape,
    /// [rows, cols] in natural column order. Not always the weight itself: see asymmetric targets.
    pub target: Mat<f32>,
    pub objective: Objective<'m>,
}

impl Problem<'_> {
    /// The loss of every row.
    ///
    /// # Errors
    /// `Kind::Numeric` when one is not finite; what the engine returns.
    pub fn losses(&self, engine: &mut dyn Engine, state: &Rounded) -> Result<Vec<f32>> {
        let mut rec = Recording::new();
        let pending = self.record_losses(&mut rec, state);
        pending.take(&mut engine.run(rec)?)
    }

    /// Records the loss of every row, and its read-back.
    pub fn record_losses(&self, rec: &mut Recording<'_>, state: &Rounded) -> PendingLosses {
        let w_hat = state.grid.dequantize(rec, &self.shape, state.codes);
        let error = subtract(rec, w_hat, self.target);
        let loss = self.objective.losses(rec, error);
        error.free(rec);
        let pending = rec.download(loss);
        rec.free(loss);
        PendingLosses(pending)
    }
}

/// Losses on their way back.
#[derive(Debug)]
pub struct PendingLosses(Pending<f32>);

impl PendingLosses {
    /// # Errors
    /// `Kind::Numeric` when one is not finite.
    pub fn take(self, downloads: &mut Downloads) -> Result<Vec<f32>> {
        let loss: Vec<f32> = downloads.take(self.0)?;
        if loss.iter().any(|l| !l.is_finite()) {
            return Err(Error::numeric("layer loss", "is not finite: weights or statistics overflow f32"));
        }
        Ok(loss)
    }
}

/// Codes [rows, cols] in natural column order on a grid: the state that refinements change in place.
#[derive(Clone, Copy, Debug)]
pub struct Rounded {
    pub codes: Mat<u32>,
    pub grid: Grid,
}

impl Rounded {
    pub fn free(self, rec: &mut Recording<'_>) {
        self.codes.free(rec);
        self.grid.free(rec);
    }
}
