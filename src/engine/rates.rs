//! What an engine does in a second, as measured, and how long work will take by that.
//!
//! A kernel's time is a line in what it does: t = launches · launch + amount / rate, its amount being floating-point operations, or bytes where
//! it has none. Two runs of different widths give both; see `measure`.

use super::Profile;
use super::profile::KernelProfile;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Of one kernel, or of one kind of work on the host.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Seconds that every launch takes, whatever it does.
    pub launch: f64,
    /// Floating-point operations, or bytes where there are none, per second.
    pub per_second: f64,
}

/// Of one engine. Bytes and floating-point operations are per second.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Rates {
    /// Bytes read and written by a copy of a large buffer.
    pub copy: f64,
    /// Multiply-adds in registers, two operations each.
    pub multiply_add: f64,
    pub upload: f64,
    pub download: f64,
    /// New buffers, their first use included.
    pub allocate: f64,
    pub kernels: BTreeMap<String, Rate>,
    pub host: BTreeMap<String, Rate>,
}

/// What a kernel's time depends on.
fn amount(k: &KernelProfile) -> f64 {
    if k.flops > 0.0 { k.flops } else { k.bytes }
}

impl Rate {
    /// The line through two runs, of which the second did more; through the origin where the first tells nothing.
    pub fn of_runs(less: Option<&KernelProfile>, more: &KernelProfile) -> Self {
        let through = |launch: f64| {
            let seconds = more.seconds - launch * more.launches as f64;
            // Clocks tell no less than a nanosecond.
            Self { launch, per_second: amount(more) / seconds.max(1e-9) }
        };
        let Some(less) = less.filter(|less| less.seconds > 0.0 && less.launches > 0) else { return through(0.0) };
        let (l1, a1, l2, a2) = (less.launches as f64, amount(less), more.launches as f64, amount(more));
        let det = l1 * a2 - l2 * a1;
        // Launches of about the same size in both tell nothing of what a launch takes.
        let launch = if det.abs() > 0.2 * l1 * a2 { (less.seconds * a2 - more.seconds * a1) / det } else { 0.0 };
        // No less than nothing, and not so much that the work itself would take less than half of the time.
        through(launch.clamp(0.0, 0.5 * more.seconds / l2.max(1.0)))
    }

    fn seconds(&self, k: &KernelProfile) -> f64 {
        self.launch * k.launches as f64 + amount(k) / self.per_second
    }
}

impl Rates {
    /// Seconds that all of `profile` will take.
    pub fn seconds(&self, profile: &Profile) -> f64 {
        let kernels = profile.kernels.iter().map(|(name, k)| self.of(&self.kernels, name, k)).sum::<f64>();
        let host = profile.host.iter().map(|(name, k)| self.of(&self.host, name, k)).sum::<f64>();
        kernels
            + host
            + profile.uploaded_bytes as f64 / self.upload
            + profile.downloaded_bytes as f64 / self.download
            + profile.allocated_bytes as f64 / self.allocate
    }

    /// What was never measured is taken to be as fast as the slower of copies and of a twentieth of multiply-adds.
    fn of(&self, rates: &BTreeMap<String, Rate>, name: &str, k: &KernelProfile) -> f64 {
        match rates.get(name) {
            Some(rate) => rate.seconds(k),
            None => (k.bytes / self.copy).max(20.0 * k.flops / self.multiply_add),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(launches: u64, flops: f64, seconds: f64) -> KernelProfile {
        KernelProfile { launches, flops, bytes: 0.0, seconds }
    }

    #[test]
    fn two_runs_give_launch_and_rate() {
        // 1 ms a launch, 1e9 a second.
        let rate = Rate::of_runs(Some(&run(10, 1e6, 0.011)), &run(10, 1e9, 1.01));
        assert!((rate.launch - 1e-3).abs() < 1e-9 && (rate.per_second - 1e9).abs() < 1.0, "{rate:?}");
        assert!((rate.seconds(&run(100, 2e9, 0.0)) - 2.1).abs() < 1e-9);
    }

    #[test]
    fn runs_that_tell_nothing_of_launches_give_a_line_through_the_origin() {
        for less in [None, Some(run(10, 1e9, 1.1)), Some(run(0, 0.0, 0.0))] {
            assert_eq!(Rate::of_runs(less.as_ref(), &run(10, 1e9, 1.0)), Rate { launch: 0.0, per_second: 1e9 });
        }
    }

    #[test]
    fn noise_gives_no_time_below_zero() {
        let faster = Rate::of_runs(Some(&run(1, 1e6, 1e-9)), &run(1, 1e9, 1.0));
        assert!(faster.launch >= 0.0 && faster.per_second > 0.0);
        let slower = Rate::of_runs(Some(&run(1, 1e6, 100.0)), &run(1, 1e9, 1.0));
        assert_eq!(slower, Rate { launch: 0.5, per_second: 2e9 });
    }
}
