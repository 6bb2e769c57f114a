//! The engines to test.

use aespa_gpu::engine::Engine;
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::gpu::{Adapters, GpuEngine};

/// The GPU engines to test: those that `AESPA_ADAPTERS` names (parts of names, separated by commas; `none` for none at all), else
/// all. A machine without an adapter fails the tests unless it says so, so that a GPU test that never ran cannot pass.
pub fn gpus() -> Vec<GpuEngine> {
    let wanted = std::env::var("AESPA_ADAPTERS").unwrap_or_default().to_lowercase();
    let adapters = Adapters::enumerate();
    let chosen = adapters.reports().iter().filter(|report| wanted.split(',').any(|part| report.name.to_lowercase().contains(part)));
    let engines: Vec<_> = chosen.map(|report| adapters.open(report.index).expect("an adapter that opens")).collect();
    assert!(
        !engines.is_empty() || wanted == "none",
        "no GPU adapter to test among {:?}: run ./test, which installs a software driver, or set AESPA_ADAPTERS=none",
        adapters.reports().iter().map(|r| &r.name).collect::<Vec<_>>()
    );
    engines
}

/// The native engine, then every GPU engine.
pub fn engines() -> Vec<Box<dyn Engine>> {
    let gpus = gpus().into_iter().map(|gpu| Box::new(gpu) as Box<dyn Engine>);
    std::iter::once(Box::new(CpuEngine::poisoned()) as Box<dyn Engine>).chain(gpus).collect()
}

/// The same, refusing buffers above `bytes`, so that matrices have to be split.
pub fn engines_with_max_buffer(bytes: u64) -> Vec<Box<dyn Engine>> {
    let gpus = gpus().into_iter().map(|gpu| Box::new(gpu.with_max_buffer(bytes)) as Box<dyn Engine>);
    std::iter::once(Box::new(CpuEngine::with_max_buffer(bytes)) as Box<dyn Engine>).chain(gpus).collect()
}
