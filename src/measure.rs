//! Measures an engine: copies and multiply-adds by themselves, and every kernel at what it is for, in runs over one block of a model with
//! random weights, once narrow and once wide, so that there is a time per launch and a rate (see `engine::rates`).
//!
//! Cost: a few seconds. What comes out is kept in the user's cache, by device and driver.

use crate::cache::Cache;
use crate::engine::checked::{Checked, Differences};
use crate::engine::kernels::{self, multiply_add::MultiplyAddParams};
use crate::engine::profile::KernelProfile;
use crate::engine::rates::Rate;
use crate::engine::{self, DeviceChoice, Engine, Profile, Rates, Recording};
use crate::method::{self, Method};
use crate::metric::Metric;
use crate::model::Synthetic;
use crate::pipeline::{self, Progress, Quiet};
use crate::plan::{EvalRequest, Plan, Request, TextSource};
use crate::quant::Scheme;
use crate::round::factor::{Factor, Precision, factor_with};
use crate::round::{AdaRound, Descent, Rounding};
use crate::{Error, Result, export, interrupt};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

/// What [`Cache`] calls it.
const FACT: &str = "rates";

/// Share of a kernel's values that may differ from the native engine's: ties that break otherwise change the rest of their rows.
const MAX_DIFFERENCE: f64 = 0.02;

/// Kernels, or kinds of work on the host, and what they did.
type Works = BTreeMap<&'static str, KernelProfile>;

/// All that was found out about a device.
#[derive(Debug, Serialize)]
pub struct Measurement {
    pub device: String,
    pub rates: Rates,
    /// Of the wide runs, or of the narrow ones where those are the only ones.
    pub kernels: Works,
    pub host: Works,
    /// Of each kernel, the share of values that differ from the native engine's; nothing where that is what was measured.
    pub differences: BTreeMap<&'static str, f64>,
}

/// The rates of `engine` from the cache; `None` where it was never measured.
pub fn known(engine: &dyn Engine, cache: &Cache) -> Option<Rates> {
    cache.get(FACT, &engine.fingerprint())
}

/// Measures what `choice` opens, checks its results, and keeps its rates.
///
/// # Errors
/// Device, if a kernel is wrong; what runs say; Output, if there is no room for temporary files.
pub fn measure(choice: &DeviceChoice, cache: &Cache, progress: &mut dyn Progress) -> Result<Measurement> {
    let mut engine = engine::open(choice)?;
    let mut rates = transfers(engine.as_mut())?;
    rates.multiply_add = multiply_adds(engine.as_mut())?;
    let factors = factors()?;
    let (device, fingerprint, native) = (engine.describe(), engine.fingerprint(), engine.is_native());
    drop(engine);
    let folder = tempfile::tempdir().map_err(|e| Error::output("temporary folder", "cannot be made").caused_by(e))?;
    let narrow = Workload::of(256, 768, 128);
    let wide = match rates.multiply_add {
        rate if rate < 5e12 => Workload::of(512, 1536, 512),
        _ => Workload::of(1024, 3072, 1024),
    };
    let steps = if native { 2 } else { 3 };
    progress.stage("measure", steps);
    let mut differences = BTreeMap::new();
    if !native {
        differences = narrow.check(folder.path(), choice)?;
        if let Some((name, share)) = differences.iter().find(|(_, share)| **share > MAX_DIFFERENCE) {
            let message = format!("{:.1} % of what it writes on {device} is wrong; update the driver, or use --device cpu", 100.0 * share);
            return Err(Error::device(format!("kernel {name}"), message));
        }
        progress.step(1, "checked");
    }
    let less = narrow.profile(folder.path(), choice, RUNS)?;
    progress.step(steps - 1, "wide");
    let more = wide.profile(folder.path(), choice, USUAL_RUNS)?;
    let (kernels, of_kernels) = lines(&less.kernels, &more.kernels);
    let (host, of_host) = lines(&less.host, &more.host);
    (rates.kernels, rates.host) = (of_kernels, of_host);
    rates.host.extend(factors);
    cache.put(FACT, &fingerprint, &rates);
    Ok(Measurement { device, rates, kernels, host, differences })
}

