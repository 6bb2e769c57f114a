//! The fourth choice of a method: how weights become codes on a given grid.

pub mod descent;
pub mod factor;
pub mod gptq;

mod problem;
mod refit;

pub use descent::{Descent, DescentReport, descend};
pub use problem::{Problem, Rounded};

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rounding {
    /// Each weight to its nearest code.
    Nearest,
    /// Column by column, each column's error moved into the columns that follow.
    Gptq,
}
