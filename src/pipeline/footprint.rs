//! What a run will take, known before it: one block, the matrices outside of the blocks and the evaluation are recorded by the very code that runs them, on an engine that computes
//! nothing, while the program's allocator counts what the host asks for.
//!
//! Blocks of one model have the same shapes, so one stands for all; so do batches of windows: where there are many, the work is that of two and of
//! four batches, continued in a straight line, and what the others' hidden states take is asked for beside it.

use super::block::{BlockRun, Streams};
use super::choices;
use super::ledger::Ledger;
use super::outputs::Outputs;
use super::{Quiet, Run};
use crate::calib::{DeviceBlock, Forward, Gram, HiddenStates, Residency, Statistic, Streaming, Tier};
use crate::engine::estimate::Estimate;
use crate::engine::{Elem, Engine, Profile, Rates, submit};
use crate::eval::evaluate;
use crate::export::Writer;
use crate::model::{Block, Checkpoint, Linear, ModelSpec, Role, Weights};
use crate::plan::{EvalText, Operands, Plan};
use crate::report::{self, Stopwatch};
use crate::tensor::{Dtype, Tensor};
use crate::{Error, Kind, Result, memory};
use half::f16;
use serde::Serialize;
use std::borrow::Cow;
use std::fmt;

/// Bytes of the program itself, its threads, its tables, and pages of files that are being read, which no allocator counts.
const PROGRAM: u64 = 32 << 20;
/// Operands that native matrix products and factorisations pack, which only touch a part of what they ask for.
const WORKSPACE: u64 = 96 << 20;
/// Memory that the allocator keeps, and small things of kernels that the estimate does not see: an eighth.
const SLACK: u64 = 8;

/// Batches that are recorded where there are more.
const MANY: usize = 4;

/// The memory and the disk that a run will take.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Needs {
    /// Peak of this process's memory, device buffers of a native engine included.
    pub ram_bytes: u64,
    /// Peak of the buffers of a GPU.
    pub device_bytes: u64,
    /// Hidden states on disk: while they wait, and for the journal.
    pub spill_bytes: u64,
    /// What is written, for all formats.
    pub output_bytes: u64,
}

/// What one format's folder will take.
#[derive(Clone, Debug, Serialize)]
pub struct OutputSize {
    pub format: &'static str,
    pub bytes: u64,
}

/// What a run will take.
#[derive(Clone, Debug, Serialize)]
pub struct Footprint {
    #[serde(flatten)]
    pub needs: Needs,
    /// Of `needs.output_bytes`.
    pub outputs: Vec<OutputSize>,
    /// Tokens that go through the device at a time.
    pub batch_tokens: usize,
    /// Where hidden states wait: on the device, in memory, on disk.
    pub tier: Tier,
    /// Which of a block's weights are on the device.
    pub weights: Residency,
    pub blocks: usize,
    /// What all stages have to do.
    pub work: Profile,
    pub stages: Vec<StageWork>,
    /// By the rates of the device, where they are known.
    pub seconds: Option<f64>,
}

/// In a line: the memory, and how hidden states wait.
impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        write!(f, "at most {:.2} GB of memory", gb(self.needs.ram_bytes))?;
        if self.needs.device_bytes > 0 {
            write!(f, " and {:.2} GB of the device", gb(self.needs.device_bytes))?;
        }
        let weights = match self.weights {
            Residency::Block => "",
            Residency::Linear => ", weights go to the device linear by linear",
        };
        write!(f, "; {} tokens at a time, hidden states wait {}{weights}", self.batch_tokens, self.tier.told())
    }
}

/// One stage of the whole run.
#[derive(Clone, Debug, Serialize)]
pub struct StageWork {
    pub name: &'static str,
    pub flops: f64,
    /// Of the buffers that kernels are given.
    pub bytes: f64,
    pub seconds: Option<f64>,
}

/// The work of one block by stages, that of the matrices outside of blocks, where a format quantizes them, but for the walk that gives a tied
/// head its metric, and that of one evaluation.
struct Work {
    block: Ledger,
    outer: Profile,
    evaluation: Option<Profile>,
}

impl Work {
    /// Of all blocks, and of the evaluations before and after them.
    fn stages(&self, blocks: usize) -> Vec<(&'static str, Profile)> {
        let mut all: Vec<_> = self.block.stages().iter().map(|(name, work)| (*name, work.times(blocks as f64))).collect();
        if self.outer.flops() > 0.0 {
            all.push(("embedding and head", self.outer.clone()));
        }
        all.retain(|(_, work)| !work.is_idle());
        all.extend(self.evaluation.as_ref().map(|work| ("evaluate before and after", work.times(2.0))));
        all
    }
}