/// Rates out of a narrow and a wide run, and what they are from: the wide one, where it has the kernel.
fn lines(less: &Works, more: &Works) -> (Works, BTreeMap<String, Rate>) {
    let all: Works = less.iter().chain(more).map(|(name, k)| (*name, *k)).collect();
    let rate = |(name, k): (&&'static str, &KernelProfile)| {
        let less = more.contains_key(name).then(|| less.get(name)).flatten();
        ((*name).to_owned(), Rate::of_runs(less, k))
    };
    let rates = all.iter().map(rate).collect();
    (all, rates)
}

/// Bytes that transfers are measured with.
const BYTES: usize = 64 << 20;
/// Times that they are repeated.
const REPEATS: usize = 4;

/// Seconds until all of a recording is done, once its buffers have been used.
fn seconds(engine: &mut dyn Engine, record: impl Fn(&mut Recording<'_>)) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let mut rec = Recording::new();
        record(&mut rec);
        // What is downloaded is waited for.
        let last = rec.zeros::<f32>("last", 16);
        let pending = rec.download(last);
        rec.free(last);
        let start = Instant::now();
        engine.run(rec)?.take(pending)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Copies, uploads, downloads and allocations, bytes per second.
fn transfers(engine: &mut dyn Engine) -> Result<Rates> {
    let len = BYTES / size_of::<f32>();
    let mut rec = Recording::new();
    let (a, b) = (rec.zeros::<f32>("from", len), rec.zeros::<f32>("to", len));
    engine.run(rec)?;
    let data = vec![0.0f32; len];
    let bytes = (REPEATS * BYTES) as f64;
    let copy = 2.0 * bytes / seconds(engine, |rec| (0..REPEATS).for_each(|_| rec.copy(a, b)))?;
    // With their first use, which is when the system finds memory for them.
    let used = seconds(engine, |rec| {
        (0..REPEATS).for_each(|_| {
            let new = rec.alloc::<f32>("new", len);
            rec.copy(a, new);
            rec.free(new);
        });
    })?;
    let allocate = bytes / (used - 2.0 * bytes / copy).max(0.05 * used);
    let mut best = [f64::INFINITY; 2];
    for _ in 0..REPEATS {
        let start = Instant::now();
        let mut rec = Recording::new();
        let there = rec.upload("there", data.as_slice());
        let small = rec.zeros::<f32>("small", 16);
        let pending = rec.download(small);
        rec.free(small);
        engine.run(rec)?.take(pending)?;
        best[0] = best[0].min(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let mut rec = Recording::new();
        let pending = rec.download(there);
        rec.free(there);
        engine.run(rec)?.take(pending)?;
        best[1] = best[1].min(start.elapsed().as_secs_f64());
    }
    let mut rec = Recording::new();
    rec.free(a);
    rec.free(b);
    engine.run(rec)?;
    // The buffer that is uploaded to is new, which is counted by itself.
    let upload = (best[0] - BYTES as f64 / allocate).max(0.25 * best[0]);
    Ok(Rates { copy, allocate, upload: BYTES as f64 / upload, download: BYTES as f64 / best[1], ..Rates::default() })
}

/// Multiply-adds in registers, two operations each, per second.
fn multiply_adds(engine: &mut dyn Engine) -> Result<f64> {
    /// Long enough for clocks to rise and for one launch not to matter.
    const ENOUGH: f64 = 0.05;
    let n = 1u32 << 20;
    let mut rec = Recording::new();
    let x = rec.zeros::<f32>("x", n as usize);
    engine.run(rec)?;
    let mut p = MultiplyAddParams { n, steps: 64, a: 0.5, b: 1.0 };
    let rate = loop {
        let taken = seconds(engine, |rec| kernels::multiply_add(rec, p, x))?;
        if taken > ENOUGH || p.steps > 1 << 20 {
            break 2.0 * f64::from(p.n) * f64::from(p.steps) / taken;
        }
        p.steps *= 2;
    };
    let mut rec = Recording::new();
    rec.free(x);
    engine.run(rec)?;
    Ok(rate)
}

/// Of factorisations of wide matrices, in both precisions: no run here is wide enough, and rates grow with the width.
fn factors() -> Result<BTreeMap<String, Rate>> {
    const WIDTH: usize = 2048;
    let mut h = vec![0.0f32; WIDTH * WIDTH];
    (0..WIDTH).for_each(|i| h[i * (WIDTH + 1)] = 1.0);
    let rate = |precision: Precision| {
        let start = Instant::now();
        factor_with(precision, (0..WIDTH as u32).collect(), &h, WIDTH, 0.1)?;
        Ok((precision.what().to_owned(), Rate { launch: 0.0, per_second: Factor::flops(WIDTH) / start.elapsed().as_secs_f64() }))
    };
    [Precision::F32, Precision::F64].into_iter().map(rate).collect()
}

/// What makes the method of one run, and its formats.
type Made = (fn() -> Result<Method>, &'static [&'static str]);
/// What prepares an engine.
type With<'w> = dyn FnMut(Box<dyn Engine>) -> Box<dyn Engine> + 'w;

/// They use all kernels between them, but for those that no family or format needs yet.
const RUNS: &[Made] =
    &[(gptq, &["compressed-tensors"]), (aespa, &["compressed-tensors", "gguf-q4_k_m", "mlx"]), (published, &["compressed-tensors"])];
/// What most runs do.
const USUAL_RUNS: &[Made] = &[(gptq, &["compressed-tensors"]), (aespa, &["compressed-tensors"])];

fn gptq() -> Result<Method> {
    method::find("gptq")
}

fn aespa() -> Result<Method> {
    method::find("aespa")
}

/// The published method with few steps of each of its parts, and its newer ones.
fn published() -> Result<Method> {
    let published = method::find("aespa-2024")?;
    let adaround = Some(AdaRound { iterations: 4, ..AdaRound::PUBLISHED });
    let rounding = Rounding { adaround, descent: Some(Descent { sweeps: 2, ..Descent::DEFAULT }), ..published.rounding };
    Ok(Method { metric: Metric::Probe, rounding, ..published })
}

/// A block, and how many tokens go through it.
struct Workload {
    model: Synthetic,
    length: usize,
}

impl Workload {
    const SAMPLES: usize = 4;

    fn of(d_model: usize, d_ff: usize, length: usize) -> Self {
        let n_head = d_model / 64;
        let model = Synthetic { d_model, d_ff, n_head, n_kv: n_head / 4, d_head: 64, n_vocab: 2048, tied: true, blocks: 1 };
        Self { model, length }
    }

    /// Runs everything on engines that `with` prepares and adds up what they did.
    fn run(&self, folder: &Path, choice: &DeviceChoice, runs: &[Made], with: &mut With<'_>) -> Result<Profile> {
        let model = folder.join(format!("{}", self.model.d_model));
        self.model.write(&model)?;
        let mut all = Profile::default();
        for (method, formats) in runs {
            let request = Request {
                overwrite: true,
                samples: Some(Self::SAMPLES),
                sequence_length: Some(self.length),
                device: choice.clone(),
                restart: true,
                journal_seconds: f64::INFINITY,
                eval: Some(EvalRequest { text: TextSource::BuiltInHeldout, window: Some(self.length), windows: Some(2) }),
                ..Request::new(
                    model.clone(),
                    folder.join("out"),
                    method()?,
                    Scheme::new(4, 128, false)?,
                    formats.iter().map(|name| export::find(name)).collect::<Result<_>>()?,
                )
            };
            // These runs are nobody's, so they say nothing.
            let reports = tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::new(), || {
                let mut plan = Plan::new(request)?;
                plan.engine = with(plan.engine);
                pipeline::run(plan, &mut Quiet)
            });
            // Nobody can go on with them either.
            let reports = reports.or_else(|error| interrupt::check().and(Err(error)))?;
            // Reports of one run share its engine; the last one knows all that it did.
            reports.last().into_iter().for_each(|report| all.add(&report.kernels));
            let _ = std::fs::remove_dir_all(folder.join("out"));
        }
        Ok(all)
    }

    fn profile(&self, folder: &Path, choice: &DeviceChoice, runs: &[Made]) -> Result<Profile> {
        self.run(folder, choice, runs, &mut |mut engine| {
            engine.time_kernels();
            engine
        })
    }

    /// The shares of values that differ from the native engine's.
    fn check(&self, folder: &Path, choice: &DeviceChoice) -> Result<BTreeMap<&'static str, f64>> {
        let mut all: Vec<Differences> = Vec::new();
        self.run(folder, choice, RUNS, &mut |engine| {
            let (engine, differences) = Checked::new(engine);
            all.push(differences);
            Box::new(engine)
        })?;
        let mut most = BTreeMap::new();
        for (name, share) in all.iter().flat_map(|differences| differences.borrow().clone()) {
            let entry: &mut f64 = most.entry(name).or_default();
            *entry = entry.max(share);
        }
        Ok(most)
    }
}
