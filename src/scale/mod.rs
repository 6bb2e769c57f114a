//! The third choice of a method: the grid, one scale and zero point per output channel or per group of columns.
//!
//! - `minmax`: the range of the weights, nothing clipped.
//! - `mse`: the clip ratio with the least squared error of the weights.
//! - `metric`: the clip ratio with the least loss under the method's metric: a screen with diag(H) keeps the best few candidates,
//!   which are then scored with the full H (with groups: the group's own diagonal block, so that groups stay independent).
//! - `metric-two-sided`: as `metric`, but the two ends of the range are clipped by ratios of their own. With whole zero points the grids
//!   of one clip ratio are pairs (s, z) along a line; three screens, on the line and two codes to each side of it, cover a band of the
//!   plane, and the best of each are scored with the full H. The candidates of `metric` are among them, so none of its losses rises.
//!   At 2 bits the two zero points that `metric` tries are all that matter. Codes that are not the nearest compensate: after error
//!   feedback and descent the demo model's losses are within 0.2 % of those of `metric` either way.
//!
//! On lattices with minima the candidates are ranges clipped at either end by ratios of their own, each improved by a least squares fit.
//! Scales and minima are rounded to the type in which the file stores them before anything is measured; where a file stores them in whole
//! steps, the best grid of every group is found first, and then the steps (`steps`).
//! Cost per linear: one pass over W per candidate, and for `metric` `KEEP` products E H besides; three times that for
//! `metric-two-sided`.

mod steps;

use crate::Result;
use crate::engine::kernels::{self, minimum_search, scale_search};
use crate::engine::{Buffer, Engine, Mat, Recording, submit};
use crate::metric::ColumnMetric;
use crate::quant::{Grid, GridShape, HostGrid, Offset, subtract};
use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleRule {
    MinMax,
    Mse,
    Metric,
    MetricTwoSided,
}

/// Names, rules and what they do: the values of `--scale`.
pub static SCALE_RULES: &[(&str, ScaleRule, &str)] = &[
    ("minmax", ScaleRule::MinMax, "the range of the weights, nothing clipped"),
    ("mse", ScaleRule::Mse, "least squared error of the weights over clip ratios"),
    ("metric", ScaleRule::Metric, "least loss under the method's metric over clip ratios"),
    ("metric-two-sided", ScaleRule::MetricTwoSided, "as metric, the two ends of the range clipped by ratios of their own"),
];

/// Clip ratios that a search tries, and the smallest of them.
const RATIOS: u32 = 80;
const MIN_RATIO: f32 = 0.3;
/// Clips of either end that a search for minima tries, and what part of the range each takes off.
const CLIPS: u32 = 8;
const CLIP: f32 = 0.03;
/// Candidates that survive the screen with diag(H).
const KEEP: u32 = 6;
/// What screens add to the zero points, of which each tries two: together −2 to 3 from the rounded-down one. The
/// screen of `metric` is the first, so that it wins ties.
const ONE_SIDED: &[f32] = &[0.0];
const TWO_SIDED: &[f32] = &[0.0, -2.0, 2.0];

/// Finds the grid for the rows of `w` [rows, cols], f32 in natural order.
pub fn search(engine: &mut dyn Engine, rule: ScaleRule, shape: &GridShape, w: Mat<f32>, metric: &ColumnMetric) -> Result<Grid> {
    match rule {
        ScaleRule::MinMax => submit(engine, |rec| {
            let grid = candidates(rec, shape, w, metric.diag, 1, 1, 0.0);
            steps::counted(rec, shape, w, metric.diag, grid, false)
        }),
        ScaleRule::Mse => submit(engine, |rec| {
            let ones = rec.upload("weight", vec![1.0f32; shape.cols]);
            let grid = candidates(rec, shape, w, ones, RATIOS, 1, 0.0);
            let grid = steps::counted(rec, shape, w, ones, grid, true);
            rec.free(ones);
            grid
        }),
        ScaleRule::Metric | ScaleRule::MetricTwoSided => {
            // Zero points in the middle stay there, and minima are no whole steps of scales.
            let two_sided = rule == ScaleRule::MetricTwoSided && matches!(shape.lattice.offset, Offset::Zero { .. });
            let grid = best_of_screened(engine, shape, w, metric, if two_sided { TWO_SIDED } else { ONE_SIDED })?;
            submit(engine, |rec| steps::counted(rec, shape, w, metric.diag, grid, true))
        }
    }
}

