//! ŵ = s (q − z), s and z per row and group of columns.

use super::row_dot::check_groups;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// codes, w_hat [rows, ld]; scale and zero [rows, n_group].
    pub struct DequantizeParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
        pub group: u32,
        pub n_group: u32,
    }
}

impl Launch for DequantizeParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d((self.rows as usize * self.cols as usize).div_ceil(256))
    }

    fn cost(&self) -> Cost {
        Cost { flops: 2.0 * f64::from(self.rows) * f64::from(self.cols) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_groups(self.cols, self.group, self.n_group)?;
        within("w_hat", self.cols, self.ld)?;
        let (all, grids) = (self.rows as usize * self.ld as usize, self.rows as usize * self.n_group as usize);
        need("codes", len[0], all)?;
        need("scale", len[1], grids)?;
        need("zero", len[2], grids)?;
        need("w_hat", len[3], all)
    }
}

pub(super) fn native(p: &DequantizeParams, _: &Constants, codes: &[u32], scale: &[f32], zero: &[f32], w_hat: &mut [f32]) {
    let (cols, ld, group, n_group) = (p.cols as usize, p.ld as usize, p.group as usize, p.n_group as usize);
    w_hat.par_chunks_mut(ld).zip(codes.par_chunks(ld)).take(p.rows as usize).enumerate().for_each(|(r, (w_hat, codes))| {
        for (g, (w_hat, codes)) in w_hat[..cols].chunks_mut(group).zip(codes[..cols].chunks(group)).enumerate() {
            let (s, z) = (scale[r * n_group + g], zero[r * n_group + g]);
            for (h, c) in w_hat.iter_mut().zip(codes) {
                *h = s * (*c as f32 - z);
            }
        }
    });
}
