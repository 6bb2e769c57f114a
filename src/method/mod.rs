//! Methods: compositions of four choices (transform, metric, scale, rounding). The names that users know are presets.

mod solve;

pub use solve::{FactorRecord, Settings, Solved, Solver};

use crate::metric::Metric;
use crate::round::Rounding;
use crate::scale::ScaleRule;
use crate::transform::Transform;
use crate::{Error, Result};
use serde::Serialize;

/// One preset.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Method {
    pub name: &'static str,
    #[serde(skip)]
    pub about: &'static str,
    pub transform: Transform,
    pub metric: Metric,
    pub scale: ScaleRule,
    pub rounding: Rounding,
}

/// Every preset; `--method` takes their names.
pub static METHODS: &[Method] = &[
    Method {
        name: "gptq",
        about: "error feedback column by column under the layer's Gram matrix (GPTQ, ICLR 2023)",
        transform: Transform::None,
        metric: Metric::Layer,
        scale: ScaleRule::Metric,
        rounding: Rounding::Gptq,
    },
    Method {
        name: "rtn",
        about: "round to nearest on the min/max grid; needs no calibration",
        transform: Transform::None,
        metric: Metric::Identity,
        scale: ScaleRule::MinMax,
        rounding: Rounding::Nearest,
    },
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_unique_documented_names() {
        for (i, m) in METHODS.iter().enumerate() {
            assert!(!m.about.is_empty());
            assert!(METHODS[..i].iter().all(|other| other.name != m.name));
            // Error feedback without statistics would be nearest rounding under a grander name.
            assert!(m.rounding != Rounding::Gptq || m.metric != Metric::Identity);
        }
        assert!(find("gptqq").is_err());
    }
}
