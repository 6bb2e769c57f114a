//! The scheduler of a quantization run: walks the blocks, hands statistics to the solver, results to the writer, and outputs of the
//! quantized block to the next one; then reads everything back and judges it.

use crate::calib::{
    self, AttentionStats, DeviceBlock, Forward, Gram, GramSet, HiddenStates, HostBlock, Observer, Probe, RopeAverage, Statistic, Walk,
    output_metric,
};
use crate::engine::{Elem, Engine, Recording, submit};
use crate::eval::{Evaluation, evaluate};
use crate::export::{self, Writer};
use crate::method::{self, Inputs, Settings, Solver, Targets, alpha_of};
use crate::metric::{AttentionHalf, AttentionMetric, Heads, Metric};
use crate::model::{Block, Checkpoint, Input, Role, Weights};
use crate::plan::{Calibration, Operands, Plan, hashed_files};
use crate::report::{self, FoldReport, LayerReport, MemoryReport, ModelReport, PerplexityReport, Report, Stopwatch, Weighing};
use crate::transform::{GridChoice, Statistics, Transform, ZfoldOptions, fold_block};
use crate::{Error, Result, interrupt};
use half::f16;
use std::ops::Range;
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
    let mut run = Run::<E> { engine, settings, watch, layers: Vec::new(), folds: Vec::new(), marker: std::marker::PhantomData };
    run.blocks(&checkpoint, calibration.as_ref(), &mut writer, progress)?;
    let Run { engine, mut watch, layers, folds, .. } = run;

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
        folds,
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
    folds: Vec<FoldReport>,
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
                let quantized = HiddenStates::embed(self.engine, checkpoint, &calibration.windows)?;
                let float = (self.settings.method.inputs == Inputs::Asymmetric).then(|| quantized.clone());
                let seq_len = calibration.windows.first().map_or(0, Vec::len);
                let forward = submit(self.engine, |rec| Forward::<E>::new(rec, spec, seq_len, limits))?;
                Some((Streams { quantized, float }, forward))
            }
            None => None,
        };
        for block in &spec.blocks {
            interrupt::check()?;
            let host = HostBlock::read(checkpoint, block)?;
            let mut device = submit(self.engine, |rec| host.upload(rec, limits))?;
            self.watch.lap("read weights");
            let mut step = |doing: &str| progress.step(block.index, doing);
            match &mut stream {
                None => {
                    for input in block.inputs() {
                        self.input(block, input, None, None, &mut device, writer, &mut step)?;
                    }
                }
                Some((streams, forward)) => self.block(block, checkpoint, streams, forward, &mut device, writer, &mut step)?,
            }
            submit(self.engine, |rec| device.free(rec))?;
            progress.step(block.index + 1, "");
        }
        if let Some((_, forward)) = stream {
            submit(self.engine, |rec| forward.free(rec))?;
        }
        Ok(())
    }

    /// Calibrates and solves one block and brings the streams to its outputs.
    #[allow(clippy::too_many_arguments, reason = "a block, its streams, and where results go")]
    fn block(
        &mut self,
        block: &Block,
        checkpoint: &Checkpoint,
        streams: &mut Streams,
        forward: &Forward<'_, E>,
        device: &mut DeviceBlock,
        writer: &mut Writer,
        doing: &mut dyn FnMut(&str),
    ) -> Result<()> {
        let once = self.settings.method.inputs == Inputs::Block;
        let mut grams = Vec::new();
        if once || self.settings.method.transform != Transform::None {
            doing("statistics");
            grams = streams.quantized.collect(self.engine, forward, block, device)?;
            self.watch.lap("statistics");
        }
        if let Transform::Zfold(options) = self.settings.method.transform {
            doing("folds");
            self.fold(&options, block, checkpoint, device, &mut grams, writer)?;
            self.watch.lap("folds");
        }
        let attention = self.attention(block, &streams.quantized, forward, device)?;
        self.watch.lap("attention");
        if once {
            for (input, gram) in grams {
                let statistic = Statistic::of(gram);
                self.input(block, input, Some(&statistic), attention.as_ref(), device, writer, doing)?;
            }
            doing("outputs");
            streams.quantized.advance(self.engine, forward, device)?;
            self.watch.lap("outputs of quantized blocks");
            return Ok(());
        }
        let original = match streams.float {
            Some(_) => Some(submit(self.engine, |rec| device.copy(rec))?),
            None => None,
        };
        let mut walk = Walk::new(&mut streams.quantized);
        let mut float = streams.float.as_mut().map(Walk::new);
        for input in block.inputs() {
            doing("statistics");
            let float = float.as_mut().zip(original.as_ref());
            let statistic = calib::collect(self.engine, forward, block, input, (&mut walk, device), float)?;
            self.watch.lap("statistics");
            self.input(block, input, Some(&statistic), attention.as_ref(), device, writer, doing)?;
        }
        doing("outputs");
        walk.finish(self.engine, forward, device)?;
        if let Some(original) = original {
            submit(self.engine, |rec| original.free(rec))?;
        }
        self.watch.lap("outputs of quantized blocks");
        Ok(())
    }

    /// Solves the linears that read one input.
    fn input(
        &mut self,
        block: &Block,
        input: Input,
        statistic: Option<&Statistic>,
        attention: Option<&AttentionMetric>,
        device: &mut DeviceBlock,
        writer: &mut Writer,
        doing: &mut dyn FnMut(&str),
    ) -> Result<()> {
        let named = |e: Error| Error { subject: format!("block {}, input {input}: {}", block.index, e.subject), ..e };
        let targets = self.targets(block, input, statistic, device).map_err(named)?;
        let gram = statistic.map(|s| &s.whole.gram);
        let solver = Solver::new(self.engine, self.settings, block.width(input), gram, targets).map_err(named)?;
        self.watch.lap("factor");
        for linear in block.readers(input) {
            interrupt::check()?;
            doing(&linear.role.to_string());
            let weight = &device.linear(linear.role)?.weight;
            let named = |e: Error| Error { subject: format!("{}: {}", linear.module, e.subject), ..e };
            let solved = solver.solve(self.engine, weight, attention.map_or(Heads::None, |a| a.heads(linear.role))).map_err(named)?;
            let seconds = self.watch.lap("solve");
            writer.put_linear(linear, &solved.packed)?;
            self.watch.lap("write");
            let how = weighing(self.settings.method.metric, attention, linear.role, solver.alpha());
            self.layers.push(LayerReport::new(block.index, linear, &solved, &how, seconds));
            submit(self.engine, |rec| device.replace(rec, linear.role, solved.w_hat))??;
        }
        solver.free(self.engine)
    }

    /// Moves factors from the readers of inputs into what the inputs come from; writes what changes besides linears.
    fn fold(
        &mut self,
        options: &ZfoldOptions,
        block: &Block,
        checkpoint: &Checkpoint,
        device: &mut DeviceBlock,
        grams: &mut [(Input, Gram)],
        writer: &mut Writer,
    ) -> Result<()> {
        let Settings { method, scheme, scale_dtype, .. } = self.settings;
        let choice = GridChoice { scheme, scale_dtype, rule: method.scale };
        let mut statistics = Statistics { inputs: grams, values: &mut [] };
        let folded = fold_block(self.engine, options, checkpoint, block, device, &mut statistics, &choice)?;
        for tensor in &folded.tensors {
            writer.put_tensor(&tensor.name, &tensor.tensor)?;
        }
        self.folds.extend(folded.folds.into_iter().map(|fold| FoldReport { block: block.index, fold }));
        Ok(())
    }

    /// The metrics of the heads of a float block, if the method has such.
    fn attention(
        &mut self,
        block: &Block,
        hidden: &HiddenStates,
        forward: &Forward<'_, E>,
        device: &DeviceBlock,
    ) -> Result<Option<AttentionMetric>> {
        let metric = self.settings.method.metric;
        if !metric.attends() {
            return Ok(None);
        }
        let n = hidden.batches();
        let halves = if n > 1 { vec![0..n / 2, n / 2..n] } else { std::iter::once(0..n).collect() };
        let halves =
            halves.into_iter().map(|half| self.attention_half(block, hidden, forward, device, half)).collect::<Result<Vec<_>>>()?;
        Ok(Some(match metric {
            Metric::Probe => {
                let g_v = output_metric(self.engine, forward.spec(), &device.linear(Role::O)?.weight)?;
                AttentionMetric::shrunk(&halves, g_v)
            }
            _ => AttentionMetric::published(&halves),
        }))
    }

    fn attention_half(
        &mut self,
        block: &Block,
        hidden: &HiddenStates,
        forward: &Forward<'_, E>,
        device: &DeviceBlock,
        batches: Range<usize>,
    ) -> Result<AttentionHalf> {
        let (spec, limits, seq_len) = (forward.spec(), self.engine.limits(), hidden.batch(0).seq_len);
        let mut rec = Recording::new();
        let mut gram = GramSet::of(&mut rec, block, Input::AttnNorm, limits);
        let mut stats = AttentionStats::new(&mut rec, spec, 1, limits);
        let w_o = &device.linear(Role::O)?.weight;
        // Every window has probes of its own.
        let seed = self.settings.seed ^ (batches.start as u64) << 32;
        let mut probe = (self.settings.method.metric == Metric::Probe).then(|| Probe::new(&mut rec, spec, w_o, seq_len, 1, seed, limits));
        self.engine.run(rec)?;
        let observer: &mut dyn Observer<E> = match &mut probe {
            Some(probe) => &mut (&mut gram, (&mut stats, probe)),
            None => &mut (&mut gram, &mut stats),
        };
        hidden.observe(self.engine, forward, device, batches, observer, Input::Context)?;
        let mut rec = Recording::new();
        let (gram, stats, probe) = (gram.download(&mut rec), stats.download(&mut rec), probe.map(|probe| probe.download(&mut rec)));
        let mut downloads = self.engine.run(rec)?;
        let moments = stats.take(&mut downloads)?;
        let rows = match probe {
            Some(probe) => probe.take(&mut downloads)?,
            None => moments.row_metric(Some(&RopeAverage::new(&spec.rope, spec.d_head, seq_len))),
        };
        Ok(AttentionHalf { rows, moments, input: gram.take(&mut downloads)?.remove(0).1 })
    }

    /// What the linears of one input aim at, where that is not their own weights.
    fn targets(&mut self, block: &Block, input: Input, statistic: Option<&Statistic>, device: &DeviceBlock) -> Result<Option<Targets>> {
        let Some(statistic) = statistic.filter(|s| s.whole.cross.is_some()) else { return Ok(None) };
        let alpha = match self.settings.alpha {
            Some(alpha) => alpha,
            None => {
                let weights = block.readers(input).map(|l| Ok(&device.linear(l.role)?.weight)).collect::<Result<Vec<_>>>()?;
                alpha_of(self.engine, statistic, &weights, self.settings.seed)?.unwrap_or(WITHOUT_TEST)
            }
        };
        Targets::upload(self.engine, &statistic.whole, alpha)
    }
}

/// What a linear is weighed by: only linears with heads have more than the layer's metric.
fn weighing(metric: Metric, attention: Option<&AttentionMetric>, role: Role, alpha: Option<f32>) -> Weighing {
    let heads = matches!(role, Role::Q | Role::K | Role::V);
    let shrinkage = attention.and_then(|a| a.shrinkage).and_then(|s| match role {
        Role::Q => Some(s.g_q),
        Role::K => Some(s.g_k),
        Role::V => Some(s.h_v),
        _ => None,
    });
    Weighing { metric: if metric.attends() && !heads { Metric::Layer } else { metric }, shrinkage, alpha }
}

/// α where there is too little text for a split-half test.
const WITHOUT_TEST: f32 = 0.5;

/// The hidden states of the calibration windows on their way through the quantized network and, for asymmetric targets, through the
/// float one.
struct Streams {
    quantized: HiddenStates,
    float: Option<HiddenStates>,
}