/// What `plan` will take as it is; how long, where the device's rates are known.
///
/// # Errors
/// Internal, if a recording is wrong, or the program's allocator does not count.
pub(super) fn of(plan: &Plan, rates: Option<&Rates>) -> Result<Footprint> {
    let streaming = &plan.streaming;
    let (needs, work) = match plan.request.operands {
        Operands::F32 => needs_and_work::<f32>(plan),
        Operands::F16 => needs_and_work::<f16>(plan),
    }?;
    let blocks = plan.checkpoint.spec().blocks.len();
    let stages = work.stages(blocks);
    let seconds = |work: &Profile| rates.map(|rates| rates.seconds(work));
    Ok(Footprint {
        needs,
        outputs: plan.writers.iter().map(|writer| OutputSize { format: writer.format().name, bytes: writer.bytes() }).collect(),
        batch_tokens: streaming.batch_tokens,
        tier: streaming.tier.clone(),
        weights: streaming.weights,
        blocks,
        work: stages.iter().fold(Profile::default(), |mut all, (_, work)| {
            all.add(work);
            all
        }),
        stages: stages
            .iter()
            .map(|(name, work)| StageWork { name, flops: work.flops(), bytes: work.bytes(), seconds: seconds(work) })
            .collect(),
        seconds: rates.map(|rates| stages.iter().map(|(_, work)| rates.seconds(work)).sum()),
    })
}

/// What `plan` would need with another choice.
pub(super) fn needs(plan: &Plan, streaming: &Streaming) -> Result<Needs> {
    let (needs, _) = match plan.request.operands {
        Operands::F32 => recorded::<f32>(plan, streaming),
        Operands::F16 => recorded::<f16>(plan, streaming),
    }?;
    Ok(needs)
}

/// The work of all batches: that of a few and of many, continued.
fn needs_and_work<E: Elem>(plan: &Plan) -> Result<(Needs, Work)> {
    let (needs, mut work) = recorded::<E>(plan, &plan.streaming)?;
    let (windows, each) = batches(plan, &plan.streaming);
    if windows.len() > MANY * each {
        let few = one_block::<E>(plan, &windows[..MANY / 2 * each], &plan.streaming, &mut engine(plan))?;
        let step = MANY as f64 / 2.0;
        work.block = few.continued(&work.block, (windows.len() as f64 / each as f64 - step) / step);
    }
    Ok((needs, work))
}

/// All calibration windows, and how many of them are a batch.
fn batches<'p>(plan: &'p Plan, streaming: &Streaming) -> (&'p [Vec<u32>], usize) {
    let windows: &[Vec<u32>] = plan.calibration.as_ref().map_or(&[], |c| &c.windows);
    let length = windows.first().map_or(0, Vec::len);
    (windows, streaming.windows_per_batch(windows.len(), length, plan.checkpoint.spec(), plan.engine.limits()))
}

/// What stands for the plan's engine.
fn engine(plan: &Plan) -> Estimate {
    if plan.engine.is_native() { Estimate::native(plan.engine.limits()) } else { Estimate::new(plan.engine.limits()) }
}

/// What `plan` would need with another choice, and the work of its first batches.
fn recorded<E: Elem>(plan: &Plan, streaming: &Streaming) -> Result<(Needs, Work)> {
    if !memory::is_counted() {
        return Err(Error::internal("plan", "the program's allocator does not count"));
    }
    let native = plan.engine.is_native();
    let spec = plan.checkpoint.spec();
    let streams = if plan.settings.method.inputs.two_streams() { 2 } else { 1 };
    let (windows, each) = batches(plan, streaming);
    let first = &windows[..windows.len().min(MANY * each)];
    let waiting = windows[first.len()..].iter().map(Vec::len).sum::<usize>() * choices::waiting_bytes(plan);
    let mut of_block = engine(plan);
    let (done, block_peak) = memory::peak_of(|| {
        let _others = vec![0u8; if streaming.tier == Tier::Memory { waiting } else { 0 }];
        one_block::<E>(plan, first, streaming, &mut of_block)
    });
    let block = done?;
    let block_device = of_block.profile().peak_bytes + if streaming.tier == Tier::Device { waiting as u64 } else { 0 };
    let mut outer = engine(plan);
    let (done, outer_peak) = memory::peak_of(|| outer_matrices(plan, streaming, &mut outer));
    done?;
    let mut evaluation = engine(plan);
    let (done, evaluation_peak) = memory::peak_of(|| match &plan.eval {
        Some(text) => {
            evaluate::<E>(&mut evaluation, &Blank(&plan.checkpoint), None, &text.windows(), streaming, &mut |_, _| Ok(())).map(|_| ())
        }
        None => Ok(()),
    });
    match done {
        // A loss of nothing is no number.
        Err(error) if error.kind != Kind::Numeric => return Err(error),
        _ => {}
    }
    // Reading texts may have taken more than the work will. After another run in this process much is asked for that nobody has touched:
    // the operands that products pack.
    let resident = report::peak_resident().map_or(usize::MAX, |bytes| bytes as usize);
    let [peak, live] = [memory::peak(), memory::live()].map(|asked| asked.min(resident));
    let counted = peak.max(live + block_peak.max(outer_peak).max(evaluation_peak)) as u64;
    let device = block_device.max(outer.profile().peak_bytes).max(evaluation.profile().peak_bytes);
    let tokens = windows.iter().map(Vec::len).sum::<usize>();
    // Two files of each stream, of the dtype that they are kept in; contexts wait in one of the two of theirs.
    let (states, contexts) = (tokens * spec.d_model, tokens * spec.n_head * spec.d_head);
    // Those of the evaluation stay until the end.
    let evaluated = plan.eval.as_ref().map_or(0, EvalText::n_tok) * spec.d_model;
    let spill = match streaming.tier {
        Tier::Disk(_) => (2 * streams * (states + contexts) + 2 * evaluated) * Dtype::Bf16.size(),
        Tier::Device | Tier::Memory => 2 * streams * states * Dtype::F32.size(),
    };
    let needs = Needs {
        ram_bytes: counted + counted / SLACK + PROGRAM + if native && !windows.is_empty() { WORKSPACE } else { 0 },
        device_bytes: if native { 0 } else { device },
        spill_bytes: spill as u64,
        output_bytes: plan.writers.iter().map(Writer::bytes).sum(),
    };
    let evaluation = plan.eval.as_ref().map(|_| evaluation.profile().clone());
    Ok((needs, Work { block, outer: outer.profile().clone(), evaluation }))
}

