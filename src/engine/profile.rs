//! What the kernels of a run did: launches, arithmetic, bytes, seconds, and device memory.

use super::kernel::Cost;
use super::recording::Dispatch;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};

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

    /// The work of more of the same: this and `times` the step from this to `next`.
    pub fn continued(&self, next: &Self, times: f64) -> Self {
        self.combined(next, |from, to| from + times * (to - from))
    }

    /// The work of `n` runs like this one.
    pub fn times(&self, n: f64) -> Self {
        Self::default().continued(self, n)
    }

    /// What was done since `earlier`, an earlier state of this profile.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut rest = self.combined(earlier, |now, then| now - then);
        rest.kernels.retain(|_, k| k.launches > 0);
        rest.host.retain(|_, k| k.launches > 0);
        rest
    }

    /// Adds the work of another run.
    pub fn add(&mut self, other: &Self) {
        *self = self.combined(other, |a, b| a + b);
    }

    /// `of` every number of the work of this and another one. The peak is the higher one; submissions and what is live are left out.
    fn combined(&self, other: &Self, of: impl Fn(f64, f64) -> f64) -> Self {
        let whole = |a: u64, b: u64| of(a as f64, b as f64) as u64;
        let all = |a: &BTreeMap<&'static str, KernelProfile>, b: &BTreeMap<&'static str, KernelProfile>| {
            let names: BTreeSet<_> = a.keys().chain(b.keys()).copied().collect();
            let one = |name| {
                let [a, b] = [a, b].map(|map| map.get(name).copied().unwrap_or_default());
                let launches = whole(a.launches, b.launches);
                KernelProfile { launches, flops: of(a.flops, b.flops), bytes: of(a.bytes, b.bytes), seconds: of(a.seconds, b.seconds) }
            };
            names.into_iter().map(|name| (name, one(name))).collect()
        };
        Self {
            kernels: all(&self.kernels, &other.kernels),
            host: all(&self.host, &other.host),
            allocated_bytes: whole(self.allocated_bytes, other.allocated_bytes),
            uploaded_bytes: whole(self.uploaded_bytes, other.uploaded_bytes),
            downloaded_bytes: whole(self.downloaded_bytes, other.downloaded_bytes),
            peak_bytes: self.peak_bytes.max(other.peak_bytes),
            ..Self::default()
        }
    }

    /// Is there nothing to do, neither arithmetic nor transfers?
    pub fn is_idle(&self) -> bool {
        self.kernels.is_empty() && self.host.is_empty() && self.uploaded_bytes == 0 && self.downloaded_bytes == 0
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
