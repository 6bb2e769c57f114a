//! A device is measured once, with all kernels that runs use, and plans tell time by it.

mod common;

use aespa_gpu::cache::Cache;
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::kernels::KERNELS;
use aespa_gpu::engine::{DeviceChoice, Rates};
use aespa_gpu::measure::{known, measure};
use aespa_gpu::pipeline::Quiet;
use common::place::{Place, said};
use std::process::Stdio;

/// Kernels that no run over a block of a LLaMA needs: the layer norm of other families, the comparison of two models, what readers of packed
/// files use; and the one that is measured by itself.
const OTHERS: [&str; 5] = ["embed", "kl_divergence", "layer_norm", "multiply_add", "unpack_bits"];

#[test]
fn every_kernel_has_a_rate_and_plans_tell_time_by_it() {
    let place = Place::new(2);
    let folder = place.path("cache");
    let cache = Cache::at(folder.clone());
    let engine = CpuEngine::new();
    assert!(known(&engine, &cache).is_none());
    let measured = measure(&DeviceChoice::Cpu, &cache, &mut Quiet).unwrap();
    let without: Vec<_> = KERNELS.iter().map(|k| k.name).filter(|name| !measured.kernels.contains_key(name)).collect();
    assert_eq!(without.iter().filter(|name| !OTHERS.contains(name)).collect::<Vec<_>>(), Vec::<&&str>::new());
    assert!(measured.host.contains_key("factor in f64"), "{:?}", measured.host);
    let Rates { copy, multiply_add, upload, download, allocate, kernels, host } = known(&engine, &cache).unwrap();
    let sound = |rate: &f64| rate.is_finite() && *rate > 0.0;
    assert!([copy, multiply_add, upload, download, allocate].iter().all(sound));
    assert!(kernels.values().chain(host.values()).all(|rate| sound(&rate.per_second) && rate.launch.is_finite() && rate.launch >= 0.0));

    let plan = |cache: &str| -> serde_json::Value {
        let mut command = place.command("plan model -o out --json --device cpu --calibration text.txt --samples 4 --sequence-length 64");
        let output = command.env("AESPA_CACHE", place.path(cache)).stdout(Stdio::piped()).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let known = plan("cache");
    let seconds = known["seconds"].as_f64().unwrap();
    let stages: f64 = known["stages"].as_array().unwrap().iter().map(|stage| stage["seconds"].as_f64().unwrap()).sum();
    assert!(seconds > 0.0 && (stages / seconds - 1.0).abs() < 1e-9, "{known}");
    // A device that was never measured has no times, and no made-up ones.
    let unknown = plan("empty");
    assert!(unknown["seconds"].is_null() && unknown["stages"][0]["seconds"].is_null(), "{unknown}");
}
