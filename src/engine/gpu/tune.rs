//! Tiles that suit an adapter: every candidate of the registry is timed once, and what is picked is kept in the cache.
//!
//! Tiles change the speed of a product and no bit of it: sums over k have one order whatever the tile. A candidate whose result differs from
//! the default's is a driver's mistake and not picked, so runs with and without tuning give the same bytes.

use super::run::GpuEngine;
use crate::Result;
use crate::cache::Cache;
use crate::engine::kernel::{Defined, Kernel};
use crate::engine::kernels::{self, KERNELS};
use crate::engine::kernels::{gram::GramParams, matmul_nn::MatmulNnParams, matmul_nt::MatmulNtParams, matmul_tn::MatmulTnParams};
use crate::engine::recording::Command;
use crate::engine::{Buffer, Elem, Engine, Recording, submit};
use half::f16;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// The name under which the cache keeps the reports.
const FACT: &str = "tiles";

/// Measuring stops after this long; kernels that are left keep their defaults.
const BUDGET: Duration = Duration::from_secs(5);

/// Products are of square matrices: large enough to take this long, so that launches are not what is measured, up to the largest side.
const LONG_ENOUGH: f64 = 2e-3;
const SIDES: [usize; 4] = [256, 512, 1024, 2048];

/// Timed launches of a candidate, of which the median counts; one more comes first and also makes the pipeline.
const ROUNDS: usize = 5;

/// By how much a candidate must be faster than the default.
const GAIN: f64 = 0.03;

/// Values of tuning constants, by name.
pub type Tiles = Vec<(String, u32)>;

/// What became of one kernel and operand type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TuneReport {
    pub kernel: String,
    pub f16_operands: bool,
    /// n, m and k of the product that was timed.
    pub side: usize,
    /// Candidates and seconds of a launch with them, the default first; without those whose result differed from the default's.
    pub candidates: Vec<(Tiles, f64)>,
    pub picked: Tiles,
}

impl GpuEngine {
    /// Times the candidates, uses the picks from now on and keeps them in `cache`. Takes a few seconds, most of them to make pipelines.
    ///
    /// # Errors
    /// `Kind::Device` when a launch fails.
    pub fn tune(&mut self, cache: &Cache) -> Result<Vec<TuneReport>> {
        let start = Instant::now();
        let mut reports = Vec::new();
        for kernel in tunable() {
            for f16_operands in [false, true] {
                if start.elapsed() < BUDGET && (!f16_operands || self.limits().f16_operands) {
                    let report = if f16_operands { tune::<f16>(self, kernel)? } else { tune::<f32>(self, kernel)? };
                    self.set_tiles(kernel.name, f16_operands, report.picked.clone());
                    reports.push(report);
                }
            }
        }
        cache.put(FACT, self.subject(), &reports);
        Ok(reports)
    }

    /// Uses the picks that `cache` has for this adapter and driver. Are there any? Those that the registry does not know are left out.
    pub fn load_tiles(&mut self, cache: &Cache) -> bool {
        let Some(reports) = cache.get::<Vec<TuneReport>>(FACT, self.subject()) else { return false };
        for report in reports {
            if let Some(kernel) = tunable().find(|kernel| kernel.name == report.kernel && allowed(kernel, &report.picked)) {
                self.set_tiles(kernel.name, report.f16_operands, report.picked);
            }
        }
        true
    }
}

fn tunable() -> impl Iterator<Item = &'static Kernel> {
    KERNELS.iter().copied().filter(|kernel| !kernel.base.tuning.is_empty())
}

fn allowed(kernel: &Kernel, tiles: &[(String, u32)]) -> bool {
    let known = |(name, value): &(String, u32)| kernel.base.tuning.iter().any(|t| t.name == name && t.values().any(|v| v == *value));
    tiles.len() == kernel.base.tuning.len() && tiles.iter().all(known)
}

/// Operands of a square product, [side, side] each.
struct Operands<E: Elem> {
    a: Buffer<f32>,
    b: Buffer<E>,
    side: u32,
}

impl<E: Elem> Operands<E> {
    fn new(engine: &mut GpuEngine, side: usize) -> Result<Self> {
        // Any values do that rounding errors depend on.
        let values: Vec<f32> = (0..side * side).map(|i| ((i * 2_654_435_761) % 1021) as f32 / 1021.0 - 0.5).collect();
        let narrow: Vec<E> = values.iter().map(|v| E::from_f32(*v)).collect();
        submit(engine, |rec| Self { a: rec.upload("a", values), b: rec.upload("b", narrow), side: side as u32 })
    }

    fn free(self, engine: &mut GpuEngine) -> Result<()> {
        submit(engine, |rec| {
            rec.free(self.a);
            rec.free(self.b);
        })
    }

