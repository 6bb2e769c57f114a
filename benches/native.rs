//! Where a run's time goes on the native engine, and how far it is from what the machine can do.
//!
//! usage: cargo bench --bench native -- [METHOD [MODEL_DIR TEXT_FILE [SAMPLES [LENGTH]]]]      (default: gptq, the demo model, built-in text)
//!
//! Runs the whole pipeline into a temporary folder, takes seconds and flops per kernel from its report, and multiplies matrices of
//! the same shapes with `gemm` on all cores in the same process, before and after; the better rate counts. Ratios are what counts: that of the
//! rates of matrix products, and that of the run's seconds to what all its arithmetic would take at the rate of `gemm`. Flops are those of
//! dense products, also where zeros are left out. Absolute numbers depend on the machine and on who else uses it.

use aespa_gpu::engine::DeviceChoice;
use aespa_gpu::memory::{self, Counting};
use aespa_gpu::model::{Checkpoint, ModelSpec, unpack_demo};
use aespa_gpu::pipeline::{self, Quiet};
use aespa_gpu::plan::{Plan, Request};
use aespa_gpu::quant::Scheme;
use aespa_gpu::{Error, Result, export, method};
use std::path::PathBuf;
use std::time::Instant;

/// As in the program.
#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Tokens per batch of the forward pass.
const TOKENS: usize = 4096;

fn main() -> Result<()> {
    memory::keep_buffers();
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let dir = tempfile::tempdir().map_err(|e| aespa_gpu::Error::output("temporary folder", "cannot be made").caused_by(e))?;
    let model = match arguments.get(1) {
        Some(path) => PathBuf::from(path),
        None => {
            let model = dir.path().join("demo");
            std::fs::create_dir(&model).map_err(|e| aespa_gpu::Error::output(model.display(), "cannot be made").caused_by(e))?;
            unpack_demo(&model)?;
            model
        }
    };
    let number = |i: usize, default: usize| arguments.get(i).and_then(|a| a.parse().ok()).unwrap_or(default);
    let request = Request {
        calibration: arguments.get(2).map(PathBuf::from),
        samples: Some(number(3, 128)),
        sequence_length: Some(number(4, 512)),
        device: DeviceChoice::Cpu,
        ..Request::new(
            model.clone(),
            dir.path().join("out"),
            method::find(arguments.first().map_or("gptq", String::as_str))?,
            Scheme::new(3, -1, false)?,
            vec![export::find("compressed-tensors")?],
        )
    };
    let plan = Plan::new(request)?;
    let before = gemm_rate(Checkpoint::open(&model)?.spec());
    let busy_before = processor_seconds();
    let reports = pipeline::run(plan, &mut Quiet)?;
    let busy = processor_seconds().zip(busy_before).map(|(after, before)| after - before);
    let report = reports.first().ok_or_else(|| Error::internal("run", "has no report"))?;

    println!("{:<16} {:>8} {:>10} {:>8} {:>10}", "kernel", "launches", "seconds", "share", "GFLOP/s");
    let mut kernels: Vec<_> = report.kernels.kernels.iter().chain(&report.kernels.host).collect();
    kernels.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
    for (name, k) in &kernels {
        let rate = k.flops / k.seconds / 1e9;
        println!("{name:<16} {:>8} {:>10.3} {:>7.1}% {rate:>10.1}", k.launches, k.seconds, 100.0 * k.seconds / report.seconds);
    }
    for stage in &report.stages {
        println!("{:<28} {:>8.2} s", stage.name, stage.seconds);
    }
    println!("total {:.2} s, peak memory {:?} bytes", report.seconds, report.memory.peak_resident_bytes);
    if let Some(busy) = busy {
        let cores = rayon::current_num_threads();
        println!("{cores} cores, busy {:.0} % of the time", 100.0 * busy / (cores as f64 * report.seconds));
    }

    let products = ["matmul_nt", "matmul_nn", "matmul_tn", "gram"];
    let (seconds, flops) =
        kernels.iter().filter(|(name, _)| products.contains(*name)).fold((0.0, 0.0), |(s, f), (_, k)| (s + k.seconds, f + k.flops));
    // The machine may have other work at one of the two times.
    let alone = before.max(gemm_rate(Checkpoint::open(&model)?.spec()));
    let own = flops / seconds / 1e9;
    println!("matrix products: {:.1} % of the run at {own:.1} GFLOP/s", 100.0 * seconds / report.seconds);
    println!("gemm alone on the forward pass's shapes: {alone:.1} GFLOP/s; ratio {:.2}", own / alone);
    let all: f64 = kernels.iter().map(|(_, k)| k.flops).sum();
    println!("the whole run takes {:.2} times what its {all:.3e} flops would at that rate", report.seconds / (all / alone / 1e9));
    Ok(())
}

/// Seconds that this process has had of all processors, where the system tells.
fn processor_seconds() -> Option<f64> {
    #[cfg(unix)]
    {
        use nix::sys::resource::{UsageWho, getrusage};
        use nix::sys::time::TimeValLike;
        let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
        Some((usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6)
    }
    #[cfg(not(unix))]
    None
}

/// GFLOP/s of the `gemm` crate with all cores on the linears of a block, f32 throughout, best of three.
fn gemm_rate(spec: &ModelSpec) -> f64 {
    let linears = &spec.blocks[0].linears;
    let flops: f64 = linears.iter().map(|l| 2.0 * (TOKENS * l.d_in * l.d_out) as f64).sum();
    let operands: Vec<_> = linears
        .iter()
        .map(|l| (l, vec![0.5f32; TOKENS * l.d_in], vec![0.25f32; l.d_out * l.d_in], vec![0.0f32; TOKENS * l.d_out]))
        .collect();
    let mut best = f64::INFINITY;
    let mut operands = operands;
    for _ in 0..3 {
        let start = Instant::now();
        for (l, a, w, c) in &mut operands {
            product(TOKENS, l.d_out, l.d_in, a, w, c);
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    flops / best / 1e9
}

/// C [n, m] = A [n, k] Wᵀ, W [m, k].
fn product(n: usize, m: usize, k: usize, a: &[f32], w: &[f32], c: &mut [f32]) {
    assert!(a.len() >= n * k && w.len() >= m * k && c.len() >= n * m);
    // SAFETY: the slices hold the matrices, as asserted, and `c` does not alias the others.
    #[allow(unsafe_code, reason = "the gemm crate takes pointers")]
    unsafe {
        gemm::gemm(
            n,
            m,
            k,
            c.as_mut_ptr(),
            1,
            m as isize,
            false,
            a.as_ptr(),
            1,
            k as isize,
            w.as_ptr(),
            k as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}
