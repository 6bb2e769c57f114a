//! The scheduler of a quantization run: walks the blocks, hands statistics to the solver, results to the writer, and outputs of the
//! quantized block to the next one (`block`); then reads everything back and judges it.

mod block;
mod choices;
mod devices;
mod fit;
mod footprint;
mod ledger;
mod outer;
mod outputs;
mod resume;
mod scribe;

use crate::calib::{DeviceBlock, Forward, HiddenStates, Statistic, Streaming};
use crate::engine::{Elem, Engine, Weight, submit};
use crate::eval::{Evaluation, evaluate};
use crate::export;
use crate::interrupt::{self, Leaving};
use crate::journal::Journal;
use crate::method::{self, Damping, damping_of};
use crate::model::{Checkpoint, Weights};
use crate::plan::{Calibration, Operands, Plan, hashed_files};
use crate::quant::Lattice;
use crate::report::{self, FoldReport, MemoryReport, ModelReport, PerplexityReport, Report, Stopwatch};
use crate::{Error, Kind, Result, memory};
pub use fit::{fit, footprint};
pub use footprint::{Footprint, Needs, OutputSize};
use ledger::Ledger;

use block::{BlockRun, Streams};
use devices::Devices;
use half::f16;
use outputs::Outputs;
use resume::Record;
use std::time::Instant;

/// Where a run tells how far it is.
pub trait Progress {
    /// A new stage of `steps` steps begins; the last one is over.
    fn stage(&mut self, name: &'static str, steps: usize);
    /// `done` steps of the stage are over; `doing` is what comes now.
    fn step(&mut self, done: usize, doing: &str);
}

/// Tells nobody.
pub struct Quiet;

impl Progress for Quiet {
    fn stage(&mut self, _: &'static str, _: usize) {}
    fn step(&mut self, _: usize, _: &str) {}
}

/// Quantizes, writes, re-reads, evaluates, and publishes the folders, one for each format, with their reports.
///
/// # Errors
/// Whatever goes wrong on the way, with its subject; nothing is left at the output paths then.
pub fn run(mut plan: Plan, progress: &mut dyn Progress) -> Result<Vec<Report>> {
    // Lives as long as the journal and what is written, which are inside of it.
    let _parent = plan.parent.take();
    let planned = memory::is_counted().then(|| footprint(&plan, None)).transpose();
    let mut journal = plan.journal.take().ok_or_else(|| Error::internal("plan", "has no journal"))?;
    let blocks = plan.checkpoint.spec().blocks.len();
    resume::prepare_to_leave(&journal, blocks);
    let result = planned.and_then(|planned| match plan.request.operands {
        Operands::F32 => run_with::<f32>(plan, planned, &mut journal, progress),
        Operands::F16 => run_with::<f16>(plan, planned, &mut journal, progress),
    });
    interrupt::leave(Leaving::default());
    match result {
        Ok(reports) => {
            journal.finish();
            Ok(reports)
        }
        Err(error) => Err(error.with_end(&resume::prospect(&journal, blocks))),
    }
}

/// Reads every weight once: a NaN in the last block shows now and not after hours. One pass over the files, at the disk's speed.
fn check_weights(checkpoint: &Checkpoint, progress: &mut dyn Progress) -> Result<()> {
    let tensors = checkpoint.spec().tensors();
    progress.stage("check weights", tensors.len());
    for (done, tensor) in tensors.iter().enumerate() {
        interrupt::check()?;
        progress.step(done, &tensor.name);
        checkpoint.tensor(&tensor.name)?;
        checkpoint.release();
    }
    Ok(())
}

fn run_with<E: Elem>(plan: Plan, planned: Option<Footprint>, journal: &mut Journal, progress: &mut dyn Progress) -> Result<Vec<Report>> {
    let start = Instant::now();
    if let Some(planned) = &planned {
        tracing::info!("planned: {planned}");
    }
    let mut watch = Stopwatch::start();
    check_weights(&plan.checkpoint, progress)?;
    watch.lap("check weights");
    let Plan { request, settings, streaming, checkpoint, calibration, eval, mut engine, open, writers, .. } = plan;
    // Hashing reads the whole model once; beside the work it costs nothing.
    let files = hashed_files(&checkpoint);
    let hashes = std::thread::spawn(move || report::hash_files(&files));

    let judge = |engine: &mut dyn Engine, weights: &dyn Weights, stage: &'static str, progress: &mut dyn Progress| {
        eval.as_ref().map(|text| judge::<E>(engine, weights, &text.windows(), &streaming, stage, progress)).transpose()
    };
    let mut before = resume::evaluated(journal);
    if before.is_none() {
        before = judge(engine.as_mut(), &checkpoint, "perplexity before", progress)?;
        if let Some(before) = &before {
            watch.lap("evaluate before");
            resume::record_evaluation(journal, before)?;
        }
    }
    progress.stage("quantize", checkpoint.spec().blocks.len());
    let mut outputs = Outputs::new(checkpoint.spec(), writers);
    let (mut folds, mut record) = (Vec::new(), Record::new(journal, request.journal_seconds));
    let mut devices = Devices::new(open, &request.device, request.fallback_cpu);
    loop {
        let mut run = Run { engine: engine.as_mut(), settings, streaming: streaming.clone(), watch, folds, ledger: None };
        let result = run.blocks::<E>(&checkpoint, calibration.as_ref(), &mut outputs, &mut record, devices.lost(), progress);
        Run { watch, folds, .. } = run;
        match result {
            Ok(()) => break,
            // The blocks since the last record are done again.
            Err(error) if error.kind == Kind::Device => devices.replace(&mut engine, error, record.steps())?,
            Err(error) => return Err(error),
        }
    }

