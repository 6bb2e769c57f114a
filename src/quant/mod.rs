//! What quantization produces, independent of models, algorithms and file formats: packed matrices, and the lattices they lie on.
//!
//! A [`Scheme`] is what a user asks for; a format makes a [`Lattice`] of it, which says exactly what a group of codes can stand for in
//! that format's files. Groups are runs of `group` columns within one output channel, or the whole channel.

pub mod bits;
mod grid;
mod lattice;
mod packed;
mod scheme;

pub use grid::{Grid, GridShape, HostGrid, subtract};
pub use lattice::{Lattice, Offset, Steps};
pub use packed::{Digest, Offsets, PackedLinear};
pub use scheme::{BITS, GROUP_SIZES, Scheme};
