//! Grids with a stored minimum per row and group: ŵ = s q + m. Tries ranges whose two ends are clipped apart, improves each by the best
//! s and m for its codes, and keeps the best by Σ_j h_j (ŵ_j − w_j)².
//!
//! Candidate (i, j): low = lo + i clip (hi − lo), high = hi − j clip (hi − lo), s = (high − low) / max_code, m = low. With more than one
//! candidate the codes q of that grid give, in closed form, the s and m with the least Σ h (s q + m − w)², which take its place. s is
//! rounded to the type in which it is stored, then m, found anew for the rounded s, is rounded too; losses are those of nearest codes on
//! the rounded grid. s is at least 2^−14 of the group's largest weight: a group of nearly equal weights would otherwise have zero points
//! z = −m / s that f32 cannot tell apart. What is returned is s and z.

use super::row_dot::check_groups;
use super::simd::{Loop, widest};
use super::stored::{smallest, stored_minimum, stored_scale};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// w [rows, ld], weight h [cols]; scale, zero, loss [n_keep, rows, n_group], best first, ties to the lower index.
    pub struct MinimumSearchParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
        /// Columns, at most `MAX_GROUP`.
        pub group: u32,
        pub n_group: u32,
        pub max_code: u32,
        /// Clips of each end, at most 8.
        pub n_clip: u32,
        /// Grids to keep; at most 8 and at most the number of candidates.
        pub n_keep: u32,
        /// Type in which scales and minima are stored: 0 f32, 1 f16, 2 bf16.
        pub scale_dtype: u32,
        /// Part of the range that one more clip takes off an end.
        pub clip: f32,
        /// 1: no minimum may be above 0.
        pub below_zero: u32,
    }
}

pub const MAX_GROUP: u32 = 256;
/// Steps of a group's largest weight that there are at most.
const MAX_STEPS: f32 = 16384.0;

impl Launch for MinimumSearchParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.rows as usize * self.n_group as usize)
    }

    fn cost(&self) -> Cost {
        Cost { flops: 20.0 * f64::from(self.rows) * f64::from(self.cols) * f64::from(self.n_clip * self.n_clip) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_groups(self.cols, self.group, self.n_group)?;
        if self.group > MAX_GROUP {
            return Err(format!("groups of {} columns; at most {MAX_GROUP}", self.group));
        }
        if self.n_clip == 0 || self.n_clip > 8 || self.n_keep == 0 || self.n_keep > 8 || self.n_keep > self.n_clip * self.n_clip {
            return Err(format!("{} of {} clips", self.n_keep, self.n_clip));
        }
        within("w", self.cols, self.ld)?;
        let grids = self.n_keep as usize * self.rows as usize * self.n_group as usize;
        need("w", len[0], self.rows as usize * self.ld as usize)?;
        need("weight", len[1], self.cols as usize)?;
        need("scale", len[2], grids)?;
        need("zero", len[3], grids)?;
        need("loss", len[4], grids)
    }
}

pub(super) fn native(
    p: &MinimumSearchParams,
    _: &Constants,
    w: &[f32],
    weight: &[f32],
    scale: &mut [f32],
    zero: &mut [f32],
    loss: &mut [f32],
) {
    let (rows, cols, ld) = (p.rows as usize, p.cols as usize, p.ld as usize);
    let (group, n_group) = (p.group as usize, p.n_group as usize);
    let found: Vec<Vec<Candidate>> = (0..rows * n_group)
        .into_par_iter()
        .map(|at| {
            let (r, g) = (at / n_group, at % n_group);
            let columns = g * group..((g + 1) * group).min(cols);
            widest(Search { p, w: &w[r * ld..][columns.clone()], weight: &weight[columns] })
        })
        .collect();
    for (at, best) in found.iter().enumerate() {
        for (keep, c) in best.iter().enumerate() {
            let i = keep * rows * n_group + at;
            (scale[i], zero[i], loss[i]) = (c.scale, -c.minimum / c.scale, c.loss);
        }
    }
}

#[derive(Clone, Copy)]
struct Candidate {
    scale: f32,
    minimum: f32,
    loss: f32,
}

