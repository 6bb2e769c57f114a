//! The factors of one fold: zeta > 0, one per channel of the source, shared by all readers of the channels.
//!
//! With W' = W / zeta, H' = zeta H zeta, and U = s (q − z) the nearest values to W' on the grids of the scale search, the loss is
//!   L = Σ_n tr((U_n zeta − W_n) H_n (U_n zeta − W_n)ᵀ) = Σ_n tr(E_n H'_n E_nᵀ),  E_n = U_n − W'_n,
//! n over the readers (or, for V, over the heads of a reader that have an H of their own). In turns: grids and codes for the zeta
//! that we have, then a factor delta on top of it for codes and grids that stay: see [`super::system`].
//!
//! A step that does not lower L is halved (geometrically) until it does or is small. The result is never worse than zeta = 1.
//!
//! Cost per turn: a scale search, 3 rows d² flops (Uᵀ U and E H), d³/3 in f64 on the host, d² floats to the device and back.

use super::system::{Sums, System, Vectors};
use super::{ZetaRule, ZfoldOptions};
use crate::calib::Gram;
use crate::engine::kernels::{self, column_dot, gram, rescale, row_dot};
use crate::engine::matrix::StoredPanel;
use crate::engine::panels::PendingPanels;
use crate::engine::{Buffer, Downloads, Engine, Limits, Mat, Panels, Pending, Recording, submit};
use crate::metric::ColumnMetric;
use crate::quant::{GridShape, Lattice, subtract};
use crate::scale::ScaleRule;
use crate::tensor::Dtype;
use crate::{Error, Result, interrupt, scale};
use rayon::prelude::*;

/// Factors stay in [1 / LIMIT, LIMIT]: activations of 16 bits have no room for more, and beyond it a column is lost anyway.
const LIMIT: f64 = 8.0;
/// A turn that gains less than this share of the loss is the last one.
const GAIN: f64 = 1e-4;
/// The smallest power of a step that is tried.
const MIN_POWER: f64 = 0.125;

/// Rows of a reader that share an H.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    /// Rows `row0..row0 + rows` of this panel, which has row stride `ld`.
    pub panel: StoredPanel,
    pub ld: usize,
    pub row0: usize,
    pub rows: usize,
}

/// The rows of all readers under one H.
#[derive(Debug)]
pub(super) struct Readers<'a> {
    pub gram: &'a Gram,
    /// Each with what its groups will be rounded to.
    pub parts: Vec<(Part, Lattice)>,
}

/// Which factors a file can hold.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stored<'a> {
    /// Any: they go into weights that are quantized afterwards.
    Any,
    /// Those by which these gains, one per channel, become gains of the same type.
    Gains { gains: &'a [f32], dtype: Dtype },
}

impl Stored<'_> {
    /// The gains times `zeta`, as stored; `zeta` becomes what that really multiplies by, 1 where the product is no positive number.
    fn round(self, zeta: &mut [f32]) {
        let Stored::Gains { gains, dtype } = self else { return };
        for (z, gain) in zeta.iter_mut().zip(gains) {
            let effective = (f64::from(dtype.round(gain * *z)) / f64::from(*gain)) as f32;
            *z = if effective.is_normal() && effective > 0.0 { effective } else { 1.0 };
        }
    }
}

/// One fold.
#[derive(Debug)]
pub(super) struct Search<'a> {
    pub rule: ScaleRule,
    pub readers: Vec<Readers<'a>>,
    /// The source's channel that each column of the readers comes from.
    pub channel: Vec<usize>,
    pub n_channel: usize,
    pub stored: Stored<'a>,
}

/// The best factors, one per channel, and the way there.
#[derive(Debug)]
pub(super) struct Found {
    pub zeta: Vec<f32>,
    pub iterations: u32,
    pub loss_before: f64,
    pub loss_after: f64,
}

/// What is known of some factors: the loss with the best grids, and the next step.
struct Measured {
    loss: f64,
    delta: Vec<f64>,
}

