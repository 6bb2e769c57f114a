//! Quantization schemes and packed results: independent of models and methods.

mod bits;
mod grid;
mod packed;
mod scheme;

pub use grid::{Grid, GridShape, subtract};
pub use packed::PackedLinear;
pub use scheme::Scheme;