/// One group of one row.
struct Search<'a> {
    p: &'a MinimumSearchParams,
    w: &'a [f32],
    weight: &'a [f32],
}

impl Loop for Search<'_> {
    type Output = Vec<Candidate>;

    /// The best candidates, best first.
    #[inline(always)]
    fn call(self) -> Vec<Candidate> {
        let Search { p, w, weight } = self;
        let (lo, hi) = w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
        let ceiling = if p.below_zero != 0 { 0.0 } else { f32::INFINITY };
        let lo = lo.min(ceiling);
        let (max, least) = (p.max_code as f32, (hi.abs().max(lo.abs()) / MAX_STEPS).max(smallest(p.scale_dtype)));
        let mut all = Vec::with_capacity((p.n_clip * p.n_clip) as usize);
        for index in 0..p.n_clip * p.n_clip {
            let unit = p.clip * (hi - lo);
            let low = lo + (index / p.n_clip) as f32 * unit;
            let high = hi - (index % p.n_clip) as f32 * unit;
            let mut scale = ((high - low) / max).max(least);
            let mut minimum = low;
            if p.n_clip > 1 {
                let sums = sums(w, weight, Grid { scale, minimum }, max);
                scale = stored_scale(sums.scale().unwrap_or(scale).max(least), p.scale_dtype);
                minimum = sums.minimum(scale).unwrap_or(minimum);
            } else {
                scale = stored_scale(scale, p.scale_dtype);
            }
            minimum = stored_minimum(minimum.min(ceiling), p.scale_dtype);
            all.push(Candidate { scale, minimum, loss: weighted_error(w, weight, Grid { scale, minimum }, max) });
        }
        all.sort_by(|a, b| a.loss.total_cmp(&b.loss));
        all.truncate(p.n_keep as usize);
        all
    }
}

/// Of weights and the codes of a grid: Σh, Σhq, Σhq², Σhw, Σhqw.
pub(super) struct Sums([f32; 5]);

impl Sums {
    /// The best scale for the codes, if there is one.
    #[inline(always)]
    fn scale(&self) -> Option<f32> {
        let [h, hq, hqq, hw, hqw] = self.0;
        let (det, slope) = (h * hqq - hq * hq, h * hqw - hq * hw);
        // Codes that are all alike say nothing about the scale.
        (det > 1e-6 * h * hqq && slope > 0.0).then(|| slope / det)
    }

    /// The best minimum for the codes and a scale.
    #[inline(always)]
    pub(super) fn minimum(&self, scale: f32) -> Option<f32> {
        let [h, hq, _, hw, _] = self.0;
        (h > 0.0).then(|| (hw - scale * hq) / h)
    }
}

const LANES: usize = 16;

/// s q + m.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub scale: f32,
    pub minimum: f32,
}

#[inline(always)]
pub(super) fn sums(w: &[f32], weight: &[f32], Grid { scale, minimum }: Grid, max: f32) -> Sums {
    let mut lanes = [[0.0f32; LANES]; 5];
    for (w, h) in w.chunks(LANES).zip(weight.chunks(LANES)) {
        for (lane, (w, h)) in w.iter().zip(h).enumerate() {
            let q = ((w - minimum) / scale).round_ties_even().max(0.0).min(max);
            for (sum, part) in lanes.iter_mut().zip([*h, h * q, h * q * q, h * w, h * q * w]) {
                sum[lane] += part;
            }
        }
    }
    Sums(lanes.map(|lanes| lanes.iter().sum()))
}

#[inline(always)]
pub(super) fn weighted_error(w: &[f32], weight: &[f32], Grid { scale, minimum }: Grid, max: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for (w, h) in w.chunks(LANES).zip(weight.chunks(LANES)) {
        for (lane, (w, h)) in w.iter().zip(h).enumerate() {
            let q = ((w - minimum) / scale).round_ties_even().max(0.0).min(max);
            let e = scale * q + (minimum - w);
            lanes[lane] += h * e * e;
        }
    }
    lanes.iter().sum()
}