impl Search<'_> {
    pub(super) fn run(&self, engine: &mut dyn Engine, options: &ZfoldOptions) -> Result<Found> {
        let mut zeta = vec![1.0f32; self.n_channel];
        let mut best = self.measure(engine, options.rule, &zeta)?;
        let loss_before = best.loss;
        let (mut iterations, mut power) = (0, 1.0);
        while iterations < options.iterations {
            let mut next = stepped(&zeta, &best.delta, power);
            self.stored.round(&mut next);
            if next == zeta {
                break;
            }
            iterations += 1;
            let now = self.measure(engine, options.rule, &next)?;
            if now.loss < best.loss {
                let last = now.loss > (1.0 - GAIN) * best.loss;
                (zeta, best) = (next, now);
                if last {
                    break;
                }
            } else if power > MIN_POWER {
                power /= 2.0;
            } else {
                break;
            }
        }
        Ok(Found { zeta, iterations, loss_before, loss_after: best.loss })
    }

    fn cols(&self) -> usize {
        self.channel.len()
    }

    fn measure(&self, engine: &mut dyn Engine, rule: ZetaRule, zeta: &[f32]) -> Result<Measured> {
        let columns: Vec<f32> = self.channel.iter().map(|c| zeta[*c]).collect();
        let mut system = System::new(rule, self.n_channel);
        let mut loss = 0.0;
        for readers in &self.readers {
            interrupt::check()?;
            let mut scaled = readers.gram.clone();
            rescale_gram(&mut scaled, &columns);
            let (part_loss, sums) = self.measure_readers(engine, rule, readers, &scaled, &columns)?;
            loss += part_loss;
            system.add(&scaled, &sums, &self.channel);
        }
        if !loss.is_finite() {
            return Err(Error::numeric("loss of a fold", "is not finite: weights or statistics overflow f32"));
        }
        Ok(Measured { loss, delta: system.solve()? })
    }

    /// Grids, codes, loss and sums over the rows that share `scaled` (H').
    fn measure_readers(
        &self,
        engine: &mut dyn Engine,
        rule: ZetaRule,
        readers: &Readers<'_>,
        scaled: &Gram,
        columns: &[f32],
    ) -> Result<(f64, Sums)> {
        let limits = engine.limits();
        let inverse: Vec<f32> = columns.iter().map(|z| z.recip()).collect();
        let (metric, inverse, sums) = submit(engine, |rec| {
            let metric = ColumnMetric::layer(rec, scaled.clone(), 0.0, limits);
            (metric, rec.upload("factors", inverse), DeviceSums::new(rec, rule, self.cols(), limits))
        })?;
        let mut loss = 0.0;
        for (part, lattice) in &readers.parts {
            let w = submit(engine, |rec| rescaled(rec, part, None, inverse, self.cols()))?;
            let shape = GridShape { lattice: *lattice, rows: part.rows, cols: self.cols() };
            let grid = scale::search(engine, self.rule, &shape, w, &metric)?;
            let mut rec = Recording::new();
            let (codes, u) = grid.nearest(&mut rec, &shape, w);
            codes.free(&mut rec);
            grid.free(&mut rec);
            let losses = sums.add(&mut rec, &metric, w, u);
            u.free(&mut rec);
            w.free(&mut rec);
            loss += engine.run(rec)?.take(losses)?.into_iter().map(f64::from).sum::<f64>();
        }
        let mut rec = Recording::new();
        let pending = sums.download(&mut rec);
        metric.free(&mut rec);
        rec.free(inverse);
        Ok((loss, pending.take(&mut engine.run(rec)?)?))
    }
}

/// zeta · delta^power, its geometric mean 1, within the limits. A factor that all channels share only moves into the scales: without
/// the normalisation it would grow from turn to turn.
fn stepped(zeta: &[f32], delta: &[f64], power: f64) -> Vec<f32> {
    let logs: Vec<f64> = zeta.iter().zip(delta).map(|(z, d)| f64::from(*z).ln() + power * d.ln()).collect();
    let mean = logs.iter().sum::<f64>() / logs.len().max(1) as f64;
    logs.into_iter().map(|l| (l - mean).exp().clamp(1.0 / LIMIT, LIMIT) as f32).collect()
}

/// Records rows of a weight as f32 with a factor on each row (`None`: 1) and each column.
pub(super) fn rescaled(rec: &mut Recording<'_>, part: &Part, rows: Option<Vec<f32>>, columns: Buffer<f32>, cols: usize) -> Mat<f32> {
    let out = Mat::alloc(rec, "rewritten weight", part.rows, cols);
    let rows = rec.upload("factors", rows.unwrap_or_else(|| vec![1.0; part.rows]));
    let p = rescale::RescaleParams {
        rows: part.rows as u32,
        cols: cols as u32,
        row0: part.row0 as u32,
        ld_source: part.ld as u32,
        ld_out: out.ld as u32,
    };
    kernels::rescale(rec, p, rows, columns, part.panel.buffer, out.buffer);
    rec.free(rows);
    out
}

