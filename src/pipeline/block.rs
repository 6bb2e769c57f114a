//! One block: its statistics, its folds, its linears in the order of the forward pass, and the way of the streams through it.

use super::outputs::{Outputs, Task};
use super::{Progress, Run};
use crate::calib::{
    AttentionStats, Collector, DeviceBlock, DeviceLinear, Forward, Gram, GramSet, HiddenStates, Moments, Observer, Probe, RopeAverage,
    Statistic, TokenWeights, Tokens, Walk, output_metric,
};
use crate::engine::{Elem, Recording, submit};
use crate::method::{Damping, Inputs, Settings, Solver, Strength, Targets, strength_of};
use crate::metric::{AttentionHalf, AttentionMetric, Heads, Metric};
use crate::model::{Block, Checkpoint, Input, Role};
use crate::report::{FoldReport, Weighing};
use crate::transform::{GridChoice, Statistics, Transform, ZfoldOptions, fold_block};
use crate::{Error, Result, interrupt};
use std::ops::Range;

/// The hidden states of the calibration windows on their way through the quantized network and, for asymmetric targets, through the
/// float one.
pub(super) struct Streams {
    pub quantized: HiddenStates,
    pub float: Option<HiddenStates>,
}

impl Streams {
    /// Gives back what is on the device.
    pub fn free(self, rec: &mut Recording<'_>) {
        self.quantized.free(rec);
        if let Some(float) = self.float {
            float.free(rec);
        }
    }
}

/// One block on the device, and where its results go.
pub(super) struct BlockRun<'r, 'e> {
    pub run: &'r mut Run<'e>,
    pub block: &'r Block,
    pub checkpoint: &'r Checkpoint,
    pub device: DeviceBlock,
    pub outputs: &'r mut Outputs,
    pub progress: &'r mut dyn Progress,
}

impl BlockRun<'_, '_> {
    fn doing(&mut self, what: &str) {
        self.progress.step(self.block.index, what);
    }

    /// Solves all linears without any statistics.
    pub fn uncalibrated(mut self) -> Result<()> {
        for input in self.block.inputs() {
            self.input(input, None, None)?;
        }
        submit(self.run.engine, |rec| self.device.free(rec))
    }

    /// Calibrates and solves all linears and brings the streams to the block's outputs.
    pub fn calibrated<E: Elem>(mut self, streams: &mut Streams, forward: &Forward<'_, E>) -> Result<()> {
        let Settings { method, .. } = self.run.settings;
        let once = method.inputs == Inputs::Block;
        let weights = match method.tokens {
            Tokens::Uniform => None,
            Tokens::Residual => {
                self.doing("token weights");
                let states = streams.float.as_ref().unwrap_or(&streams.quantized);
                let weights = TokenWeights::of_residual(self.run.engine, forward, states, &self.device)?;
                self.run.lap("token weights");
                Some(weights)
            }
        };
        let weights = weights.as_ref();
        let mut grams = Vec::new();
        if once || method.transform != Transform::None {
            self.doing("statistics");
            grams = streams.quantized.collect(self.run.engine, forward, self.block, &self.device, weights)?;
            self.run.lap("statistics");
        }
        let mut attention = self.attention(&streams.quantized, forward)?;
        if let Transform::Zfold(options) = method.transform {
            self.doing("folds");
            self.fold(&options, &mut grams, attention.as_mut())?;
            self.run.lap("folds");
        }
        if let (Metric::Probe, Some(attention)) = (method.metric, &mut attention) {
            // Of the folded weights.
            let w_o = submit(self.run.engine, |rec| self.device.enter(rec, Role::O))??;
            attention.weigh_values(output_metric(self.run.engine, forward.spec(), &w_o.weight)?);
            submit(self.run.engine, |rec| self.device.leave(rec, w_o))?;
        }
        if once {
            for (input, gram) in grams {
                self.input(input, Some(Statistic::of(gram)), attention.as_ref())?;
            }
            self.doing("outputs");
            streams.quantized.advance(self.run.engine, forward, &self.device)?;
        } else {
            self.walk(streams, forward, weights, attention.as_ref())?;
        }
        self.run.lap("outputs of quantized blocks");
        submit(self.run.engine, |rec| self.device.free(rec))
    }

