//! The engines to test.

use aespa_gpu::engine::Engine;
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::gpu::{Adapters, GpuEngine};

/// The GPU engines to test: those that `AESPA_ADAPTERS` names (parts of names, separated by commas; `none` for none at all), else
/// all. A machine without an adapter fails the tests unless it says so, so that a GPU test that never ran cannot pass.
pub fn gpus() -> Vec<GpuEngine> {
    let adapters = Adapters::enumerate();
    indices(&adapters).into_iter().map(|index| adapters.open(index).expect("an adapter that opens")).collect()
}

/// What `--device gpu:INDEX` calls them.
pub fn gpu_indices() -> Vec<usize> {
    indices(&Adapters::enumerate())
}

fn indices(adapters: &Adapters) -> Vec<usize> {
    let wanted = std::env::var("AESPA_ADAPTERS").unwrap_or_default().to_lowercase();
    let chosen = adapters.reports().iter().filter(|report| wanted.split(',').any(|part| report.name.to_lowercase().contains(part)));
    let indices: Vec<_> = chosen.map(|report| report.index).collect();
    assert!(
        !indices.is_empty() || wanted == "none",
        "no GPU adapter to test among {:?}: run ./test, which installs a software driver, or set AESPA_ADAPTERS=none",
        adapters.reports().iter().map(|r| &r.name).collect::<Vec<_>>()
    );
    indices
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
