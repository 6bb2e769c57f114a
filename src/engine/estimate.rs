//! The dry run: adds up arithmetic, bytes and peak memory of recordings and runs nothing.

use super::profile::Profile;
use super::recording::{Command, Downloads, Recording};
use super::{Engine, Limits};
use crate::Result;

/// Downloads come back as zeros, so code that looks at results must not be steered by an estimate.
#[derive(Debug)]
pub struct Estimate {
    limits: Limits,
    profile: Profile,
}

impl Estimate {
    /// `limits` are those of the engine that would run the work, since they decide how matrices are split.
    pub fn new(limits: Limits) -> Self {
        Self { limits, profile: Profile::default() }
    }
}

impl Engine for Estimate {
    fn describe(&self) -> String {
        "estimate (runs nothing)".to_owned()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn run(&mut self, recording: Recording<'_>) -> Result<Downloads> {
        let (commands, downloads) = recording.into_commands()?;
        let mut out = Downloads::new(downloads);
        for command in &commands {
            match command {
                Command::Alloc { buffer, .. } => self.profile.allocate(buffer.id, buffer.bytes() as u64),
                Command::Upload { data, .. } => self.profile.uploaded_bytes += data.len() as u64,
                Command::Dispatch(dispatch) => {
                    self.profile.launch(dispatch, 0.0);
                }
                Command::Copy { .. } => {}
                Command::Download { buffer, slot } => {
                    self.profile.downloaded_bytes += buffer.bytes() as u64;
                    out.set(*slot, vec![0; buffer.bytes() / 4]);
                }
                Command::Free { buffer } => self.profile.free(buffer.id),
            }
        }
        Ok(out)
    }

    fn profile(&self) -> &Profile {
        &self.profile
    }
}
