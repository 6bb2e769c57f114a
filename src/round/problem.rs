//! What every rounding works on, and what it leaves.

use crate::engine::{Mat, Recording};
use crate::metric::Objective;
use crate::quant::{Grid, GridShape};

/// Rows to round: find codes such that E = s (q − z) − target has the least loss under the objective.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'m> {
    pub shape: GridShape,
    /// [rows, cols] in natural column order. Not always the weight itself: see asymmetric targets.
    pub target: Mat<f32>,
    pub objective: Objective<'m>,
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
