//! The second choice of a method: what the error of a layer is weighed by.
//!
//! With E = Ŵ − W the loss of a linear is L(E) = Σ_h tr(G_h E_h H E_hᵀ): H weighs columns (inputs), G_h the rows of one head. Where
//! there is no row metric (G = I) it is tr(E H Eᵀ) = Σ_rows e H eᵀ, and rows are independent.

mod attention;
mod columns;
mod objective;
mod rows;
mod shrink;

pub use attention::{AttentionHalf, AttentionMetric, Heads, Shrinkage};
pub use columns::ColumnMetric;
pub use objective::Objective;
pub use rows::RowMetric;

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Plain squared error of the weights; needs no calibration.
    Identity,
    /// Squared error of the layer's output: H = Xᵀ X / n_tok.
    Layer,
    /// aespa's: q and k weighed by the moments of k and q, v by the attention-weighted input.
    Attention,
    /// q and k weighed by what their errors cost at the attention's output, measured by random probes; v as `Attention`, and W_O.
    Probe,
}

/// Names and meanings of the values of `--metric`.
pub static METRICS: &[(&str, Metric, &str)] = &[
    ("identity", Metric::Identity, "squared error of the weights; needs no calibration"),
    ("layer", Metric::Layer, "squared error of the layer's output"),
    ("attention", Metric::Attention, "aespa's: q, k and v by the attention map and output they make"),
    ("probe", Metric::Probe, "q and k by random probes of the attention's output, v by the output projection too"),
];

impl Metric {
    /// Does it look at heads?
    pub fn attends(self) -> bool {
        matches!(self, Self::Attention | Self::Probe)
    }

    /// Are the metrics of heads shrunk as far as two halves of the windows disagree?
    pub fn shrinks(self) -> bool {
        self == Self::Probe
    }
}
