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
    /// Arithmetic on the host between recordings, by what it is.
    pub host: BTreeMap<&'static str, KernelProfile>,
    /// Of all buffers that were ever allocated.
    pub allocated_bytes: u64,
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

    /// Books the time of a launch that is already counted.
    pub fn took(&mut self, kernel: &'static str, seconds: f64) {
        self.kernels.entry(kernel).or_default().seconds += seconds;
    }

    /// Counts arithmetic of the host.
    pub fn on_host(&mut self, what: &'static str, flops: f64, seconds: f64) {
        let entry = self.host.entry(what).or_default();
        entry.launches += 1;
        entry.flops += flops;
        entry.seconds += seconds;
    }

    pub fn allocate(&mut self, id: u64, bytes: u64) {
        self.allocated_bytes += bytes;
        self.live.insert(id, bytes);
        self.live_bytes += bytes;
        self.peak_bytes = self.peak_bytes.max(self.live_bytes);
    }

    pub fn free(&mut self, id: u64) {
        self.live_bytes -= self.live.remove(&id).unwrap_or(0);
    }

    /// The work of more of the same: this and `times` the step from this to `next`. Peaks are those of `next`.
    pub fn continued(&self, next: &Self, times: f64) -> Self {
        let line = |from: f64, to: f64| from + times * (to - from);
        let whole = |from: u64, to: u64| line(from as f64, to as f64) as u64;
        let mut all = next.clone();
        let kernels = all.kernels.iter_mut().map(|(name, k)| (self.kernels.get(name), k));
        let host = all.host.iter_mut().map(|(name, k)| (self.host.get(name), k));
        for (from, k) in kernels.chain(host) {
            let from = from.copied().unwrap_or_default();
            *k = KernelProfile {
                launches: whole(from.launches, k.launches),
                flops: line(from.flops, k.flops),
                bytes: line(from.bytes, k.bytes),
                seconds: line(from.seconds, k.seconds),
            };
        }
        all.uploaded_bytes = whole(self.uploaded_bytes, next.uploaded_bytes);
        all.downloaded_bytes = whole(self.downloaded_bytes, next.downloaded_bytes);
        all.allocated_bytes = whole(self.allocated_bytes, next.allocated_bytes);
        all
    }

    /// The work of `n` runs like this one.
    pub fn times(&self, n: f64) -> Self {
        Self::default().continued(self, n)
    }

    /// What was done since `earlier`, an earlier state of this profile.
    pub fn since(&self, earlier: &Self) -> Self {
        let since = |now: &BTreeMap<&'static str, KernelProfile>, then: &BTreeMap<&'static str, KernelProfile>| {
            let rest = now.iter().map(|(name, k)| {
                let from = then.get(name).copied().unwrap_or_default();
                let rest = KernelProfile {
                    launches: k.launches - from.launches,
                    flops: k.flops - from.flops,
                    bytes: k.bytes - from.bytes,
                    seconds: k.seconds - from.seconds,
                };
                (*name, rest)
            });
            rest.filter(|(_, k)| k.launches > 0).collect()
        };
        Self {
            kernels: since(&self.kernels, &earlier.kernels),
            host: since(&self.host, &earlier.host),
            allocated_bytes: self.allocated_bytes - earlier.allocated_bytes,
            uploaded_bytes: self.uploaded_bytes - earlier.uploaded_bytes,
            downloaded_bytes: self.downloaded_bytes - earlier.downloaded_bytes,
            ..Self::default()
        }
    }

    /// Adds the work of another run.
    pub fn add(&mut self, other: &Self) {
        let add = |to: &mut BTreeMap<&'static str, KernelProfile>, from: &BTreeMap<&'static str, KernelProfile>| {
            for (name, k) in from {
                let entry = to.entry(name).or_default();
                entry.launches += k.launches;
                entry.flops += k.flops;
                entry.bytes += k.bytes;
                entry.seconds += k.seconds;
            }
        };
        add(&mut self.kernels, &other.kernels);
        add(&mut self.host, &other.host);
        self.uploaded_bytes += other.uploaded_bytes;
        self.downloaded_bytes += other.downloaded_bytes;
        self.allocated_bytes += other.allocated_bytes;
        self.peak_bytes = self.peak_bytes.max(other.peak_bytes);
    }

    /// Buffers that are allocated and not yet freed.
    pub fn live_buffers(&self) -> usize {
        self.live.len()
    }

    pub fn launches(&self) -> u64 {
        self.kernels.values().map(|k| k.launches).sum()
    }

    /// Of kernels and host.
    pub fn flops(&self) -> f64 {
        self.kernels.values().chain(self.host.values()).fold(0.0, |sum, k| sum + k.flops)
    }

    /// Of buffers that kernels were given.
    pub fn bytes(&self) -> f64 {
        self.kernels.values().fold(0.0, |sum, k| sum + k.bytes)
    }
}
