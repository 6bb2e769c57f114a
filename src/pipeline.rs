//! The scheduler of a quantization run: walks the blocks, hands statistics to the solver, results to the writer, and outputs of the
//! quantized block to the next one; then reads everything back and judges it.

use crate::calib::{DeviceBlock, Forward, Gram, HiddenStates, HostBlock};
use crate::engine::{Elem, Engine, submit};
use crate::eval::{Evaluation, evaluate};
use crate::export::{self, Writer};
use crate::method::{self, Solver};
use crate::model::{Block, Checkpoint, Input, Weights};
use crate::plan::{Calibration, Operands, Plan, hashed_files};
use crate::report::{self, LayerReport, MemoryReport, ModelReport, PerplexityReport, Report, Stopwatch};
use crate::{Error, Result, interrupt};
use half::f16;
use std::time::Instant;

/// Where a run tells how far it is.
pub trait Progress {
    /// A new stage of `steps` steps begins; the last one is over.
    fn stage(&mut self, name: &'static str, steps: usize);
    /// `done` steps of the stage are over; `doing` is what comes now.
    fn step(&mut self, done: usize, doing: &str);
}

/// Quantizes, writes, re-reads, evaluates, and publishes the folder with its report.
///
/// # Errors
/// Whatever goes wrong on the way, with its subject; nothing is left at the output path then.
pub fn run(plan: Plan, progress: &mut dyn Progress) -> Result<Report> {
    match plan.request.operands {
        Operands::F32 => run_with::<f32>(plan, progress),
        Operands::F16 => run_with::<f16>(plan, progress),
    }
}

fn run_with<E: Elem>(plan: Plan, progress: &mut dyn Progress) -> Result<Report> {
    let start = Instant::now();
    let Plan { request, settings, checkpoint, calibration, eval, mut engine, mut writer } = plan;
    let engine = engine.as_mut();
    // Hashing reads the whole model once; beside the work it costs nothing.
    let files = hashed_files(&checkpoint);
    let hashes = std::thread::spawn(move || report::hash_files(&files));

    let mut watch = Stopwatch::start();
    let judge = |engine: &mut dyn Engine, weights: &dyn Weights, stage: &'static str, progress: &mut dyn Progress| {
        eval.as_ref().map(|text| judge::<E>(engine, weights, &text.windows(), stage, progress)).transpose()
    };
    let before = judge(engine, &checkpoint, "perplexity before", progress)?;
    if before.is_some() {
        watch.lap("evaluate before");
    }
    progress.stage("quantize", checkpoint.spec().blocks.len());
    let mut run = Run::<E> { engine, settings, watch, layers: Vec::new(), marker: std::marker::PhantomData };
    run.blocks(&checkpoint, calibration.as_ref(), &mut writer, progress)?;
    let Run { engine, mut watch, layers, .. } = run;

    progress.stage("write and verify", 2);
    let staged = writer.complete(&checkpoint)?;
    watch.lap("write");
    interrupt::check()?;
    progress.step(1, "reading back");
    staged.verify(&checkpoint)?;
    watch.lap("verify");
    let after = judge(engine, export::open(staged.path())?.as_ref(), "perplexity after", progress)?;
    if after.is_some() {
        watch.lap("evaluate after");
    }
    let perplexity = match (&eval, before, after) {
        (Some(text), Some(before), Some(after)) => {
            Some(PerplexityReport { text: text.name.clone(), sha256: text.sha256.clone(), before, after })
        }
        _ => None,
    };
    let files = hashes.join().map_err(|_| Error::internal("hashes", "the thread that makes them broke down"))??;
    let report = Report {
        program: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        settings: report::Settings::new(&request, &settings, calibration.as_ref()),
        model: ModelReport::new(&checkpoint, files),
        device: engine.describe(),
        bits_per_weight: report::bits_per_weight(checkpoint.spec(), settings.scheme),
        perplexity,
        layers,
        stages: watch.stages(),
        seconds: start.elapsed().as_secs_f64(),
        memory: MemoryReport { peak_resident_bytes: report::peak_resident(), peak_device_bytes: engine.profile().peak_bytes },
        kernels: engine.profile().clone(),
    };
    let json = serde_json::to_vec_pretty(&report).map_err(|e| Error::internal("report", "cannot be written as JSON").caused_by(e))?;
    staged.publish(&[(report::FILE_NAME, &json)])?;
    Ok(report)
}

