//! Checkpoints and the block graph: what a model folder holds and how its pieces connect. No GPU, no algorithms.
//!
//! A [`Checkpoint`] is a memory-mapped Hugging Face folder. Its `config.json` picks a [`Family`], and the family states once, as
//! data, everything that later stages ask about an architecture: a [`ModelSpec`] of [`Block`]s, whose [`Linear`]s have a [`Role`]
//! and read an [`Input`], and whose [`Fold`]s say which factors can move from one tensor into the next without changing the
//! function. Algorithms and exporters speak in roles and never parse tensor names.
//!
//! A new architecture is one new file with a `pub const FAMILY: Family` and one line in [`FAMILIES`].

mod checkpoint;
mod config;
mod demo;
mod family;
mod graph;
mod header;
mod json;
mod llama;
mod map;
mod rope;
mod shards;
mod synthetic;
mod weights;

pub use checkpoint::{Checkpoint, RawTensor};
pub use config::{Config, Section};
pub use demo::{DEMO_FILES, unpack_demo};
pub use family::{FAMILIES, Family, find_family, spec_of};
pub use graph::{Activation, Block, Fold, FoldSource, Input, Linear, ModelSpec, Norm, NormKind, Role, TensorSpec, Tied};
pub use map::Map;
pub use rope::{Rope, Scaling};
pub use synthetic::Synthetic;
pub use weights::Weights;
