//! The second choice of a method: what the error of a layer is weighed by.
//!
//! With E = Ŵ − W the loss of a linear is L(E) = Σ_h tr(G_h E_h H E_hᵀ): H weighs columns (inputs), G_h the rows of one head. Where
//! there is no row metric (G = I) it is tr(E H Eᵀ) = Σ_rows e H eᵀ, and rows are independent.

mod columns;
mod objective;
mod rows;

pub use columns::ColumnMetric;
pub use objective::Objective;
pub use rows::RowMetric;

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Plain squared error of the weights; needs no calibration.
    Identity,
    /// Squared error of the layer's output: H = Xᵀ X / n_tok.
    Layer,
}
