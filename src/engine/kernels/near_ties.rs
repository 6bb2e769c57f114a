//! Weights that the last bits of f32 arithmetic round: ties[r] counts the weights of row r whose place on the grid,
//!   y = value / s + z,
//! lies within `tolerance` of the middle between two of its codes 0..=max_code.

use super::row_dot::check_groups;
use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// value [rows, ld]; scale and zero [rows, n_group]; ties [rows].
    pub struct NearTiesParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
        pub group: u32,
        pub n_group: u32,
        pub max_code: u32,
        /// In steps of the grid.
        pub tolerance: f32,
    }
}

impl Launch for NearTiesParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.rows as usize)
    }

    fn cost(&self) -> Cost {
        Cost { flops: 6.0 * f64::from(self.rows) * f64::from(self.cols) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_groups(self.cols, self.group, self.n_group)?;
        within("value", self.cols, self.ld)?;
        let grids = self.rows as usize * self.n_group as usize;
        need("value", len[0], self.rows as usize * self.ld as usize)?;
        need("scale", len[1], grids)?;
        need("zero", len[2], grids)?;
        need("ties", len[3], self.rows as usize)
    }
}

pub(super) fn native(p: &NearTiesParams, _: &Constants, value: &[f32], scale: &[f32], zero: &[f32], ties: &mut [u32]) {
    let (cols, ld, group, n_group) = (p.cols as usize, p.ld as usize, p.group as usize, p.n_group as usize);
    ties.par_iter_mut().zip(value.par_chunks(ld.max(1))).take(p.rows as usize).enumerate().for_each(|(r, (ties, value))| {
        let grids = scale[r * n_group..].iter().zip(&zero[r * n_group..]);
        *ties = value[..cols].chunks(group).zip(grids).map(|(value, (s, z))| widest(Group { p, value, scale: *s, zero: *z })).sum();
    });
}

/// One group of one row.
struct Group<'a> {
    p: &'a NearTiesParams,
    value: &'a [f32],
    scale: f32,
    zero: f32,
}

impl Loop for Group<'_> {
    type Output = u32;

    #[inline(always)]
    fn call(self) -> u32 {
        let Group { p, value, scale, zero } = self;
        let max = p.max_code as f32;
        let mut count = 0;
        for value in value {
            let y = value / scale + zero;
            let below = y.floor();
            count += u32::from((y - below - 0.5).abs() <= p.tolerance && below >= 0.0 && below < max);
        }
        count
    }
}
