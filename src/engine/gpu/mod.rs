//! The GPU engine: the only module that names wgpu.
//!
//! Recordings become command encoders: each holds the launches since the last submission, with their parameters in one uniform
//! buffer, and is submitted where something is read back or much work has come together, so that one may hold several recordings
//! or a part of one. Commands keep the order of the recordings; where wgpu would reorder (host writes happen before the
//! encoder they follow) the engine submits first. wgpu itself inserts the barriers between launches.
//!
//! - `adapters`: what is there, and what `--device` means.
//! - `context`: the device, error scopes, device loss, buffers.
//! - `choice`: which text of a kernel an adapter runs, with which constants.
//! - `pipelines`: shaders to pipelines, cached.
//! - `batch`: the submission under construction.
//! - `timer`: how long launches take; `tune`: tiles by what they take.
//! - `run`: one command after the other, and read-back.

pub mod adapters;
mod batch;
mod choice;
mod context;
mod pipelines;
mod run;
mod timer;
mod tune;

pub use adapters::{AdapterReport, Adapters};
pub use choice::{Ability, Choice, Variants};
pub use pipelines::{ZERO_INITIALIZE_WORKGROUP_MEMORY, runtime_checks};
pub use run::GpuEngine;
pub use tune::{Tiles, TuneReport};
