//! Grids per row and group: tries clip ratios of the group's range and keeps the best by Σ_j h_j (ŵ_j − w_j)².
//!
//! Asymmetric: lo = min(0, min w), hi = max(0, max w), s = ratio (hi − lo) / max_code, z = −ratio lo / s, rounded to nearest
//! when there is one ratio and tried both down and up otherwise, plus zero_shift: a shift clips the two ends by unequal ratios.
//! Symmetric: s = ratio max|w| / (max_code / 2), z = (max_code + 1) / 2, and −s where scales may be negative. Scales are rounded to the type in which they are stored before anything is measured.
//! h = 1 gives the MSE search, h = diag(H) the screen of the metric search, one ratio plain min/max.
//! A group of zeros gets s = 1.

use super::row_dot::check_groups;
use super::simd::{Loop, widest};
use super::stored::stored_scale;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// w [rows, ld], weight h [cols]; scale, zero, loss [n_keep, rows, n_group], best first, ties to the larger ratio.
    pub struct ScaleSearchParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
        pub group: u32,
        pub n_group: u32,
        pub max_code: u32,
        pub symmetric: u32,
        /// 1: symmetric grids may have negative scales, and both signs are tried.
        pub signed: u32,
        /// Clip ratios, from 1 down to `min_ratio` in equal steps; at most 128.
        pub n_ratio: u32,
        /// Grids to keep; at most 8 and at most the number of candidates.
        pub n_keep: u32,
        /// Type in which scales are stored: 0 f32, 1 f16, 2 bf16.
        pub scale_dtype: u32,
        pub min_ratio: f32,
        /// Whole number added to every zero point of an asymmetric grid before it is clamped.
        pub zero_shift: f32,
        /// The smallest zero point that an asymmetric grid may have; the largest is the largest code.
        pub zero_low: f32,
    }
}

/// Candidates per group at most: 128 ratios times two zero points.
pub const MAX_CANDIDATES: usize = 256;

impl ScaleSearchParams {
    /// Zero points or signs tried per ratio.
    fn n_zero(&self) -> u32 {
        let both = if self.symmetric != 0 { self.signed != 0 } else { self.n_ratio > 1 };
        if both { 2 } else { 1 }
    }

    pub fn candidates(&self) -> u32 {
        self.n_ratio * self.n_zero()
    }
}

