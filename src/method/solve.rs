//! One linear, from stored weights to codes: grid, rounding, and the comparison with round-to-nearest.
//!
//! Both results are scored by the method's own loss, row by row, and the better row is kept: a layer never ends worse than RTN on
//! its own objective. Rows are independent, so a weight that is split into row panels is solved panel by panel.

use super::Method;
use crate::calib::Gram;
use crate::engine::kernels::{self, pack_bits, select_rows};
use crate::engine::matrix::Panel;
use crate::engine::{Engine, Mat, Pending, Recording, Weight, submit};
use crate::metric::{ColumnMetric, Metric};
use crate::quant::{Grid, GridShape, PackedLinear, Scheme, subtract};
use crate::round::Rounding;
use crate::round::factor::{Factor, factor};
use crate::round::gptq::{DeviceFactor, gather};
use crate::scale::{self, ScaleRule};
use crate::tensor::Dtype;
use crate::{Error, Result};

/// What to solve for, the same for all linears of a run.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub method: Method,
    pub scheme: Scheme,
    pub scale_dtype: Dtype,
    pub act_order: bool,
    /// Added to the unit diagonal of the equilibrated metric.
    pub damping: f64,
}

/// The linears that read one input: their metric on the device, factored once.
pub struct Solver {
    settings: Settings,
    metric: ColumnMetric,
    factor: Option<(DeviceFactor, FactorRecord)>,
}

/// How the metric was factored: for the report.
#[derive(Clone, Copy, Debug)]
pub struct FactorRecord {
    pub damping: f64,
    pub raised: u32,
    pub dead: usize,
}

impl From<&Factor> for FactorRecord {
    fn from(f: &Factor) -> Self {
        Self { damping: f.damping, raised: f.raised, dead: f.dead }
    }
}

/// The result for one linear.
pub struct Solved {
    pub packed: PackedLinear,
    /// The quantized values on the device, in the panels of the original.
    pub w_hat: Weight,
    /// Loss of round-to-nearest on the min/max grid, and of the result; under the method's metric.
    pub loss_rtn: f64,
    pub loss: f64,
    /// Rows whose RTN codes were better and were kept.
    pub rows_from_rtn: usize,
}

/// Codes of one row panel, with their grid and the loss of each row.
struct Candidate {
    codes: Mat<u32>,
    scale: Vec<f32>,
    zero: Vec<f32>,
    loss: Vec<f32>,
}

/// A row panel's final result on the host.
struct PanelResult {
    words: Vec<u32>,
    scale: Vec<f32>,
    zero: Vec<f32>,
    w_hat: Mat<f32>,
    loss: f64,
    loss_rtn: f64,
    rows_from_rtn: usize,
}

impl Solver {
    /// Uploads the metric of an input of width `d` and factors it where the rounding needs that. `gram` is its statistic, if the
    /// method asked for one.
    pub fn new(engine: &mut dyn Engine, settings: Settings, d: usize, gram: Option<&Gram>) -> Result<Self> {
        let limits = engine.limits();
        let mut rec = Recording::new();
        let metric = match (settings.method.metric, gram) {
            (Metric::Identity, _) => ColumnMetric::identity(&mut rec, d),
            (Metric::Layer, Some(gram)) => ColumnMetric::layer(&mut rec, gram, limits),
            (Metric::Layer, None) => return Err(Error::internal("solver", "the method's statistics were not collected")),
        };
        let host = match (settings.method.rounding, gram) {
            (Rounding::Gptq, Some(gram)) => Some(factor(&gram.h, d, settings.act_order, settings.damping)?),
            (Rounding::Gptq, None) => return Err(Error::internal("solver", "GPTQ needs the layer's statistics")),
            (Rounding::Nearest, _) => None,
        };
        let factor = host.as_ref().map(|f| (DeviceFactor::upload(&mut rec, f), FactorRecord::from(f)));
        engine.run(rec)?;
        Ok(Self { settings, metric, factor })
    }

    pub fn factor_record(&self) -> Option<FactorRecord> {
        self.factor.as_ref().map(|(_, record)| *record)
    }

    pub fn free(self, engine: &mut dyn Engine) -> Result<()> {
        submit(engine, |rec| {
            self.metric.free(rec);
            if let Some((factor, _)) = self.factor {
                factor.free(rec);
            }
        })
    }