    /// Input by input: statistics of what the linears so far really give, then the linears that read it.
    fn walk<E: Elem>(
        &mut self,
        streams: &mut Streams,
        forward: &Forward<'_, E>,
        weights: Option<&TokenWeights>,
        attention: Option<&AttentionMetric>,
    ) -> Result<()> {
        let original = match streams.float {
            Some(_) => Some(submit(self.run.engine, |rec| self.device.copy(rec))?),
            None => None,
        };
        let mut walk = Walk::new(&mut streams.quantized)?;
        let mut float = streams.float.as_mut().map(Walk::new).transpose()?;
        let residual = self.run.settings.method.inputs == Inputs::Residual;
        let collector = Collector { forward, block: self.block, weights, residual };
        for input in self.block.inputs() {
            self.doing("statistics");
            let float = float.as_mut().zip(original.as_ref());
            let statistic = collector.collect(self.run.engine, input, (&mut walk, &self.device), float)?;
            self.run.lap("statistics");
            self.input(input, Some(statistic), attention)?;
        }
        self.doing("outputs");
        walk.finish(self.run.engine, forward, &self.device)?;
        match original {
            Some(original) => submit(self.run.engine, |rec| original.free(rec)),
            None => Ok(()),
        }
    }

    /// Solves the linears that read one input.
    fn input(&mut self, input: Input, statistic: Option<Statistic>, attention: Option<&AttentionMetric>) -> Result<()> {
        let block = self.block;
        let named = |e: Error| Error { subject: format!("block {}, input {input}: {}", block.index, e.subject), ..e };
        if block.readers(input).all(|linear| self.outputs.lattices(linear).is_empty()) {
            // Rows that no format can hold.
            return Ok(());
        }
        let solver = self.solver(input, statistic).map_err(named)?;
        self.run.lap("factor");
        for linear in block.readers(input) {
            interrupt::check()?;
            self.doing(&linear.role.to_string());
            let own = submit(self.run.engine, |rec| self.device.enter(rec, linear.role))??;
            let heads = attention.map_or(Heads::None, |a| a.heads(linear.role));
            let how = Weighing {
                alpha: solver.alpha(),
                beta: solver.beta(),
                ..weighing(self.run.settings.method.metric, attention, linear.role)
            };
            let task = Task { linear, block: Some(block.index), weight: &own.weight, heads, how };
            let w_hat = self.run.solve(&solver, &task, self.outputs)?;
            submit(self.run.engine, |rec| self.device.leave(rec, own))?;
            if let Some(w_hat) = w_hat {
                self.device.replace(self.run.engine, linear.role, w_hat)?;
            }
        }
        solver.free(self.run.engine)
    }

    /// What the split-half tests say of an input, and then its moments on the device, which take the statistic with them.
    fn solver(&mut self, input: Input, statistic: Option<Statistic>) -> Result<Solver> {
        let block = self.block;
        let readers = self.tested(input, statistic.as_ref())?;
        let lattice = |reader: &DeviceLinear| block.linear(reader.role).map(|linear| self.outputs.lattices(linear).first().copied());
        let lattices = readers.iter().map(lattice).collect::<Result<Vec<_>>>()?;
        let on: Vec<_> = readers.iter().zip(lattices).filter_map(|(reader, lattice)| Some((&reader.weight, lattice?))).collect();
        let settings = self.run.damped(self.run.settings, statistic.as_ref(), &on)?;
        let strength = self.strength(&readers, statistic.as_ref())?;
        submit(self.run.engine, |rec| readers.into_iter().for_each(|reader| self.device.leave(rec, reader)))?;
        let (mut gram, mut targets) = (None, None);
        if let Some(Moments { gram: whole, cross, residual }) = statistic.map(Statistic::into_whole) {
            if let (Some(cross), Some(strength)) = (cross, strength) {
                targets = Some(Targets::upload(self.run.engine, &whole, cross, residual, strength)?);
            }
            gram = Some(whole);
        }
        Solver::new(self.run.engine, settings, block.width(input), gram, targets)
    }

    /// The linears that read an input on the device, if split-half tests look at them.
    fn tested(&mut self, input: Input, statistic: Option<&Statistic>) -> Result<Vec<DeviceLinear>> {
        let Some(statistic) = statistic.filter(|s| s.halves().is_some()) else { return Ok(Vec::new()) };
        if self.run.settings.method.damping != Damping::SplitHalf && !statistic.has_cross() {
            return Ok(Vec::new());
        }
        submit(self.run.engine, |rec| self.block.readers(input).map(|linear| self.device.enter(rec, linear.role)).collect())?
    }

