//! Walks a model and measures all chains on its linears.

use super::chains::{BEST_ORDERS, CHAINS, DESCENT, GPTQ, ORDERS, PUBLISHED};
use super::report::rounded;
use super::work::Work;
use aespa_gpu::calib::{AttentionStats, DeviceBlock, Forward, Gram, HiddenStates, RopeAverage, Streaming};
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::{Engine, Mat, Recording, submit};
use aespa_gpu::metric::{AttentionHalf, AttentionMetric, ColumnMetric, Heads, Metric, Objective, RowMetric};
use aespa_gpu::model::{Block, Checkpoint, Input, Linear, Role, Weights};
use aespa_gpu::quant::{GridShape, Scheme};
use aespa_gpu::round::factor::{factor, factor_in};
use aespa_gpu::round::gptq::{DeviceFactor, RowFactor};
use aespa_gpu::round::{Problem, orders};
use aespa_gpu::scale::{self, ScaleRule};
use aespa_gpu::tensor::Dtype;
use aespa_gpu::{Error, Result, interrupt};
use serde_json::{Value, json};
use std::time::Instant;

/// Of the unit diagonal, as `quantize` has it where nothing else is said.
pub const DAMPING: f64 = 0.01;

/// One linear at one width: what each chain left and took.
pub struct Measured {
    pub block: usize,
    pub role: Role,
    pub bits: u32,
    pub weights: usize,
    pub scale_seconds: f64,
    pub loss: Vec<f64>,
    pub seconds: Vec<f64>,
    /// Of these in matrix products.
    pub products: Vec<f64>,
}

impl Measured {
    pub fn new(block: usize, linear: &Linear, bits: u32) -> Self {
        let zeros = vec![0.0; CHAINS.len()];
        let weights = linear.d_out * linear.d_in;
        Self { block, role: linear.role, bits, weights, scale_seconds: 0.0, loss: zeros.clone(), seconds: zeros.clone(), products: zeros }
    }

    pub fn json(&self) -> Value {
        let all = |values: &[f64]| values.iter().copied().map(rounded).collect::<Vec<_>>();
        json!({
            "block": self.block, "role": self.role, "bits": self.bits, "weights": self.weights,
            "scale_seconds": rounded(self.scale_seconds), "loss": all(&self.loss), "seconds": all(&self.seconds),
            "product_seconds": all(&self.products),
        })
    }
}

/// The column metric of an input, or of one head's, on the device.
struct Columns {
    metric: ColumnMetric,
    /// One for each order; the first is by decreasing activations.
    factors: Vec<DeviceFactor>,
}

impl Columns {
    fn free(self, engine: &mut dyn Engine) -> Result<()> {
        submit(engine, |rec| {
            self.metric.free(rec);
            self.factors.into_iter().for_each(|factor| factor.free(rec));
        })
    }
}

/// Rows of a linear under one column metric, and the G of their heads.
struct Rows<'a> {
    w: &'a [f32],
    first: usize,
    cols: usize,
    columns: &'a Columns,
    heads: Option<(usize, &'a [f32])>,
}

pub struct Bench {
    pub engine: CpuEngine,
    pub bits: Vec<u32>,
    pub chosen: Vec<bool>,
    pub scale_dtype: Dtype,
    pub linears: Vec<Measured>,
    pub statistics_seconds: f64,
    pub factor_seconds: f64,
    /// Of the further column orders.
    pub order_seconds: f64,
}

impl Bench {
    pub fn new(bits: Vec<u32>, chosen: Vec<bool>, scale_dtype: Dtype) -> Self {
        let linears = Vec::new();
        let engine = CpuEngine::new();
        Self { engine, bits, chosen, scale_dtype, linears, statistics_seconds: 0.0, factor_seconds: 0.0, order_seconds: 0.0 }
    }

    /// Walks the float model up to the last of `blocks` and measures those.
    pub fn model(&mut self, checkpoint: &Checkpoint, windows: &[Vec<u32>], blocks: &[usize]) -> Result<()> {
        let (spec, limits) = (checkpoint.spec(), self.engine.limits());
        let last = blocks.iter().copied().max().unwrap_or(0);
        let mut hidden = HiddenStates::embed(&mut self.engine, checkpoint, windows, &Streaming::default())?;
        let forward = submit(&mut self.engine, |rec| Forward::<f32>::new(rec, spec, windows[0].len(), limits))?;
        for block in &spec.blocks[..=last] {
            interrupt::check()?;
            let device = DeviceBlock::load(&mut self.engine, checkpoint, block)?;
            if blocks.contains(&block.index) {
                self.block(checkpoint, block, &hidden, &forward, &device)?;
            }
            if block.index < last {
                hidden.advance(&mut self.engine, &forward, &device)?;
            }
            submit(&mut self.engine, |rec| device.free(rec))?;
        }
        submit(&mut self.engine, |rec| forward.free(rec))
    }

    fn block(
        &mut self,
        checkpoint: &Checkpoint,
        block: &Block,
        hidden: &HiddenStates,
        forward: &Forward<'_, f32>,
        device: &DeviceBlock,
    ) -> Result<()> {
        let start = Instant::now();
        let grams = hidden.collect(&mut self.engine, forward, block, device, None)?;
        let input = grams.iter().find(|(input, _)| *input == Input::AttnNorm).map(|(_, gram)| gram.clone());
        let input = input.ok_or_else(|| Error::internal(format!("block {}", block.index), "has no statistic of its attention's input"))?;
        let attention = attention(&mut self.engine, hidden, forward, device, input)?;
        self.statistics_seconds += start.elapsed().as_secs_f64();
        for (input, gram) in &grams {
            let shared = self.columns(gram)?;
            for linear in block.readers(*input) {
                self.linear(checkpoint, block, linear, &shared, attention.heads(linear.role))?;
            }
            shared.free(&mut self.engine)?;
        }
        Ok(())
    }

