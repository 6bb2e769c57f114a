//! The dry run: adds up arithmetic, bytes and peak memory of recordings and runs nothing.
//!
//! What the host allocates on the way it really allocates, as zeros that nobody touches and the system therefore does not back with memory;
//! `memory` counts them, so that an estimate tells the peak of both together.

use super::profile::Profile;
use super::recording::{Command, Downloads, Recording, last_uses};
use super::{Engine, Limits};
use crate::{Result, memory};
use std::collections::HashSet;

/// Downloads come back as zeros, so code that looks at results must not be steered by an estimate.
#[derive(Debug)]
pub struct Estimate {
    limits: Limits,
    /// Do the buffers lie in this process's memory?
    native: bool,
    profile: Profile,
}

impl Estimate {
    /// `limits` are those of the engine that would run the work, since they decide how matrices are split.
    pub fn new(limits: Limits) -> Self {
        Self { limits, native: false, profile: Profile::default() }
    }

    /// Of an engine whose buffers lie in this process's memory.
    pub fn native(limits: Limits) -> Self {
        Self { native: true, ..Self::new(limits) }
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
        let mut out = Downloads::blank(downloads);
        let last = last_uses(&commands);
        let mut given = HashSet::new();
        let mut commands = commands.into_iter().zip(last).peekable();
        while let Some((command, last)) = commands.next() {
            match command {
                Command::Alloc { buffer, .. } => {
                    // A native engine makes the buffer out of the data, if that follows.
                    if let Some((Command::Upload { data, .. }, _)) =
                        commands.next_if(|(next, _)| matches!(next, Command::Upload { buffer: filled, .. } if filled.id == buffer.id))
                    {
                        self.profile.uploaded_bytes += data.len() as u64;
                    }
                    self.profile.allocate(buffer.id, buffer.bytes() as u64);
                    if self.native {
                        memory::pretend(buffer.bytes());
                    }
                }
                Command::Upload { data, .. } => self.profile.uploaded_bytes += data.len() as u64,
                Command::Dispatch(dispatch) => {
                    self.profile.launch(&dispatch, 0.0);
                }
                Command::Copy { .. } => {}
                Command::Download { buffer, slot } => {
                    self.profile.downloaded_bytes += buffer.bytes() as u64;
                    if last && self.native {
                        memory::give_back(buffer.bytes());
                        given.insert(buffer.id);
                    }
                    out.set(slot, vec![0; buffer.bytes() / 4]);
                }
                Command::Free { buffer } => {
                    self.profile.free(buffer.id);
                    if self.native && !given.contains(&buffer.id) {
                        memory::give_back(buffer.bytes());
                    }
                }
            }
        }
        Ok(out)
    }

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn profile_mut(&mut self) -> &mut Profile {
        &mut self.profile
    }

    fn estimates(&self) -> bool {
        true
    }
}