fn judge<E: Elem>(
    engine: &mut dyn Engine,
    weights: &dyn Weights,
    windows: &[&[u32]],
    stage: &'static str,
    progress: &mut dyn Progress,
) -> Result<Evaluation> {
    progress.stage(stage, weights.spec().blocks.len() + 1);
    evaluate::<E>(engine, weights, None, windows, &mut |done, _| {
        progress.step(done, "");
        interrupt::check()
    })
}

/// The state of a walk over the blocks.
struct Run<'e, E> {
    engine: &'e mut dyn Engine,
    settings: method::Settings,
    watch: Stopwatch,
    layers: Vec<LayerReport>,
    marker: std::marker::PhantomData<E>,
}

impl<E: Elem> Run<'_, E> {
    fn blocks(
        &mut self,
        checkpoint: &Checkpoint,
        calibration: Option<&Calibration>,
        writer: &mut Writer,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let spec = checkpoint.spec();
        let limits = self.engine.limits();
        let mut stream = match calibration {
            Some(calibration) => {
                let hidden = HiddenStates::embed(self.engine, checkpoint, &calibration.windows)?;
                let seq_len = calibration.windows.first().map_or(0, Vec::len);
                let forward = submit(self.engine, |rec| Forward::<E>::new(rec, spec, seq_len, limits))?;
                Some((hidden, forward))
            }
            None => None,
        };
        for block in &spec.blocks {
            interrupt::check()?;
            let host = HostBlock::read(checkpoint, block)?;
            let mut device = submit(self.engine, |rec| host.upload(rec, limits))?;
            self.watch.lap("read weights");

            progress.step(block.index, "statistics");
            let mut grams = Vec::new();
            if let Some((hidden, forward)) = &stream {
                grams = hidden.collect(self.engine, forward, block, &device)?;
                self.watch.lap("statistics");
            }
            for input in block.inputs() {
                let gram = grams.iter().find(|(i, _)| *i == input).map(|(_, gram)| gram);
                self.input(block, input, gram, &mut device, writer, &mut |doing| progress.step(block.index, doing))?;
            }
            if let Some((hidden, forward)) = &mut stream
                && block.index + 1 < spec.blocks.len()
            {
                progress.step(block.index, "outputs");
                hidden.advance(self.engine, forward, &device)?;
                self.watch.lap("outputs of quantized blocks");
            }
            submit(self.engine, |rec| device.free(rec))?;
            progress.step(block.index + 1, "");
        }
        if let Some((_, forward)) = stream {
            submit(self.engine, |rec| forward.free(rec))?;
        }
        Ok(())
    }

    /// Solves the linears that read one input.
    fn input(
        &mut self,
        block: &Block,
        input: Input,
        gram: Option<&Gram>,
        device: &mut DeviceBlock,
        writer: &mut Writer,
        doing: &mut dyn FnMut(&str),
    ) -> Result<()> {
        let d = block.width(input);
        let named = |e: Error| Error { subject: format!("block {}, input {input}: {}", block.index, e.subject), ..e };
        let solver = Solver::new(self.engine, self.settings, d, gram).map_err(named)?;
        self.watch.lap("factor");
        for linear in block.readers(input) {
            interrupt::check()?;
            doing(&linear.role.to_string());
            let weight = &device.linear(linear.role)?.weight;
            let named = |e: Error| Error { subject: format!("{}: {}", linear.module, e.subject), ..e };
            let solved = solver.solve(self.engine, weight).map_err(named)?;
            let seconds = self.watch.lap("solve");
            writer.put_linear(linear, &solved.packed)?;
            self.watch.lap("write");
            self.layers.push(LayerReport::new(block.index, linear, &solved, solver.factor_record(), seconds));
            submit(self.engine, |rec| device.replace(rec, linear.role, solved.w_hat))??;
        }
        solver.free(self.engine)
    }
}