    fn columns(&mut self, gram: &Gram) -> Result<Columns> {
        let start = Instant::now();
        let host = factor(&gram.h, gram.d, true, DAMPING)?;
        let limits = self.engine.limits();
        let mut columns = submit(&mut self.engine, |rec| Columns {
            metric: ColumnMetric::layer(rec, gram.clone(), DAMPING as f32, limits),
            factors: vec![DeviceFactor::upload(rec, host)],
        })?;
        self.factor_seconds += start.elapsed().as_secs_f64();
        let start = Instant::now();
        let orders = if self.chosen[BEST_ORDERS] { ORDERS } else { 1 };
        for index in 1..orders {
            let host = factor_in(orders::drawn(&gram.h, gram.d, 0, index as u32), &gram.h, gram.d, DAMPING)?;
            columns.factors.push(submit(&mut self.engine, |rec| DeviceFactor::upload(rec, host))?);
        }
        self.order_seconds += start.elapsed().as_secs_f64();
        Ok(columns)
    }

    fn linear(&mut self, checkpoint: &Checkpoint, block: &Block, linear: &Linear, shared: &Columns, heads: Heads<'_>) -> Result<()> {
        let mut measured: Vec<Measured> = self.bits.iter().map(|bits| Measured::new(block.index, linear, *bits)).collect();
        let w = checkpoint.linear(linear)?.to_f32();
        let cols = linear.d_in;
        match heads {
            Heads::None => self.rows(&Rows { w: &w, first: 0, cols, columns: shared, heads: None }, &mut measured)?,
            Heads::Rows { d_head, g } => {
                self.rows(&Rows { w: &w, first: 0, cols, columns: shared, heads: Some((d_head, g)) }, &mut measured)?;
            }
            Heads::Columns { d_head, h, g } => {
                for (head, (gram, w)) in h.iter().zip(w.chunks(d_head * cols)).enumerate() {
                    let columns = self.columns(gram)?;
                    let heads = g.map(|g| (d_head, &g[head * d_head * d_head..][..d_head * d_head]));
                    self.rows(&Rows { w, first: head * d_head, cols, columns: &columns, heads }, &mut measured)?;
                    columns.free(&mut self.engine)?;
                }
            }
        }
        for m in &measured {
            let [published, descent] = [PUBLISHED, DESCENT].map(|i| m.loss[i] / m.loss[GPTQ]);
            let seconds = m.seconds.iter().filter(|s| s.is_finite()).sum::<f64>();
            eprintln!(
                "block {} {:<4} {} bits: AdaRound 2000 {published:.4}, descent {descent:.4} ({seconds:.1} s)",
                m.block,
                m.role.to_string(),
                m.bits
            );
        }
        self.linears.extend(measured);
        Ok(())
    }

    /// Rounds some rows at every width by every chain; adds up in `measured`.
    fn rows(&mut self, rows: &Rows<'_>, measured: &mut [Measured]) -> Result<()> {
        let (n_rows, cols) = (rows.w.len() / rows.cols, rows.cols);
        let start = Instant::now();
        let v = rows.heads.map(|(d_head, g)| RowFactor::host(g, d_head, DAMPING).map(|v| (d_head, v))).transpose()?;
        self.factor_seconds += start.elapsed().as_secs_f64();
        let mut rec = Recording::new();
        let target = Mat::upload(&mut rec, "target", n_rows, cols, rows.w);
        let row_metric = rows.heads.map(|(d_head, g)| RowMetric::upload(&mut rec, d_head, g));
        let row_factor = v.as_ref().map(|(d_head, v)| RowFactor::upload(&mut rec, *d_head, v));
        self.engine.run(rec)?;
        for m in measured {
            let scheme = Scheme::new(m.bits, -1, false)?;
            let shape = GridShape { lattice: scheme.lattice(self.scale_dtype), rows: n_rows, cols };
            let objective = Objective { columns: &rows.columns.metric, rows: row_metric.as_ref() };
            let problem = Problem { shape, target, objective };
            let start = Instant::now();
            let grid = scale::search(&mut self.engine, ScaleRule::Metric, &shape, target, objective.columns)?;
            m.scale_seconds += start.elapsed().as_secs_f64();
            let mut work = Work { engine: &mut self.engine, problem, grid, factors: &rows.columns.factors, row_factor, first: rows.first };
            work.chains(&self.chosen, m)?;
            submit(&mut self.engine, |rec| grid.free(rec))?;
        }
        submit(&mut self.engine, |rec| {
            target.free(rec);
            if let Some(metric) = row_metric {
                metric.free(rec);
            }
            if let Some(factor) = row_factor {
                factor.free(rec);
            }
        })
    }
}

/// The metrics of a float block's heads, as published: `--metric attention`.
fn attention(
    engine: &mut dyn Engine,
    hidden: &HiddenStates,
    forward: &Forward<'_, f32>,
    device: &DeviceBlock,
    input: Gram,
) -> Result<AttentionMetric> {
    let (spec, limits) = (forward.spec(), engine.limits());
    let mut stats = submit(engine, |rec| AttentionStats::new(rec, spec, 1, limits))?;
    hidden.observe(engine, forward, device, 0..hidden.batches(), &mut stats, Input::Context)?;
    let mut rec = Recording::new();
    let pending = stats.download(&mut rec);
    let moments = pending.take(&mut engine.run(rec)?)?;
    let rope = RopeAverage::new(&spec.rope, spec.d_head, hidden.batch(0).seq_len);
    Ok(AttentionMetric::of(Metric::Attention, &[AttentionHalf { rows: moments.row_metric(Some(&rope)), moments, input }]))
}
