//! The scheduler of a quantization run: walks the blocks, hands statistics to the solver, results to the writer, and outputs of the
//! quantized block to the next one (`block`); then reads everything back and judges it.

mod block;
mod outer;
mod outputs;

use crate::calib::{DeviceBlock, Forward, HiddenStates, Statistic, Streaming};
use crate::engine::{Elem, Engine, Weight, submit};
use crate::eval::{Evaluation, evaluate};
use crate::export;
use crate::method::{self, Damping, damping_of};
use crate::model::{Checkpoint, Weights};
use crate::plan::{Calibration, Operands, Plan, hashed_files};
use crate::quant::Lattice;
use crate::report::{self, FoldReport, MemoryReport, ModelReport, PerplexityReport, Report, Stopwatch};
use crate::{Error, Result, interrupt};
use block::{BlockRun, Streams};
use half::f16;
use outputs::{Output, Outputs};
use std::time::Instant;

/// Where a run tells how far it is.
pub trait Progress {
    /// A new stage of `steps` steps begins; the last one is over.
    fn stage(&mut self, name: &'static str, steps: usize);
    /// `done` steps of the stage are over; `doing` is what comes now.
    fn step(&mut self, done: usize, doing: &str);
}

/// Quantizes, writes, re-reads, evaluates, and publishes the folders, one for each format, with their reports.
///
/// # Errors
/// Whatever goes wrong on the way, with its subject; nothing is left at the output paths then.
pub fn run(plan: Plan, progress: &mut dyn Progress) -> Result<Vec<Report>> {
    match plan.request.operands {
        Operands::F32 => run_with::<f32>(plan, progress),
        Operands::F16 => run_with::<f16>(plan, progress),
    }
}

fn run_with<E: Elem>(plan: Plan, progress: &mut dyn Progress) -> Result<Vec<Report>> {
    let start = Instant::now();
    let Plan { request, settings, streaming, checkpoint, calibration, eval, mut engine, writers, parent } = plan;
    // Lives as long as the writers, which are inside of it.
    let _parent = parent;
    let engine = engine.as_mut();
    // Hashing reads the whole model once; beside the work it costs nothing.
    let files = hashed_files(&checkpoint);
    let hashes = std::thread::spawn(move || report::hash_files(&files));

    let mut watch = Stopwatch::start();
    let judge = |engine: &mut dyn Engine, weights: &dyn Weights, stage: &'static str, progress: &mut dyn Progress| {
        eval.as_ref().map(|text| judge::<E>(engine, weights, &text.windows(), &streaming, stage, progress)).transpose()
    };
    let before = judge(engine, &checkpoint, "perplexity before", progress)?;
    if before.is_some() {
        watch.lap("evaluate before");
    }
    progress.stage("quantize", checkpoint.spec().blocks.len());
    let mut outputs = Outputs::new(writers);
    let mut run = Run { engine, settings, streaming: streaming.clone(), watch, folds: Vec::new() };
    run.blocks::<E>(&checkpoint, calibration.as_ref(), &mut outputs, progress)?;
    let Run { engine, mut watch, folds, .. } = run;

    let files = hashes.join().map_err(|_| Error::internal("hashes", "the thread that makes them broke down"))??;
    let mut done = Vec::new();
    for Output { writer, layers } in outputs {
        progress.stage("write and verify", 2);
        let (format, scheme, bits_per_weight) = (writer.format(), writer.scheme(), writer.bits_per_weight());
        let staged = writer.complete(&checkpoint)?;
        watch.lap("write");
        interrupt::check()?;
        progress.step(1, "reading back");
        staged.verify()?;
        watch.lap("verify");
        let after = judge(engine, export::open(staged.path())?.as_ref(), "perplexity after", progress)?;
        if after.is_some() {
            watch.lap("evaluate after");
        }
        let perplexity = match (&eval, &before, after) {
            (Some(text), Some(before), Some(after)) => {
                Some(PerplexityReport { text: text.name.clone(), sha256: text.sha256.clone(), before: before.clone(), after })
            }
            _ => None,
        };
        let report = Report {
            program: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
            settings: report::Settings::new(&request, &settings, format, scheme, calibration.as_ref()),
            model: ModelReport::new(&checkpoint, files.clone()),
            device: engine.describe(),
            bits_per_weight,
            perplexity,
            layers,
            folds: folds.clone(),
            stages: watch.stages(),
            seconds: start.elapsed().as_secs_f64(),
            memory: MemoryReport { peak_resident_bytes: report::peak_resident(), peak_device_bytes: engine.profile().peak_bytes },
            kernels: engine.profile().clone(),
        };
        done.push((staged, report));
    }
    // All or none, as far as renames go.
    for (staged, report) in &done {
        let json = serde_json::to_vec_pretty(report).map_err(|e| Error::internal("report", "cannot be written as JSON").caused_by(e))?;
        staged.add(report::FILE_NAME, &json)?;
    }
    done.into_iter().map(|(staged, report)| staged.publish(&[]).map(|()| report)).collect()
}

