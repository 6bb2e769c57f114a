//! The third choice of a method: the grid, one scale and zero point per output channel or per group of columns.
//!
//! - `minmax`: the range of the weights, nothing clipped.
//! - `mse`: the clip ratio with the least squared error of the weights.
//! - `metric`: the clip ratio with the least loss under the method's metric: a screen with diag(H) keeps the best few candidates,
//!   which are then scored with the full H (with groups: the group's own diagonal block, so that groups stay independent).
//!
//! Scales are rounded to the type in which the file stores them before anything is measured.
//! Cost per linear: one pass over W per candidate, and for `metric` `KEEP` products E H besides.

use crate::Result;
use crate::engine::kernels::{self, scale_search};
use crate::engine::{Buffer, Engine, Mat, Recording, submit};
use crate::metric::ColumnMetric;
use crate::quant::{Grid, GridShape, subtract};
use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleRule {
    MinMax,
    Mse,
    Metric,
}

/// Names, rules and what they do: the values of `--scale`.
pub static SCALE_RULES: &[(&str, ScaleRule, &str)] = &[
    ("minmax", ScaleRule::MinMax, "the range of the weights, nothing clipped"),
    ("mse", ScaleRule::Mse, "least squared error of the weights over clip ratios"),
    ("metric", ScaleRule::Metric, "least loss under the method's metric over clip ratios"),
];

/// Clip ratios that a search tries, and the smallest of them.
const RATIOS: u32 = 80;
const MIN_RATIO: f32 = 0.3;
/// Candidates that survive the screen with diag(H).
const KEEP: u32 = 6;

/// Finds the grid for the rows of `w` [rows, cols], f32 in natural order.
pub fn search(engine: &mut dyn Engine, rule: ScaleRule, shape: &GridShape, w: Mat<f32>, metric: &ColumnMetric) -> Result<Grid> {
    match rule {
        ScaleRule::MinMax => submit(engine, |rec| candidates(rec, shape, w, metric.diag, 1, 1)),
        ScaleRule::Mse => submit(engine, |rec| {
            let ones = rec.upload("weight", vec![1.0f32; shape.cols]);
            let grid = candidates(rec, shape, w, ones, RATIOS, 1);
            rec.free(ones);
            grid
        }),
        ScaleRule::Metric => best_of_screened(engine, shape, w, metric),
    }
}

/// Records the screen: the `keep` best grids by the weighted error, [keep, rows, n_group] each.
fn candidates(rec: &mut Recording<'_>, shape: &GridShape, w: Mat<f32>, weight: Buffer<f32>, n_ratio: u32, keep: u32) -> Grid {
    let len = keep as usize * shape.scales();
    let (scale, zero, loss) = (rec.alloc("scale", len), rec.alloc("zero", len), rec.alloc("loss", len));
    let p = scale_search::ScaleSearchParams {
        rows: shape.rows as u32,
        cols: shape.cols as u32,
        ld: w.ld as u32,
        group: shape.group() as u32,
        n_group: shape.n_group() as u32,
        max_code: shape.scheme.max_code(),
        symmetric: u32::from(shape.scheme.symmetric),
        n_ratio,
        n_keep: keep,
        scale_dtype: shape.scale_dtype.code(),
        min_ratio: MIN_RATIO,
    };
    kernels::scale_search(rec, p, w.buffer, weight, scale, zero, loss);
    rec.free(loss);
    Grid { scale, zero }
}

fn best_of_screened(engine: &mut dyn Engine, shape: &GridShape, w: Mat<f32>, metric: &ColumnMetric) -> Result<Grid> {
    let len = shape.scales();
    let mut rec = Recording::new();
    let kept = candidates(&mut rec, shape, w, metric.diag, RATIOS, KEEP);
    let (scale, zero) = (rec.download(kept.scale), rec.download(kept.zero));
    kept.free(&mut rec);
    let mut back = engine.run(rec)?;
    let (scale, zero) = (back.take(scale)?, back.take(zero)?);

    let mut rec = Recording::new();
    let mut losses = Vec::new();
    for (scale, zero) in scale.chunks(len).zip(zero.chunks(len)) {
        let grid = Grid::upload(&mut rec, scale.to_vec(), zero.to_vec());
        let (codes, w_hat) = grid.nearest(&mut rec, shape, w);
        codes.free(&mut rec);
        let error = subtract(&mut rec, w_hat, w);
        let loss = metric.losses(&mut rec, error, shape.group());
        error.free(&mut rec);
        losses.push(rec.download(loss));
        rec.free(loss);
        grid.free(&mut rec);
    }
    let mut back = engine.run(rec)?;
    let losses = losses.into_iter().map(|l| back.take(l)).collect::<Result<Vec<_>>>()?;

    let best = (0..len).map(|i| (0..losses.len()).min_by(|a, b| losses[*a][i].total_cmp(&losses[*b][i])).unwrap_or(0));
    let (scale, zero): (Vec<f32>, Vec<f32>) = best.enumerate().map(|(i, k)| (scale[k * len + i], zero[k * len + i])).unzip();
    submit(engine, |rec| Grid::upload(rec, scale, zero))
}
