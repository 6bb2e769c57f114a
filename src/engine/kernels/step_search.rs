//! Free grids to grids of two levels, per row and super-block: scales become whole numbers of a step that the groups of a super-block share,
//! minima minus whole numbers of another one.
//!
//! `n_try` steps around (largest |s| of a group that is not all zeros, which any s gives) / count_high are tried, try t being
//! (1 + spread (t − n_try / 2) / (n_try / 2)) times that, rounded to its type: every scale becomes the nearest count of the step that is not 0 and has its sign, every minimum the best one for the codes that
//! then are nearest; the step with the least Σ_j h_j (ŵ_j − w_j)² over the super-block is kept. Then, where minima are stored, their step is
//! found in the same way from (largest −m) / count_high, with the scales as they now are. With one try minima are not fitted.

use super::minimum_search::{Grid, sums, weighted_error};
use super::row_dot::check_groups;
use super::scale_refit::{StoredScale, steps_needed};
use super::simd::{Loop, widest};
use super::stored::stored_step;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// w [rows, ld], weight h [cols]; scale, zero [rows, n_group], replaced; steps [rows, n_super, 2], of scales and of minima, the latter 0
    /// where there are none.
    pub struct StepSearchParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
        pub group: u32,
        pub n_group: u32,
        /// Groups of a super-block, at most `MAX_GROUPS`, of at most `MAX_COLUMNS` columns.
        pub per_super: u32,
        pub max_code: u32,
        /// 1: minima are stored and at most 0; else zero points are in the middle.
        pub minima: u32,
        /// Steps to try, at most `MAX_TRIES`.
        pub n_try: u32,
        /// Type in which steps are stored: 0 f32, 1 f16, 2 bf16.
        pub step_dtype: u32,
        /// Counts of steps that scales may have. Minima have 0 to count_high.
        pub count_low: f32,
        pub count_high: f32,
        pub spread: f32,
    }
}

pub const MAX_GROUPS: u32 = 16;
pub const MAX_COLUMNS: u32 = 256;
pub const MAX_TRIES: u32 = 16;

impl Launch for StepSearchParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.rows as usize * self.n_group.div_ceil(self.per_super.max(1)) as usize)
    }

    fn cost(&self) -> Cost {
        let passes = if self.minima != 0 { 30.0 } else { 10.0 };
        Cost { flops: passes * f64::from(self.rows) * f64::from(self.cols) * f64::from(self.n_try) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_groups(self.cols, self.group, self.n_group)?;
        if !(1..=MAX_GROUPS).contains(&self.per_super) || self.per_super * self.group > MAX_COLUMNS {
            return Err(format!("super-blocks of {} groups of {}", self.per_super, self.group));
        }
        if !(1..=MAX_TRIES).contains(&self.n_try) {
            return Err(format!("{} tries", self.n_try));
        }
        within("w", self.cols, self.ld)?;
        let grids = self.rows as usize * self.n_group as usize;
        need("w", len[0], self.rows as usize * self.ld as usize)?;
        need("weight", len[1], self.cols as usize)?;
        need("scale", len[2], grids)?;
        need("zero", len[3], grids)?;
        need("steps", len[4], steps_needed(self.rows, self.n_group, self.per_super))
    }
}

pub(super) fn native(
    p: &StepSearchParams,
    _: &Constants,
    w: &[f32],
    weight: &[f32],
    scale: &mut [f32],
    zero: &mut [f32],
    steps: &mut [f32],
) {
    let (rows, cols, ld, n_group, per_super) = (p.rows as usize, p.cols as usize, p.ld as usize, p.n_group as usize, p.per_super as usize);
    let width = n_group.div_ceil(per_super) * 2;
    let grids = scale.par_chunks_mut(n_group.max(1)).zip(zero.par_chunks_mut(n_group.max(1)));
    grids.zip(steps.par_chunks_mut(width.max(1))).take(rows).enumerate().for_each(|(row, ((scale, zero), steps))| {
        let blocks = scale.chunks_mut(per_super).zip(zero.chunks_mut(per_super)).zip(steps.chunks_mut(2));
        for (block, ((scale, zero), steps)) in blocks.enumerate() {
            let first = block * per_super * p.group as usize;
            let columns = first..(first + scale.len() * p.group as usize).min(cols);
            let found = widest(Search { p, w: &w[row * ld..][columns.clone()], weight: &weight[columns], scale, zero });
            steps.copy_from_slice(&found);
        }
    });
}

