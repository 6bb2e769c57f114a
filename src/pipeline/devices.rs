//! What happens when the device is lost in the middle of a run: it is opened anew, or the CPU takes over where the user allows that.

use crate::engine::{DeviceChoice, Engine};
use crate::plan::Open;
use crate::{Error, Result};

/// How to get another engine.
pub(super) struct Devices<'r> {
    open: Open,
    choice: &'r DeviceChoice,
    fallback_cpu: bool,
    /// Records of the journal when the last one was lost.
    lost_at: Option<usize>,
}

impl<'r> Devices<'r> {
    pub fn new(open: Open, choice: &'r DeviceChoice, fallback_cpu: bool) -> Self {
        Self { open, choice, fallback_cpu, lost_at: None }
    }

    /// Was one lost in this run?
    pub fn lost(&self) -> bool {
        self.lost_at.is_some()
    }

    /// Puts another engine in the place of one that failed with `error` when the journal had `steps` records. A device that fails twice at the
    /// same place is not tried again.
    ///
    /// # Errors
    /// Device, if it does not come back and the CPU may not take over.
    pub fn replace(&mut self, engine: &mut Box<dyn Engine>, error: Error, steps: usize) -> Result<()> {
        tracing::warn!("{error}");
        let again = self.lost_at.replace(steps) == Some(steps);
        let opened = if again { Err(error) } else { (self.open)(self.choice) };
        *engine = match opened {
            Ok(engine) => engine,
            Err(_) if self.fallback_cpu && *self.choice != DeviceChoice::Cpu => {
                self.choice = &DeviceChoice::Cpu;
                (self.open)(self.choice)?
            }
            Err(error) if self.fallback_cpu => return Err(error),
            Err(error) => return Err(error.with_end("; the device does not come back, and --fallback-cpu would let the CPU go on")),
        };
        tracing::warn!("going on from the last record on {}", engine.describe());
        Ok(())
    }
}