    /// Moves factors from the readers of inputs into what the inputs come from; writes what changes besides linears.
    fn fold(&mut self, options: &ZfoldOptions, grams: &mut [(Input, Gram)], attention: Option<&mut AttentionMetric>) -> Result<()> {
        if self.run.engine.estimates() {
            // Folds are a small part of the work, and their factors come out of numbers.
            return Ok(());
        }
        let choice = GridChoice { lattice: &|linear| self.outputs.rewritable(linear), rule: self.run.settings.method.scale };
        let values = attention.map_or_else(Default::default, AttentionMetric::values_mut);
        let mut statistics = Statistics { inputs: grams, values };
        let folded = fold_block(self.run.engine, options, self.checkpoint, self.block, &mut self.device, &mut statistics, &choice)?;
        for tensor in &folded.tensors {
            self.outputs.put_tensor(self.checkpoint.spec(), &tensor.name, &tensor.tensor)?;
        }
        let index = self.block.index;
        self.run.folds.extend(folded.folds.into_iter().map(|fold| FoldReport { block: index, fold }));
        Ok(())
    }

    /// The metrics of the heads of the float block, if the method has such.
    fn attention<E: Elem>(&mut self, hidden: &HiddenStates, forward: &Forward<'_, E>) -> Result<Option<AttentionMetric>> {
        let metric = self.run.settings.method.metric;
        if !metric.attends() {
            return Ok(None);
        }
        self.doing("attention");
        let n = hidden.batches();
        let tokens = (0..n).map(|index| hidden.batch(index).n_tok()).sum();
        let halves = AttentionMetric::halves(metric, n, tokens);
        let halves = halves.into_iter().map(|half| self.attention_half(hidden, forward, half)).collect::<Result<Vec<_>>>()?;
        let attention = AttentionMetric::of(metric, &halves);
        self.run.lap("attention");
        Ok(Some(attention))
    }

    fn attention_half<E: Elem>(&mut self, hidden: &HiddenStates, forward: &Forward<'_, E>, batches: Range<usize>) -> Result<AttentionHalf> {
        let Settings { method, seed, .. } = self.run.settings;
        let engine = &mut *self.run.engine;
        let (spec, limits, seq_len) = (forward.spec(), engine.limits(), hidden.batch(0).seq_len);
        let mut rec = Recording::new();
        let mut gram = GramSet::of(&mut rec, self.block, Input::AttnNorm, limits);
        let mut stats = AttentionStats::new(&mut rec, spec, 1, limits);
        // Every window has probes of its own.
        let seed = seed ^ (batches.start as u64) << 32;
        let mut probe = None;
        if method.metric == Metric::Probe {
            let w_o = self.device.enter(&mut rec, Role::O)?;
            probe = Some(Probe::new(&mut rec, spec, &w_o.weight, seq_len, 1, seed, limits));
            self.device.leave(&mut rec, w_o);
        }
        engine.run(rec)?;
        let observer: &mut dyn Observer<E> = match &mut probe {
            Some(probe) => &mut (&mut gram, (&mut stats, probe)),
            None => &mut (&mut gram, &mut stats),
        };
        hidden.observe(engine, forward, &self.device, batches, observer, Input::Context)?;
        let mut rec = Recording::new();
        let (gram, stats, probe) = (gram.download(&mut rec), stats.download(&mut rec), probe.map(|probe| probe.download(&mut rec)));
        let mut downloads = engine.run(rec)?;
        let moments = stats.take(&mut downloads)?;
        let rows = match probe {
            Some(probe) => probe.take(&mut downloads)?,
            None => moments.row_metric(Some(&RopeAverage::new(&spec.rope, spec.d_head, seq_len))),
        };
        Ok(AttentionHalf { rows, moments, input: gram.take(&mut downloads)?.remove(0).1 })
    }

    /// How far the linears of one input aim at what the float model gives, where there is its stream.
    fn strength(&mut self, readers: &[DeviceLinear], statistic: Option<&Statistic>) -> Result<Option<Strength>> {
        let Some(statistic) = statistic.filter(|s| s.has_cross()) else { return Ok(None) };
        let Settings { alpha, seed, .. } = self.run.settings;
        if let Some(alpha) = alpha {
            return Ok(Some(Strength { inputs: alpha, residual: alpha }));
        }
        let weights: Vec<_> = readers.iter().map(|reader| &reader.weight).collect();
        Ok(Some(strength_of(self.run.engine, statistic, &weights, seed)?.map_or(Strength::UNTESTED, Strength::cautious)))
    }
}

/// What a linear is weighed by: only linears with heads have more than the layer's metric.
fn weighing(metric: Metric, attention: Option<&AttentionMetric>, role: Role) -> Weighing {
    let heads = matches!(role, Role::Q | Role::K | Role::V);
    let shrinkage = attention.and_then(|a| a.shrinkage).and_then(|s| match role {
        Role::Q => Some(s.g_q),
        Role::K => Some(s.g_k),
        Role::V => Some(s.h_v),
        _ => None,
    });
    Weighing { metric: if metric.attends() && !heads { Metric::Layer } else { metric }, shrinkage, alpha: None, beta: None }
}