/// One super-block of one row; returns its steps.
struct Search<'a> {
    p: &'a StepSearchParams,
    w: &'a [f32],
    weight: &'a [f32],
    scale: &'a mut [f32],
    zero: &'a mut [f32],
}

impl Loop for Search<'_> {
    type Output = [f32; 2];

    #[inline(always)]
    fn call(self) -> [f32; 2] {
        let Search { p, w, weight, scale, zero } = self;
        let (max, width) = (p.max_code as f32, p.group as usize);
        let middle = f32::midpoint(max, 1.0);
        let groups = || w.chunks(width).zip(weight.chunks(width));

        let sizes = scale.iter().zip(w.chunks(width)).filter(|(_, w)| w.iter().any(|w| *w != 0.0)).map(|(s, _)| s.abs());
        let base = sizes.fold(0.0f32, f32::max) / p.count_high;
        let mut minima = [0.0f32; MAX_GROUPS as usize];
        let mut best = (f32::INFINITY, p.step(base, 0));
        for number in 0..p.n_try {
            let step = p.step(base, number);
            let (mut loss, mut found) = (0.0, [0.0f32; MAX_GROUPS as usize]);
            for (g, (w, weight)) in groups().enumerate() {
                let s = p.scale(scale[g], step);
                let m = match (p.minima, p.n_try) {
                    (0, _) => -s * middle,
                    (_, 1) => -scale[g] * zero[g],
                    _ => {
                        let m = -scale[g] * zero[g];
                        sums(w, weight, Grid { scale: s, minimum: m }, max).minimum(s).map_or(m, |m| m.min(0.0))
                    }
                };
                found[g] = m;
                loss += weighted_error(w, weight, Grid { scale: s, minimum: m }, max);
            }
            if number == 0 || loss < best.0 {
                (best, minima) = ((loss, step), found);
            }
        }
        let step = best.1;
        scale.iter_mut().for_each(|s| *s = p.scale(*s, step));
        if p.minima == 0 {
            return [step, 0.0];
        }

        let base = minima.iter().fold(0.0f32, |most, m| most.max(-m)) / p.count_high;
        let mut best = (f32::INFINITY, p.step(base, 0));
        for number in 0..p.n_try {
            let step = p.step(base, number);
            let loss_of = |(g, (w, weight)): (usize, (&[f32], &[f32]))| {
                weighted_error(w, weight, Grid { scale: scale[g], minimum: p.minimum(minima[g], step) }, max)
            };
            let loss = groups().enumerate().map(loss_of).sum();
            if number == 0 || loss < best.0 {
                best = (loss, step);
            }
        }
        for (zero, (s, m)) in zero.iter_mut().zip(scale.iter().zip(minima)) {
            *zero = -p.minimum(m, best.1) / s;
        }
        [step, best.1]
    }
}

impl StepSearchParams {
    /// Try `number` around `base`.
    #[inline(always)]
    fn step(&self, base: f32, number: u32) -> f32 {
        let half = (self.n_try / 2) as f32;
        let factor = if half == 0.0 { 1.0 } else { 1.0 + self.spread * ((number as f32 - half) / half) };
        stored_step(base * factor, self.step_dtype)
    }

    #[inline(always)]
    fn scale(&self, s: f32, step: f32) -> f32 {
        StoredScale { dtype: 0, step, low: self.count_low, high: self.count_high }.nearest(s)
    }

    #[inline(always)]
    fn minimum(&self, m: f32, step: f32) -> f32 {
        -step * (-m / step).round_ties_even().max(0.0).min(self.count_high)
    }
}
