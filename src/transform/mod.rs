//! The first choice of a method: a rewrite of the weights that keeps the model's function but makes it easier to quantize.

pub mod zfold;

mod system;
mod zeta;

pub use zfold::{FoldRecord, FoldedBlock, FoldedTensor, Statistics, fold_block};

use crate::Result;
use crate::model::Linear;
use crate::quant::Lattice;
use crate::scale::ScaleRule;
use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transform {
    /// The weights as they are.
    None,
    /// Factors per input channel, folded into the norm or linear that the channel comes from: see [`zfold`].
    Zfold(ZfoldOptions),
}

/// Names and meanings of the values of `--transform`.
pub static TRANSFORMS: &[(&str, Transform, &str)] = &[
    ("none", Transform::None, "the weights as they are"),
    ("zfold", Transform::Zfold(ZfoldOptions::PUBLISHED), "factors per input channel, folded into neighbours (Z-Fold)"),
    ("zfold-weighted", Transform::Zfold(ZfoldOptions::WEIGHTED), "the same, factors found under the column metric"),
];

/// How the factors of folds are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ZfoldOptions {
    pub rule: ZetaRule,
    /// Factors and grids are found in turns, this often at most.
    pub iterations: u32,
}

impl ZfoldOptions {
    pub const PUBLISHED: Self = Self { rule: ZetaRule::Plain, iterations: 30 };
    pub const WEIGHTED: Self = Self { rule: ZetaRule::Weighted, iterations: 8 };
}

/// What the factors minimise while codes and grids stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ZetaRule {
    /// The squared error of each column of the weights, as Z-Fold (EMNLP 2023) does.
    Plain,
    /// The loss under the column metric, over all factors at once.
    Weighted,
}

/// The grids on which rewritten weights will be rounded, and how they are found.
#[derive(Clone, Copy)]
pub struct GridChoice<'a> {
    pub lattice: &'a dyn Fn(&Linear) -> Result<Lattice>,
    pub rule: ScaleRule,
}