impl Launch for ScaleSearchParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.rows as usize * self.n_group as usize)
    }

    fn cost(&self) -> Cost {
        Cost { flops: 8.0 * f64::from(self.rows) * f64::from(self.cols) * f64::from(self.candidates()) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_groups(self.cols, self.group, self.n_group)?;
        if !(0.0..=self.max_code as f32).contains(&self.zero_low) {
            return Err(format!("zero points from {}", self.zero_low));
        }
        if self.n_ratio == 0 || self.n_ratio > 128 || self.n_keep == 0 || self.n_keep > MAX_KEEP as u32 || self.n_keep > self.candidates() {
            return Err(format!("{} of {} candidates", self.n_keep, self.candidates()));
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

pub(super) fn native(p: &ScaleSearchParams, _: &Constants, w: &[f32], weight: &[f32], scale: &mut [f32], zero: &mut [f32], loss: &mut [f32]) {
    let (rows, cols, ld) = (p.rows as usize, p.cols as usize, p.ld as usize);
    let (group, n_group, n_keep) = (p.group as usize, p.n_group as usize, p.n_keep as usize);
    let found: Vec<[Candidate; MAX_KEEP]> = (0..rows * n_group)
        .into_par_iter()
        .map(|at| {
            let (r, g) = (at / n_group, at % n_group);
            let columns = g * group..((g + 1) * group).min(cols);
            widest(Search { p, w: &w[r * ld..][columns.clone()], weight: &weight[columns], n_keep })
        })
        .collect();
    for (at, best) in found.iter().enumerate() {
        for (keep, c) in best.iter().take(n_keep).enumerate() {
            let i = keep * rows * n_group + at;
            (scale[i], zero[i], loss[i]) = (c.scale, c.zero, c.loss);
        }
    }
}

/// Candidates of a group that can be kept.
const MAX_KEEP: usize = 8;

#[derive(Clone, Copy)]
struct Candidate {
    scale: f32,
    zero: f32,
    loss: f32,
}

/// One group of one row.
struct Search<'a> {
    p: &'a ScaleSearchParams,
    w: &'a [f32],
    weight: &'a [f32],
    n_keep: usize,
}

impl Loop for Search<'_> {
    type Output = [Candidate; MAX_KEEP];

    /// The best candidates, best first; of equal ones the one that comes first.
    #[inline(always)]
    fn call(self) -> [Candidate; MAX_KEEP] {
        let Search { p, w, weight, n_keep } = self;
        let (lo, hi) = w.iter().fold((0.0f32, 0.0f32), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
        let mut best = [Candidate { scale: 1.0, zero: 0.0, loss: f32::INFINITY }; MAX_KEEP];
        let mut kept = 0;
        for index in 0..p.candidates() {
            let (scale, zero) = grid_of(p, lo, hi, index);
            let loss = weighted_error(w, weight, scale, zero, p.max_code as f32);
            let place = best[..kept].partition_point(|better| better.loss.total_cmp(&loss).is_le());
            if place < n_keep {
                kept = (kept + 1).min(n_keep);
                best.copy_within(place..kept - 1, place + 1);
                best[place] = Candidate { scale, zero, loss };
            }
        }
        best
    }
}

/// Scale and zero point of candidate `index` for a group with values in [lo, hi].
#[inline(always)]
fn grid_of(p: &ScaleSearchParams, lo: f32, hi: f32, index: u32) -> (f32, f32) {
    let max = p.max_code as f32;
    let n_zero = p.n_zero();
    let step = if p.n_ratio > 1 { (1.0 - p.min_ratio) / (p.n_ratio - 1) as f32 } else { 0.0 };
    let ratio = 1.0 - (index / n_zero) as f32 * step;
    let range = if p.symmetric != 0 { 2.0 * hi.max(-lo) } else { hi - lo };
    let scale = if range > 0.0 { stored_scale(ratio * range / max, p.scale_dtype) } else { 1.0 };
    if p.symmetric != 0 {
        let sign = if p.signed != 0 && index % 2 == 1 { -1.0 } else { 1.0 };
        return (sign * scale, (max + 1.0) / 2.0);
    }
    let exact = -ratio * lo / scale;
    let zero = if n_zero == 1 { exact.round_ties_even() } else { exact.floor() + (index % n_zero) as f32 };
    (scale, (zero + p.zero_shift).clamp(p.zero_low, max))
}

#[inline(always)]
fn weighted_error(w: &[f32], weight: &[f32], scale: f32, zero: f32, max_code: f32) -> f32 {
    let grid = (scale, scale.recip(), zero, max_code);
    let mut lanes = [0.0f32; 32];
    let ((cw, rest_w), (ch, rest_h)) = (w.as_chunks::<32>(), weight.as_chunks::<32>());
    for (w, h) in cw.iter().zip(ch) {
        for i in 0..32 {
            lanes[i] += squared_error(w[i], h[i], grid);
        }
    }
    let mut tail = 0.0;
    for (w, h) in rest_w.iter().zip(rest_h) {
        tail += squared_error(*w, *h, grid);
    }
    // In a tree: one after the other would take longer than the elements.
    for half in [16, 8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0] + tail
}

#[inline(always)]
fn squared_error(w: f32, h: f32, (scale, inverse, zero, max_code): (f32, f32, f32, f32)) -> f32 {
    // Exact, as all three are small whole numbers or halves: q − zero is the rounded value, clamped.
    let steps = (w * inverse).round_ties_even().max(-zero).min(max_code - zero);
    let e = scale * steps - w;
    h * e * e
}
