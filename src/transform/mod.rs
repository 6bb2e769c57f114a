//! The first choice of a method: a rewrite of the weights that keeps the model's function but makes it easier to quantize.

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transform {
    /// The weights as they are.
    None,
}
