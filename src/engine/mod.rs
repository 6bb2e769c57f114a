//! Engines run recordings: the GPU through wgpu, the CPU through native twins of the same kernels, or nothing at all (estimate).
//!
//! Algorithms name kernels and buffers only; which engine runs them is decided once, by `--device`.

pub mod buffer;
pub mod checked;
pub mod cpu;
pub mod device;
pub mod estimate;
pub mod gpu;
pub mod host_weight;
pub mod kernel;
pub mod kernels;
pub mod matrix;
pub mod panels;
pub mod profile;
pub mod rates;
pub mod recording;
pub mod shader;

pub use buffer::{Buffer, Elem, Element, RawBuffer, Scalar, Stored};
pub use device::{DeviceChoice, open};
pub use host_weight::HostWeight;
pub use matrix::{Mat, Weight};
pub use panels::{Panel, Panels};
pub use profile::Profile;
pub use rates::Rates;
pub use recording::{Downloads, Pending, Recording};

use crate::Result;
use std::time::Instant;

/// What a device can hold in one piece. Larger matrices are split by the code that records (see `panels`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one storage binding or buffer, whichever is smaller.
    pub max_buffer: u64,
    /// Can products take f16 operands?
    pub f16_operands: bool,
}

/// Runs recordings. Buffers live from the recording that allocates them to the one that frees them.
pub trait Engine {
    /// For logs and reports: what runs the kernels.
    fn describe(&self) -> String;
    /// What facts about its speed are kept under: as `describe`, with the driver's version.
    fn fingerprint(&self) -> String {
        self.describe()
    }
    fn limits(&self) -> Limits;
    /// Runs all commands in order and returns what they download. Those of a recording without downloads may wait for later ones.
    ///
    /// # Errors
    /// `Kind::Device` names the kernel when the device is lost, refuses work or is out of memory, maybe one of an earlier recording;
    /// `Kind::Internal` when the recording itself is wrong.
    fn run(&mut self, recording: Recording<'_>) -> Result<Downloads>;
    /// Time, arithmetic and memory so far.
    fn profile(&self) -> &Profile;
    fn profile_mut(&mut self) -> &mut Profile;
    /// From now on every kernel is timed by itself, where that is not so anyway: launches no longer overlap, so the whole gets slower.
    fn time_kernels(&mut self) {}
    /// Is nothing computed, so that what comes back says nothing? Code that is steered by results, or makes much of them on the host, asks.
    fn estimates(&self) -> bool {
        false
    }
    /// Do buffers lie in this process's memory?
    fn is_native(&self) -> bool {
        false
    }
}

/// Does arithmetic on the host and books `flops` and time for it; an estimate's blank stand-in takes none.
pub fn on_host<T>(engine: &mut dyn Engine, what: &'static str, flops: f64, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let out = work();
    let seconds = if engine.estimates() { 0.0 } else { start.elapsed().as_secs_f64() };
    engine.profile_mut().on_host(what, flops, seconds);
    out
}

/// Records and runs at once, where nothing is downloaded.
pub fn submit<'a, T>(engine: &mut dyn Engine, record: impl FnOnce(&mut Recording<'a>) -> T) -> Result<T> {
    let mut rec = Recording::new();
    let out = record(&mut rec);
    engine.run(rec)?;
    Ok(out)
}
