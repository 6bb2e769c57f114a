//! What the kernels of a run did: launches, arithmetic, bytes, seconds, and device memory.

use super::kernel::Cost;
use super::recording::Dispatch;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct KernelProfile {
    pub launches: u64,
    pub flops: f64,
    /// Bytes of all bound buffers, each counted once per launch (read and write for what is written): a lower bound on traffic.
    pub bytes: f64,
    /// Wall-clock seconds; zero where the engine cannot tell kernels apart.
    pub seconds: f64,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Profile {
    pub kernels: BTreeMap<&'static str, KernelProfile>,
    pub uploaded_bytes: u64,
    pub downloaded_bytes: u64,
    /// Command buffers handed to a GPU's queue; none where there is no such thing.
    pub submissions: u64,
    pub live_bytes: u64,
    pub peak_bytes: u64,
    #[serde(skip)]
    live: HashMap<u64, u64>,
}

impl Profile {
    pub fn launch(&mut self, dispatch: &Dispatch, seconds: f64) -> Cost {
        let cost = (dispatch.kernel.cost)(&dispatch.params);
        let entry = self.kernels.entry(dispatch.kernel.name).or_default();
        entry.launches += 1;
        entry.flops += cost.flops;
        entry.seconds += seconds;
        for (binding, buffer) in dispatch.kernel.bindings.iter().zip(&dispatch.buffers) {
            entry.bytes += buffer.bytes() as f64 * if binding.writes { 2.0 } else { 1.0 };
        }
        cost
    }

    pub fn allocate(&mut self, id: u64, bytes: u64) {
        self.live.insert(id, bytes);
        self.live_bytes += bytes;
        self.peak_bytes = self.peak_bytes.max(self.live_bytes);
    }

    pub fn free(&mut self, id: u64) {
        self.live_bytes -= self.live.remove(&id).unwrap_or(0);
    }

    /// The work of more of the same: this and `times` the step from this to `next`. Peaks are those of `next`.
    pub fn continued(&self, next: &Self, times: f64) -> Self {
        let mut all = next.clone();
        for (name, k) in &mut all.kernels {
            let from = self.kernels.get(name).copied().unwrap_or_default();
            let line = |from: f64, to: f64| from + times * (to - from);
            *k = KernelProfile {
                launches: line(from.launches as f64, k.launches as f64) as u64,
                flops: line(from.flops, k.flops),
                bytes: line(from.bytes, k.bytes),
                seconds: line(from.seconds, k.seconds),
            };
        }
        all
    }

    /// Buffers that are allocated and not yet freed.
    pub fn live_buffers(&self) -> usize {
        self.live.len()
    }

    pub fn launches(&self) -> u64 {
        self.kernels.values().map(|k| k.launches).sum()
    }

    pub fn flops(&self) -> f64 {
        self.kernels.values().map(|k| k.flops).sum()
    }
}
