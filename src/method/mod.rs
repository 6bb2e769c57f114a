//! Methods: compositions of choices (transform, metric, scale, rounding, and which inputs linears see). The names that users know are
//! presets.

mod columns;
mod damping;
mod pieces;
mod solve;
mod strength;
mod targets;

pub use columns::FactorRecord;
pub use damping::{Damping, damping_of};
pub use solve::{SolveRecord, Solved, Solver};
pub use strength::{Strength, strength_of};
pub use targets::Targets;

use crate::calib::Tokens;
use crate::metric::Metric;
use crate::round::{Rounding, Start};
use crate::scale::ScaleRule;
use crate::transform::{Transform, ZfoldOptions};
use crate::{Error, Result};
use serde::Serialize;

/// What to solve for, the same for all linears of a run.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub method: Method,
    pub act_order: bool,
    /// How far asymmetric targets are moved, α and β; `None` asks the split-half test.
    pub alpha: Option<f32>,
    pub seed: u64,
}

/// Which inputs a linear is calibrated on, within its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Inputs {
    /// What the float block makes of the quantized blocks' outputs.
    Block,
    /// What the linears before it, quantized already, really give it.
    Sequential,
    /// As `Sequential`, aiming at the float model's outputs.
    Asymmetric,
    /// As `Asymmetric`; linears whose outputs are added to the residual stream also aim at what that lacks.
    Residual,
}

impl Inputs {
    /// Does the float model run along?
    pub fn two_streams(self) -> bool {
        matches!(self, Self::Asymmetric | Self::Residual)
    }
}

/// One preset.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Method {
    pub name: &'static str,
    #[serde(skip)]
    pub about: &'static str,
    pub transform: Transform,
    pub metric: Metric,
    /// How much tokens count in the metric of an input.
    pub tokens: Tokens,
    pub scale: ScaleRule,
    pub rounding: Rounding,
    pub inputs: Inputs,
    /// λ: every metric H is used as H + λ diag(H).
    pub damping: Damping,
}

/// Every preset; `--method` takes their names.
pub static METHODS: &[Method] = &[
    Method {
        name: "aespa",
        about: "past aespa: tokens weighed by the residual stream, the float model's outputs as targets, coordinate descent from a GPTQ start",
        transform: Transform::None,
        metric: Metric::Layer,
        tokens: Tokens::Residual,
        scale: ScaleRule::Metric,
        rounding: Rounding::GPTQ_DESCENT,
        inputs: Inputs::Residual,
        damping: Damping::SplitHalf,
    },
    Method {
        name: "aespa-2024",
        about: "aespa as published (NeurIPS 2024): Z-Fold, attention-wise metrics, AdaRound from a GPTQ start",
        transform: Transform::Zfold(ZfoldOptions::PUBLISHED),
        metric: Metric::Attention,
        tokens: Tokens::Uniform,
        scale: ScaleRule::Metric,
        rounding: Rounding::GPTQ_ADAROUND,
        inputs: Inputs::Block,
        damping: Damping::Fixed(0.01),
    },
    Method {
        name: "zfold",
        about: "factors per input channel folded into neighbours, then GPTQ (Z-Fold, EMNLP 2023)",
        transform: Transform::Zfold(ZfoldOptions::PUBLISHED),
        metric: Metric::Layer,
        tokens: Tokens::Uniform,
        scale: ScaleRule::Metric,
        rounding: Rounding::GPTQ,
        inputs: Inputs::Block,
        damping: Damping::Fixed(0.01),
    },
    Method {
        name: "gptq",
        about: "error feedback column by column under the layer's Gram matrix (GPTQ, ICLR 2023)",
        transform: Transform::None,
        metric: Metric::Layer,
        tokens: Tokens::Uniform,
        scale: ScaleRule::Metric,
        rounding: Rounding::GPTQ,
        inputs: Inputs::Block,
        damping: Damping::Fixed(0.01),
    },
    Method {
        name: "rtn",
        about: "round to nearest on the min/max grid; needs no calibration",
        transform: Transform::None,
        metric: Metric::Identity,
        tokens: Tokens::Uniform,
        scale: ScaleRule::MinMax,
        rounding: Rounding::NEAREST,
        inputs: Inputs::Block,
        damping: Damping::Fixed(0.01),
    },
];

/// Names and meanings of the values of `--inputs`.
pub static INPUTS: &[(&str, Inputs, &str)] = &[
    ("block", Inputs::Block, "what the float block makes of the quantized blocks' outputs, collected once"),
    ("sequential", Inputs::Sequential, "what the block's linears, quantized so far, really give (true sequential)"),
    ("asymmetric", Inputs::Asymmetric, "as sequential, aiming at the float model's outputs (QEP, GPTAQ)"),
    ("residual", Inputs::Residual, "as asymmetric, and what is added to the residual stream makes up for what that lacks"),
];

/// The preset called `name`.
pub fn find(name: &str) -> Result<Method> {
    let names = || METHODS.iter().map(|m| m.name).collect::<Vec<_>>().join(", ");
    METHODS.iter().find(|m| m.name == name).copied().ok_or_else(|| Error::usage("--method", format!("'{name}' is not one of {}", names())))
}

impl Method {
    /// Does it need statistics of calibration text?
    pub fn calibrates(&self) -> bool {
        self.metric != Metric::Identity
    }

    /// # Errors
    /// Choices that make no sense together.
    pub fn check(&self) -> Result<()> {
        // Error feedback without statistics would be nearest rounding under a grander name.
        if self.metric == Metric::Identity && (self.rounding.start == Start::Gptq || self.inputs != Inputs::Block) {
            return Err(Error::usage("--metric", "identity needs --rounding nearest and --inputs block: it looks at no inputs"));
        }
        if self.metric == Metric::Identity && self.transform != Transform::None {
            return Err(Error::usage("--transform", "needs statistics of calibration text: choose another --metric than identity"));
        }
        if self.metric == Metric::Identity && self.tokens != Tokens::Uniform {
            return Err(Error::usage("--tokens", "weigh the tokens of calibration text: choose another --metric than identity"));
        }
        match self.damping {
            Damping::Fixed(damping) if !(damping.is_finite() && damping >= 0.0) => {
                return Err(Error::usage("--damping", "must be auto or a number of zero or more"));
            }
            Damping::SplitHalf if self.inputs == Inputs::Block => {
                return Err(Error::usage(
                    "--damping",
                    "auto compares two halves of the windows as they walk: give a number, or other --inputs than block",
                ));
            }
            _ => {}
        }
        if self.rounding.orders == 0 || (self.rounding.orders > 1 && self.rounding.start != Start::Gptq) {
            return Err(Error::usage("--orders", "must be 1 or more, and belongs to error feedback: add --rounding gptq"));
        }
        if let Some(descent) = &self.rounding.descent
            && !(descent.temperature.is_finite() && descent.temperature >= 0.0)
        {
            return Err(Error::usage("--temperature", "must be zero or more"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_unique_documented_names() {
        for (i, m) in METHODS.iter().enumerate() {
            assert!(!m.about.is_empty());
            assert!(METHODS[..i].iter().all(|other| other.name != m.name));
            m.check().unwrap();
        }
        assert!(find("gptqq").is_err());
    }
}
