//! The fourth choice of a method: how weights become codes on a given grid.

pub mod descent;
pub mod factor;
pub mod gptq;
mod problem;
mod refit;

pub use descent::{Descent, DescentReport, descend};
pub use problem::{Problem, Rounded};

use serde::Serialize;

/// Where codes start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// Each weight at its nearest code.
    Nearest,
    /// Column by column, each column's error moved into the columns that follow.
    Gptq,
}

/// A start and the refinements that follow it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rounding {
    pub start: Start,
}

impl Rounding {
    pub const NEAREST: Self = Self { start: Start::Nearest };
    pub const GPTQ: Self = Self { start: Start::Gptq };
}
