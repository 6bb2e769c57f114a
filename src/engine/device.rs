//! Which engine runs: `--device auto|cpu|gpu|gpu:INDEX|gpu:NAME`.

use super::Engine;
use super::cpu::CpuEngine;
use crate::{Error, Result};
use std::str::FromStr;

/// What the user asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A hardware adapter if there is one, else the native engine.
    Auto,
    Cpu,
    /// The best adapter, of any kind.
    Gpu,
    GpuIndex(usize),
    /// The first adapter whose name contains this, in any case.
    GpuName(String),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Ok(match s {
            "auto" => Self::Auto,
            "cpu" => Self::Cpu,
            "gpu" => Self::Gpu,
            _ => match s.strip_prefix("gpu:") {
                Some(rest) if !rest.is_empty() => rest.parse().map_or_else(|_| Self::GpuName(rest.to_owned()), Self::GpuIndex),
                _ => return Err(Error::usage("--device", format!("'{s}' is not auto, cpu, gpu, gpu:INDEX or gpu:NAME"))),
            },
        })
    }
}

/// Opens the engine that `choice` asks for and logs which it is and why.
pub fn open(choice: &DeviceChoice) -> Result<Box<dyn Engine>> {
    match choice {
        DeviceChoice::Cpu => Ok(Box::new(CpuEngine::new())),
        _ => Err(Error::device("--device", "no GPU engine yet")),
    }
}
