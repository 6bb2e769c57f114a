//! Which engine runs: `--device auto|cpu|gpu|gpu:INDEX|gpu:NAME`.

use super::Engine;
use super::cpu::CpuEngine;
use super::gpu::{AdapterReport, Adapters, GpuEngine};
use crate::cache::Cache;
use crate::{Error, Result};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

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

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Gpu => f.write_str("gpu"),
            Self::GpuIndex(index) => write!(f, "gpu:{index}"),
            Self::GpuName(name) => write!(f, "gpu:{name}"),
        }
    }
}

/// What `aespa-gpu devices` shows: every adapter, and which one auto would take.
pub fn list() -> Vec<AdapterReport> {
    Adapters::enumerate().reports().to_vec()
}

/// Opens the engine that `choice` asks for and logs which it is and why.
///
/// # Errors
/// `Kind::Usage` when no adapter fits, with a list of those that are there; `Kind::Device` when the one that fits cannot be opened.
pub fn open(choice: &DeviceChoice) -> Result<Box<dyn Engine>> {
    let (engine, why) = choose(choice)?;
    tracing::info!("device: {} ({why})", engine.describe());
    Ok(engine)
}

fn choose(choice: &DeviceChoice) -> Result<(Box<dyn Engine>, String)> {
    if *choice == DeviceChoice::Cpu {
        return Ok((Box::new(CpuEngine::new()), "as asked".to_owned()));
    }
    let adapters = Adapters::enumerate();
    let reports = adapters.reports();
    let found = match choice {
        DeviceChoice::Auto => return Ok(auto(&adapters)),
        DeviceChoice::GpuName(name) => {
            let name = name.to_lowercase();
            reports.iter().position(|report| report.name.to_lowercase().contains(&name))
        }
        DeviceChoice::GpuIndex(index) => (*index < reports.len()).then_some(*index),
        DeviceChoice::Gpu | DeviceChoice::Cpu => adapters.best(),
    };
    let index = found.ok_or_else(|| none_fits(reports))?;
    Ok((Box::new(tuned(&adapters, index)?), "as asked".to_owned()))
}

/// A hardware adapter that opens, else the native engine: on software adapters kernels run many times slower than natively.
fn auto(adapters: &Adapters) -> (Box<dyn Engine>, String) {
    let Some(report) = adapters.reports().iter().find(|report| report.auto_choice) else {
        let software = adapters.reports().len();
        return (Box::new(CpuEngine::new()), format!("auto: no hardware adapter, {software} software adapters are slower than this"));
    };
    match tuned(adapters, report.index) {
        Ok(engine) => (Box::new(engine), format!("auto: the best hardware adapter, {}", report.kind)),
        Err(error) => {
            tracing::warn!("{error}");
            (Box::new(CpuEngine::new()), "auto: the hardware adapter cannot be opened".to_owned())
        }
    }
}

/// An adapter with the tiles that suit it, which the first program that opens it finds out. Software adapters keep the defaults: they are
/// for tests, and tuning would tell about the processor. A device that is lost and opened again is not tuned in the middle of a run.
fn tuned(adapters: &Adapters, index: usize) -> Result<GpuEngine> {
    static BEFORE: AtomicBool = AtomicBool::new(false);
    let mut engine = adapters.open(index)?;
    let cache = Cache::user();
    let first = !BEFORE.swap(true, Ordering::Relaxed);
    if !adapters.reports()[index].software && !engine.load_tiles(&cache) && first {
        tracing::info!("finding out which tiles suit {}: a few seconds, once", adapters.reports()[index].name);
        engine.tune(&cache)?;
    }
    Ok(engine)
}

fn none_fits(reports: &[AdapterReport]) -> Error {
    if reports.is_empty() {
        return Error::usage("--device", "no Vulkan, Metal or DX12 adapter on this machine; install a driver or use --device cpu");
    }
    let list: Vec<_> = reports.iter().map(|r| format!("gpu:{} = {} ({}, {})", r.index, r.name, r.backend, r.kind)).collect();
    Error::usage("--device", format!("no such adapter; there are {}", list.join("; ")))
}