    let files = hashes.join().map_err(|_| Error::internal("hashes", "the thread that makes them broke down"))??;
    let mut done = Vec::new();
    for (writer, layers) in outputs.into_writers()? {
        progress.stage("write and verify", 2);
        let (format, scheme, bits_per_weight) = (writer.format(), writer.scheme(), writer.bits_per_weight());
        let staged = writer.complete(&checkpoint)?;
        watch.lap("write");
        interrupt::check()?;
        progress.step(1, "reading back");
        staged.verify()?;
        watch.lap("verify");
        let after = judge(engine.as_mut(), export::open(staged.path())?.as_ref(), "perplexity after", progress)?;
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
            memory: MemoryReport {
                peak_resident_bytes: report::peak_resident(),
                peak_device_bytes: engine.profile().peak_bytes,
                planned_resident_bytes: planned.as_ref().map(|planned| planned.needs.ram_bytes),
                planned_device_bytes: planned.as_ref().map(|planned| planned.needs.device_bytes),
            },
            streaming: streaming.clone(),
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
    /// Where an estimate notes what work the stages are.
    ledger: Option<Ledger>,
}

/// λ where there is too little text for a split-half test.
const UNTESTED_DAMPING: f64 = 0.3;

impl Run<'_> {
    /// Books the time since the last call on the stage `name`, and returns it.
    fn lap(&mut self, name: &'static str) -> f64 {
        if let Some(ledger) = &mut self.ledger {
            ledger.lap(name, self.engine.profile());
        }
        self.watch.lap(name)
    }

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
            self.lap("damping");
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

    /// Walks over the blocks that are not done yet; `again`: since the last record everything is to be done again.
    fn blocks<E: Elem>(
        &mut self,
        checkpoint: &Checkpoint,
        calibration: Option<&Calibration>,
        outputs: &mut Outputs,
        record: &mut Record<'_>,
        again: bool,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let (mut reached, mut streams) = match again {
            true => self.go_back(record, checkpoint, calibration, outputs)?,
            false => self.resume(record, checkpoint, calibration, outputs, progress)?,
        };
        let spec = checkpoint.spec();
        let limits = self.engine.limits();
        let forward = match calibration {
            Some(calibration) => {
                let seq_len = calibration.windows.first().map_or(0, Vec::len);
                Some(submit(self.engine, |rec| Forward::<E>::new(rec, spec, seq_len, limits))?)
            }
            None => None,
        };
        if !reached.embedding {
            let table = self.embedding(checkpoint, calibration, forward.as_ref(), outputs, progress)?;
            if let Some(calibration) = calibration {
                streams = Some(self.streams(checkpoint, table.as_ref(), &calibration.windows)?);
            }
            if let Some(table) = table {
                submit(self.engine, |rec| table.free(rec))?;
            }
            reached.embedding = true;
            self.record(record, checkpoint, reached, outputs, streams.as_mut())?;
        }
        for block in &spec.blocks[reached.blocks..] {
            interrupt::check()?;
            let device = DeviceBlock::load_as(self.engine, checkpoint, block, self.streaming.weights)?;
            if let Some(next) = spec.blocks.get(block.index + 1) {
                checkpoint.prefetch(next);
            }
            self.lap("read weights");
            let run = BlockRun { run: self, block, checkpoint, device, outputs, progress };
            match (&mut streams, &forward) {
                (Some(streams), Some(forward)) => run.calibrated(streams, forward)?,
                _ => run.uncalibrated()?,
            }
            reached.blocks = block.index + 1;
            progress.step(reached.blocks, "");
            self.record(record, checkpoint, reached, outputs, streams.as_mut())?;
        }
        // The head reads the quantized stream alone.
        if let Some(float) = streams.as_mut().and_then(|streams| streams.float.take()) {
            submit(self.engine, |rec| float.free(rec))?;
        }
        if !reached.head {
            self.head(checkpoint, streams.as_ref().map(|s| &s.quantized).zip(forward.as_ref()), outputs)?;
            reached.head = true;
            self.record(record, checkpoint, reached, outputs, None)?;
        }
        submit(self.engine, |rec| {
            if let Some(streams) = streams {
                streams.free(rec);
            }
            if let Some(forward) = forward {
                forward.free(rec);
            }
        })
    }
}