/// Records the screen: the `keep` best grids by the weighted error, [keep, rows, n_group] each.
fn candidates(
    rec: &mut Recording<'_>,
    shape: &GridShape,
    w: Mat<f32>,
    weight: Buffer<f32>,
    n_ratio: u32,
    keep: u32,
    zero_shift: f32,
) -> Grid {
    let len = keep as usize * shape.scales();
    let (scale, zero, loss) = (rec.alloc("scale", len), rec.alloc("zero", len), rec.alloc("loss", len));
    let (rows, cols, ld) = (shape.rows as u32, shape.cols as u32, w.ld as u32);
    let (group, n_group) = (shape.group() as u32, shape.n_group() as u32);
    let (max_code, n_keep, scale_dtype) = (shape.lattice.max_code(), keep, shape.lattice.parameter_dtype().code());
    if shape.lattice.offset == Offset::Minimum {
        let n_clip = if n_ratio == 1 { 1 } else { CLIPS };
        let below_zero = u32::from(shape.lattice.steps.is_some());
        #[rustfmt::skip]
        let p = minimum_search::MinimumSearchParams {
            rows, cols, ld, group, n_group, max_code, n_clip, n_keep, scale_dtype, clip: CLIP, below_zero,
        };
        kernels::minimum_search(rec, p, w.buffer, weight, scale, zero, loss);
        rec.free(loss);
        return Grid::without_steps(scale, zero);
    }
    let p = scale_search::ScaleSearchParams {
        rows,
        cols,
        ld,
        group,
        n_group,
        max_code,
        symmetric: u32::from(shape.lattice.is_centred()),
        signed: u32::from(shape.lattice.offset == Offset::Signed),
        n_ratio,
        n_keep,
        scale_dtype,
        min_ratio: MIN_RATIO,
        zero_shift,
        zero_low: *shape.lattice.zeros().start() as f32,
    };
    kernels::scale_search(rec, p, w.buffer, weight, scale, zero, loss);
    rec.free(loss);
    Grid::without_steps(scale, zero)
}

/// The best under the full metric of what one screen per shift keeps.
fn best_of_screened(engine: &mut dyn Engine, shape: &GridShape, w: Mat<f32>, metric: &ColumnMetric, shifts: &[f32]) -> Result<Grid> {
    let len = shape.scales();
    let mut rec = Recording::new();
    let mut kept = Vec::new();
    for shift in shifts {
        let grid = candidates(&mut rec, shape, w, metric.diag, RATIOS, KEEP, *shift);
        kept.push(grid.download(&mut rec));
        grid.free(&mut rec);
    }
    let mut back = engine.run(rec)?;
    let (mut scale, mut zero): (Vec<f32>, Vec<f32>) = (Vec::new(), Vec::new());
    for pending in kept {
        let grid = pending.take(&mut back)?;
        scale.extend(grid.scale);
        zero.extend(grid.zero);
    }

    let mut rec = Recording::new();
    let mut losses = Vec::new();
    for (scale, zero) in scale.chunks(len).zip(zero.chunks(len)) {
        let grid = Grid::upload(&mut rec, HostGrid { scale: scale.to_vec(), zero: zero.to_vec(), steps: Vec::new() });
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
    submit(engine, |rec| Grid::upload(rec, HostGrid { scale, zero, steps: Vec::new() }))
}