fn judge<E: Elem>(
    engine: &mut dyn Engine,
    weights: &dyn Weights,
    windows: &[&[u32]],
    streaming: &Streaming,
    stage: &'static str,
    progress: &mut dyn Progress,
) -> Result<Evaluation> {
    progress.stage(stage, weights.spec().blocks.len() + 1);
    evaluate::<E>(engine, weights, None, windows, &streaming.named("evaluation"), &mut |done, _| {
        progress.step(done, "");
        interrupt::check()
    })
}

/// The state of a walk over the blocks.
struct Run<'e> {
    engine: &'e mut dyn Engine,
    settings: method::Settings,
    streaming: Streaming,
    watch: Stopwatch,
    folds: Vec<FoldReport>,
}

/// λ where there is too little text for a split-half test.
const UNTESTED_DAMPING: f64 = 0.3;

impl Run<'_> {
    /// The settings with a damping for the linears that read one input.
    fn damped(
        &mut self,
        mut settings: method::Settings,
        statistic: Option<&Statistic>,
        weights: &[(&Weight, Lattice)],
    ) -> Result<method::Settings> {
        if let (Damping::SplitHalf, Some(statistic)) = (settings.method.damping, statistic) {
            let damping = damping_of(self.engine, &settings, statistic, weights)?;
            settings.method.damping = Damping::Fixed(damping.unwrap_or(UNTESTED_DAMPING));
            self.watch.lap("damping");
        }
        Ok(settings)
    }

    /// The embeddings of the calibration windows, of the quantized table `quantized` where there is one.
    fn streams(&mut self, checkpoint: &Checkpoint, quantized: Option<&Weight>, windows: &[Vec<u32>]) -> Result<Streams> {
        let (spec, how) = (checkpoint.spec(), self.streaming.named("quantized"));
        let quantized = match quantized {
            Some(table) => HiddenStates::look_up(self.engine, spec, table, windows, &how)?,
            None => HiddenStates::embed(self.engine, checkpoint, windows, &how)?,
        };
        let float = match self.settings.method.inputs.two_streams() {
            true => Some(HiddenStates::embed(self.engine, checkpoint, windows, &self.streaming.named("float"))?),
            false => None,
        };
        Ok(Streams { quantized, float })
    }

    fn blocks<E: Elem>(
        &mut self,
        checkpoint: &Checkpoint,
        calibration: Option<&Calibration>,
        outputs: &mut Outputs,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let spec = checkpoint.spec();
        let limits = self.engine.limits();
        let forward = match calibration {
            Some(calibration) => {
                let seq_len = calibration.windows.first().map_or(0, Vec::len);
                Some(submit(self.engine, |rec| Forward::<E>::new(rec, spec, seq_len, limits))?)
            }
            None => None,
        };
        let table = self.embedding(checkpoint, calibration, forward.as_ref(), outputs, progress)?;
        let mut stream = match (calibration, forward) {
            (Some(calibration), Some(forward)) => {
                Some((self.streams(checkpoint, table.as_ref(), &calibration.windows)?, forward))
            }
            _ => None,
        };
        if let Some(table) = table {
            submit(self.engine, |rec| table.free(rec))?;
        }
        for block in &spec.blocks {
            interrupt::check()?;
            let device = DeviceBlock::load(self.engine, checkpoint, block)?;
            if let Some(next) = spec.blocks.get(block.index + 1) {
                checkpoint.prefetch(next);
            }
            self.watch.lap("read weights");
            let run = BlockRun { run: self, block, checkpoint, device, outputs, progress };
            match &mut stream {
                Some((streams, forward)) => run.calibrated(streams, forward)?,
                None => run.uncalibrated()?,
            }
            progress.step(block.index + 1, "");
        }
        self.head(checkpoint, stream.as_ref().map(|(streams, forward)| (&streams.quantized, forward)), outputs)?;
        if let Some((_, forward)) = stream {
            submit(self.engine, |rec| forward.free(rec))?;
        }
        Ok(())
    }
}
