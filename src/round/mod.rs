//! The fourth choice of a method: how weights become codes on a given grid.

pub mod adaround;
mod blocks;
pub mod descent;
pub mod factor;
pub mod gptq;
mod joint;
pub mod orders;
mod problem;
mod refit;
mod sweep;
pub mod ties;
mod zeros;

pub use adaround::{AdaRound, AdaRoundReport, adaround};
pub use blocks::Blocks;
pub use descent::{Descent, DescentReport, descend};
pub use problem::{Problem, Rounded};

use crate::{Error, Result};
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
    /// Column orders that `Start::Gptq` tries: that of decreasing activations, then ones drawn at random. The best row is kept.
    pub orders: u32,
    pub adaround: Option<AdaRound>,
    pub descent: Option<Descent>,
}

impl Rounding {
    pub const NEAREST: Self = Self { start: Start::Nearest, orders: 1, adaround: None, descent: None };
    pub const GPTQ: Self = Self { start: Start::Gptq, ..Self::NEAREST };
    /// aespa's, as published.
    pub const GPTQ_ADAROUND: Self = Self { adaround: Some(AdaRound::PUBLISHED), ..Self::GPTQ };
    pub const GPTQ_DESCENT: Self = Self { descent: Some(Descent::DEFAULT), ..Self::GPTQ };

    /// A start and refinements joined by `+`: `nearest`, `gptq`, `gptq+descent`, `gptq+adaround+descent`,
    /// `gptq+adaround-blocks+descent`.
    ///
    /// # Errors
    /// Usage, naming what is not known.
    pub fn parse(chain: &str) -> Result<Self> {
        let bad = || {
            Error::usage("--rounding", format!("'{chain}' is not nearest or gptq, then any of +adaround or +adaround-blocks, and +descent"))
        };
        let mut links = chain.split('+');
        let mut rounding = match links.next() {
            Some("nearest") => Self::NEAREST,
            Some("gptq") => Self::GPTQ,
            _ => return Err(bad()),
        };
        for link in links {
            match link {
                "adaround" if !rounding.refines() => rounding.adaround = Some(AdaRound::NORMALISED),
                "adaround-blocks" if !rounding.refines() => rounding.adaround = Some(AdaRound::BLOCKS),
                "descent" => rounding.descent = Some(Descent::DEFAULT),
                _ => return Err(bad()),
            }
        }
        Ok(rounding)
    }

    /// Does anything follow the start?
    pub fn refines(&self) -> bool {
        self.adaround.is_some() || self.descent.is_some()
    }
}