    /// Records a launch of `kernel`, if it is one of those with tiles.
    fn launch(&self, rec: &mut Recording<'_>, kernel: &Kernel, c: Buffer<f32>) {
        let (side, a, b) = (self.side, self.a, self.b);
        let [n, m, k, lda, ldw, ldb, ldc] = [side; 7];
        match kernel.name {
            "matmul_nt" => {
                let p = MatmulNtParams { n, m, k, lda, ldw, ldc, batches: 1, alpha: 1.0, ..Default::default() };
                kernels::matmul_nt(rec, p, b, a.as_stored(), Buffer::none(), c);
            }
            "matmul_nn" => kernels::matmul_nn(rec, MatmulNnParams { n, m, k, lda, ldb, ldc, alpha: 1.0, ..Default::default() }, a, b, c),
            "matmul_tn" => {
                let p = MatmulTnParams { n, m, k, lda, ldb, ldc, batches: 1, alpha: 1.0, ..Default::default() };
                kernels::matmul_tn(rec, p, a, b, c);
            }
            "gram" => kernels::gram(rec, GramParams { n_tok: side, d: side, ldx: side, ldg: side, rows: side, ..Default::default() }, b, c),
            other => rec.fail(crate::Error::internal(format!("kernel {other}"), "it has tiles, and no product to time them with")),
        }
    }

    /// The bits of the product, without what the kernel leaves undefined.
    fn result(&self, engine: &mut GpuEngine, kernel: &Kernel) -> Result<Vec<u32>> {
        let side = self.side as usize;
        let mut rec = Recording::new();
        let c = rec.zeros::<f32>("c", side * side);
        self.launch(&mut rec, kernel, c);
        let launched = rec.commands().last();
        let defined = launched.and_then(|c| if let Command::Dispatch(d) = c { Some((kernel.defined)(&d.params)) } else { None });
        let defined = defined.unwrap_or(Defined::All);
        let pending = rec.download(c);
        rec.free(c);
        let c = engine.run(rec)?.take(pending)?;
        Ok((0..side * side).filter(|i| defined.holds(*i)).map(|i| c[i].to_bits()).collect())
    }

    /// The median of the seconds of a launch.
    fn seconds(&self, engine: &mut GpuEngine, kernel: &Kernel) -> Result<f64> {
        let c = submit(engine, |rec| rec.zeros::<f32>("c", (self.side * self.side) as usize))?;
        let mut seconds = Vec::new();
        for _ in 0..=ROUNDS {
            let mut rec = Recording::new();
            self.launch(&mut rec, kernel, c);
            seconds.push(engine.time(rec)?);
        }
        submit(engine, |rec| rec.free(c))?;
        seconds.remove(0);
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[ROUNDS / 2])
    }
}

fn tune<E: Elem>(engine: &mut GpuEngine, kernel: &'static Kernel) -> Result<TuneReport> {
    let f16_operands = E::SCALAR == crate::engine::Scalar::F16;
    let mut candidates = kernel.base.tunings().into_iter().map(|t| t.into_iter().map(|(n, v)| (n.to_owned(), v)).collect::<Tiles>());
    let default = candidates.next().unwrap_or_default();
    engine.set_tiles(kernel.name, f16_operands, default.clone());
    let (operands, seconds) = probe::<E>(engine, kernel)?;
    let wanted = operands.result(engine, kernel)?;
    let mut report = TuneReport {
        kernel: kernel.name.to_owned(),
        f16_operands,
        side: operands.side as usize,
        candidates: vec![(default.clone(), seconds)],
        picked: default,
    };
    let mut best = seconds * (1.0 - GAIN);
    for tiles in candidates {
        engine.set_tiles(kernel.name, f16_operands, tiles.clone());
        let right = operands.result(engine, kernel).map(|bits| bits == wanted);
        let seconds = match right.and_then(|right| if right { operands.seconds(engine, kernel).map(Some) } else { Ok(None) }) {
            Ok(Some(seconds)) => seconds,
            Ok(None) => {
                tracing::warn!("{} with {tiles:?} computes something else on {}; not used", kernel.name, engine.describe());
                continue;
            }
            // The driver does not take it: the default does the same.
            Err(error) if !engine.is_lost() => {
                tracing::warn!("{error}; {} is not used with {tiles:?}", kernel.name);
                continue;
            }
            Err(error) => return Err(error),
        };
        if seconds < best {
            best = seconds;
            report.picked.clone_from(&tiles);
        }
        report.candidates.push((tiles, seconds));
    }
    operands.free(engine)?;
    Ok(report)
}

/// Operands large enough, and the seconds of a launch with them.
fn probe<E: Elem>(engine: &mut GpuEngine, kernel: &Kernel) -> Result<(Operands<E>, f64)> {
    let [first, larger @ ..] = SIDES;
    let mut operands = Operands::new(engine, first)?;
    let mut seconds = operands.seconds(engine, kernel)?;
    for side in larger {
        if seconds >= LONG_ENOUGH {
            break;
        }
        operands.free(engine)?;
        operands = Operands::new(engine, side)?;
        seconds = operands.seconds(engine, kernel)?;
    }
    Ok((operands, seconds))
}