    /// Solves one linear whose stored weight is on the device.
    pub fn solve(&self, engine: &mut dyn Engine, weight: &Weight) -> Result<Solved> {
        let Settings { scheme, scale_dtype, .. } = self.settings;
        let (mut words, mut scales, mut zeros, mut mats) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut loss, mut loss_rtn, mut rows_from_rtn) = (0.0, 0.0, 0);
        for panel in &weight.panels {
            let result = self.panel(engine, panel, weight.cols)?;
            words.extend(result.words);
            scales.extend(result.scale);
            zeros.extend(result.zero.iter().map(|z| *z as u8));
            mats.push(result.w_hat);
            loss += result.loss;
            loss_rtn += result.loss_rtn;
            rows_from_rtn += result.rows_from_rtn;
        }
        let packed = PackedLinear::new(scheme, weight.rows, weight.cols, scale_dtype, words, scales, zeros)?;
        Ok(Solved { packed, w_hat: Weight::from_f32(&mats), loss_rtn, loss, rows_from_rtn })
    }

    fn panel(&self, engine: &mut dyn Engine, panel: &Panel, cols: usize) -> Result<PanelResult> {
        let Settings { method, scheme, scale_dtype, .. } = self.settings;
        let shape = GridShape { scheme, scale_dtype, rows: panel.rows, cols };
        let w = submit(engine, |rec| gather(rec, self.metric.natural, panel, cols))?;
        let rtn = self.candidate(engine, &shape, w, ScaleRule::MinMax, Rounding::Nearest)?;
        let result = if method.scale == ScaleRule::MinMax && method.rounding == Rounding::Nearest {
            self.finish(engine, &shape, &rtn, None)?
        } else {
            let better = self.candidate(engine, &shape, w, method.scale, method.rounding)?;
            let result = self.finish(engine, &shape, &better, Some(&rtn))?;
            submit(engine, |rec| better.codes.free(rec))?;
            result
        };
        submit(engine, |rec| {
            rtn.codes.free(rec);
            w.free(rec);
        })?;
        Ok(result)
    }

    /// Codes by one scale rule and one rounding, scored.
    fn candidate(&self, engine: &mut dyn Engine, shape: &GridShape, w: Mat<f32>, rule: ScaleRule, rounding: Rounding) -> Result<Candidate> {
        let grid = scale::search(engine, rule, shape, w, &self.metric)?;
        let mut rec = Recording::new();
        let (codes, w_hat) = match (rounding, &self.factor) {
            (Rounding::Gptq, Some((factor, _))) => {
                let codes = factor.round(&mut rec, shape, w, grid, None).into_codes(&mut rec);
                (codes, grid.dequantize(&mut rec, shape, codes))
            }
            _ => grid.nearest(&mut rec, shape, w),
        };
        let error = subtract(&mut rec, w_hat, w);
        let loss = self.metric.losses(&mut rec, error, shape.cols);
        error.free(&mut rec);
        let (scale, zero) = (rec.download(grid.scale), rec.download(grid.zero));
        let row_loss = rec.download(loss);
        rec.free(loss);
        grid.free(&mut rec);
        let mut back = engine.run(rec)?;
        let loss: Vec<f32> = back.take(row_loss)?;
        if loss.iter().any(|l| !l.is_finite()) {
            return Err(Error::numeric("layer loss", "is not finite: weights or statistics overflow f32"));
        }
        Ok(Candidate { codes, scale: back.take(scale)?, zero: back.take(zero)?, loss })
    }

    /// Takes the rows of `rtn` where they are better, packs, and makes the quantized values.
    fn finish(&self, engine: &mut dyn Engine, shape: &GridShape, chosen: &Candidate, rtn: Option<&Candidate>) -> Result<PanelResult> {
        let sum = |loss: &[f32]| loss.iter().map(|l| f64::from(*l)).sum::<f64>();
        let (mut scale, mut zero) = (chosen.scale.clone(), chosen.zero.clone());
        let (mut loss, mut rows_from_rtn) = (chosen.loss.clone(), 0);
        let mut rec = Recording::new();
        if let Some(rtn) = rtn {
            let n = shape.n_group();
            let pick: Vec<u32> = loss.iter().zip(&rtn.loss).map(|(own, rtn)| u32::from(rtn < own)).collect();
            for r in (0..shape.rows).filter(|r| pick[*r] != 0) {
                scale[r * n..(r + 1) * n].copy_from_slice(&rtn.scale[r * n..(r + 1) * n]);
                zero[r * n..(r + 1) * n].copy_from_slice(&rtn.zero[r * n..(r + 1) * n]);
                loss[r] = rtn.loss[r];
                rows_from_rtn += 1;
            }
            let pick = rec.upload("pick", pick);
            let p = select_rows::SelectRowsParams { rows: shape.rows as u32, ld: chosen.codes.ld as u32 };
            kernels::select_rows(&mut rec, p, pick, rtn.codes.buffer, chosen.codes.buffer);
            rec.free(pick);
        }
        let grid = Grid::upload(&mut rec, scale.clone(), zero.clone());
        let w_hat = grid.dequantize(&mut rec, shape, chosen.codes);
        grid.free(&mut rec);
        let words = pack(&mut rec, shape, chosen.codes);
        let mut back = engine.run(rec)?;
        let loss_rtn = sum(rtn.map_or(&chosen.loss, |rtn| &rtn.loss));
        Ok(PanelResult { words: back.take(words)?, scale, zero, w_hat, loss: sum(&loss), loss_rtn, rows_from_rtn })
    }
}

/// Records the packing of codes into a dense bit stream per row, and its read-back.
fn pack(rec: &mut Recording<'_>, shape: &GridShape, codes: Mat<u32>) -> Pending<u32> {
    let words = pack_bits::words_per_row(shape.cols, shape.scheme.bits as usize);
    let packed = rec.alloc("packed codes", shape.rows * words);
    let p = pack_bits::PackBitsParams {
        rows: shape.rows as u32,
        cols: shape.cols as u32,
        ld: codes.ld as u32,
        bits: shape.scheme.bits,
        words: words as u32,
    };
    kernels::pack_bits(rec, p, codes.buffer, packed);
    let pending = rec.download(packed);
    rec.free(packed);
    pending
}