/// Records the first block over some of the windows.
fn one_block<E: Elem>(plan: &Plan, windows: &[Vec<u32>], streaming: &Streaming, engine: &mut Estimate) -> Result<Ledger> {
    let (checkpoint, blank, limits) = (&plan.checkpoint, &Blank(&plan.checkpoint), engine.limits());
    let spec = checkpoint.spec();
    let Some(block) = spec.blocks.first() else { return Ok(Ledger::default()) };
    let mut outputs = Outputs::nowhere(spec, &plan.writers);
    let mut run = Run::estimate(plan, streaming, engine);
    let streams = match windows.first() {
        Some(window) => {
            let quantized = HiddenStates::embed(run.engine, blank, windows, streaming)?;
            let two = plan.settings.method.inputs.two_streams();
            let float = two.then(|| HiddenStates::embed(run.engine, blank, windows, streaming)).transpose()?;
            let seq_len = window.len();
            Some((Streams { quantized, float }, submit(run.engine, |rec| Forward::<E>::new(rec, spec, seq_len, limits))?))
        }
        None => None,
    };
    let device = DeviceBlock::load_as(run.engine, blank, block, streaming.weights)?;
    run.lap("read weights");
    let of_block = BlockRun { run: &mut run, block, checkpoint, device, outputs: &mut outputs, progress: &mut Quiet };
    match streams {
        Some((mut streams, forward)) => {
            of_block.calibrated(&mut streams, &forward)?;
            submit(run.engine, |rec| {
                streams.free(rec);
                forward.free(rec);
            })?;
        }
        None => of_block.uncalibrated()?,
    }
    Ok(run.ledger.take().unwrap_or_default())
}

/// Records the rounding of embedding and head, beside the hidden states that are there meanwhile.
fn outer_matrices(plan: &Plan, streaming: &Streaming, engine: &mut Estimate) -> Result<()> {
    let (spec, blank) = (plan.checkpoint.spec(), &Blank(&plan.checkpoint));
    let mut outputs = Outputs::nowhere(spec, &plan.writers);
    let mut run = Run::estimate(plan, streaming, engine);
    let windows: &[Vec<u32>] = plan.calibration.as_ref().map_or(&[], |c| &c.windows);
    let states = HiddenStates::embed(run.engine, blank, windows, streaming)?;
    for linear in [&spec.embedding, &spec.head] {
        if outputs.lattices(linear).is_empty() {
            continue;
        }
        let weighed = plan.calibration.is_some() && (spec.tied_head || linear.role == Role::Head);
        let statistic = weighed.then(|| Statistic::of(Gram::blank(linear.d_in)));
        if let Some(next) = run.matrix(blank, linear, statistic, &mut outputs)? {
            submit(run.engine, |rec| next.free(rec))?;
        }
        if spec.tied_head {
            break;
        }
    }
    submit(engine, |rec| states.free(rec))
}

impl<'e> Run<'e> {
    fn estimate(plan: &Plan, streaming: &Streaming, engine: &'e mut Estimate) -> Self {
        let (settings, streaming) = (plan.settings, streaming.clone());
        Self { engine, settings, streaming, watch: Stopwatch::start(), folds: Vec::new(), ledger: Some(Ledger::default()) }
    }
}

/// A model whose values nobody has read: zeros of the right shapes and types.
struct Blank<'c>(&'c Checkpoint);

impl Blank<'_> {
    fn zeros(&self, name: &str, shape: Vec<usize>) -> Result<Tensor<'_>> {
        let dtype: Dtype = self.0.raw(name)?.dtype.parse().unwrap_or(self.0.spec().dtype);
        let bytes = shape.iter().product::<usize>() * dtype.size();
        Tensor::new(dtype, shape, Cow::Owned(vec![0; bytes]))
    }
}

impl Weights for Blank<'_> {
    fn spec(&self) -> &ModelSpec {
        self.0.spec()
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.zeros(name, self.0.raw(name)?.shape)
    }

    fn linear(&self, linear: &Linear) -> Result<Tensor<'_>> {
        self.zeros(&linear.weight(), vec![linear.d_out, linear.d_in])
    }

    fn release(&self) {}

    fn prefetch(&self, _: &Block) {}
}