/// H of an input whose channels are multiplied by `factors`: f_i H_ij f_j.
pub(super) fn rescale_gram(gram: &mut Gram, factors: &[f32]) {
    gram.h.par_chunks_mut(gram.d.max(1)).zip(factors).for_each(|(row, f)| {
        row.iter_mut().zip(factors).for_each(|(h, g)| *h *= f * g);
    });
}

/// Sums over the rows of U on the device.
struct DeviceSums {
    rule: ZetaRule,
    /// Uᵀ U, lower triangle. Weighted only.
    products: Panels,
    vectors: Vectors<Buffer<f32>>,
}

struct PendingSums {
    products: PendingPanels,
    vectors: Vectors<Pending<f32>>,
}

impl DeviceSums {
    fn new(rec: &mut Recording<'_>, rule: ZetaRule, d: usize, limits: Limits) -> Self {
        let products = match rule {
            ZetaRule::Plain => Panels::default(),
            ZetaRule::Weighted => Panels::zeros(rec, "products of columns", [d, d], limits),
        };
        let vectors = Vectors { overlap: rec.zeros("column sums", d), second: rec.zeros("column sums", d) };
        Self { rule, products, vectors }
    }

    /// Records the sums over the rows of `u` and the loss of each row; W' in `w` is overwritten.
    fn add(&self, rec: &mut Recording<'_>, metric: &ColumnMetric, w: Mat<f32>, u: Mat<f32>) -> Pending<f32> {
        let (rows, cols, ld) = (u.rows as u32, u.cols as u32, u.ld as u32);
        let dots = column_dot::ColumnDotParams { rows, cols, ld };
        // W' − U = −E.
        let error = subtract(rec, w, u);
        let eh = metric.times(rec, error);
        kernels::column_dot(rec, dots, error.buffer, u.buffer, self.vectors.overlap);
        let other = match self.rule {
            ZetaRule::Plain => u.buffer,
            ZetaRule::Weighted => eh.buffer,
        };
        kernels::column_dot(rec, dots, other, u.buffer, self.vectors.second);
        for panel in self.products.iter() {
            let (row0, panel_rows, ldg) = (panel.start as u32, panel.mat.rows as u32, panel.mat.ld as u32);
            let p = gram::GramParams { n_tok: rows, d: cols, ldx: ld, ldg, row0, rows: panel_rows, g_row: 0 };
            kernels::gram(rec, p, u.buffer, panel.mat.buffer);
        }
        let losses = rec.alloc("loss", u.rows);
        let p = row_dot::RowDotParams { rows, cols, ld, group: cols.max(1), n_group: 1 };
        kernels::row_dot(rec, p, eh.buffer, error.buffer, losses);
        let pending = rec.download(losses);
        eh.free(rec);
        rec.free(losses);
        pending
    }

    fn download(self, rec: &mut Recording<'_>) -> PendingSums {
        let Vectors { overlap, second } = self.vectors;
        let products = self.products.download(rec);
        let vectors = Vectors { overlap: rec.download(overlap), second: rec.download(second) };
        self.products.free(rec);
        rec.free(overlap);
        rec.free(second);
        PendingSums { products, vectors }
    }
}

impl PendingSums {
    fn take(self, downloads: &mut Downloads) -> Result<Sums> {
        let products = self.products.take(downloads)?;
        let vectors = Vectors { overlap: downloads.take(self.vectors.overlap)?, second: downloads.take(self.vectors.second)? };
        Ok(Sums { products, vectors })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gains_stay_representable_and_factors_tell_what_they_do() {
        let gains = [1.0f32, 0.0, 0.337, 60000.0, 1e-7, -0.5];
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let gains: Vec<f32> = gains.iter().map(|g| dtype.round(*g)).collect();
            let mut zeta = [1.2345f32, 2.0, 0.777, 4.0, 3.0, 1.1];
            Stored::Gains { gains: &gains, dtype }.round(&mut zeta);
            for (z, g) in zeta.iter().zip(&gains) {
                let product = f64::from(*z) * f64::from(*g);
                let stored = f64::from(dtype.round(product as f32));
                assert!(*z > 0.0 && z.is_finite() && (product - stored).abs() <= 1e-7 * product.abs(), "{dtype} {g} {z}");
            }
            assert_eq!(zeta[1], 1.0);
        }
    }
}
