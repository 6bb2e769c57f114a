//! What quantization produces, independent of models, algorithms and file formats: schemes and packed matrices.
//!
//! A code q is an unsigned number below 2^bits; with the scale s and zero point z of its group it stands for s (q − z). Groups are
//! runs of `group` columns within one output channel, or the whole channel. Symmetric schemes fix z at 2^(bits − 1).

pub mod bits;
mod grid;
mod packed;
mod scheme;

pub use grid::{Grid, GridShape, subtract};
pub use packed::{Digest, PackedLinear};
pub use scheme::{BITS, GROUP_SIZES, Scheme};
