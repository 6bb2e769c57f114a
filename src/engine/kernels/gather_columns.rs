//! to[r, j] = source[r, order[j]] as f32: the working copy of a weight, its columns in the order in which they are quantized.

use super::embed::widen;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// order [cols], a permutation; source [.., ld_source] as stored, from row `row_source` on; to [.., ld_to], from row `row_to` on.
    pub struct GatherColumnsParams {
        pub rows: u32,
        pub cols: u32,
        pub ld_source: u32,
        pub ld_to: u32,
        pub row_source: u32,
        pub row_to: u32,
    }
}

impl Launch for GatherColumnsParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d((self.rows as usize * self.cols as usize).div_ceil(256))
    }

    fn cost(&self) -> Cost {
        Cost { flops: 0.0 }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        within("source", self.cols, self.ld_source)?;
        within("to", self.cols, self.ld_to)?;
        need("order", len[0], self.cols as usize)?;
        need("source", len[1], (self.row_source + self.rows) as usize * self.ld_source as usize)?;
        need("to", len[2], (self.row_to + self.rows) as usize * self.ld_to as usize)
    }
}

pub(super) fn native(p: &GatherColumnsParams, c: &Constants, order: &[u32], source: &[u32], to: &mut [f32]) {
    let (cols, ld, row_source) = (p.cols as usize, p.ld_source as usize, p.row_source as usize);
    let dtype = c.stored("source");
    to[p.row_to as usize * p.ld_to as usize..].par_chunks_mut(p.ld_to as usize).take(p.rows as usize).enumerate().for_each_init(
        || vec![0.0; cols],
        |row, (r, to)| {
            widen(dtype, source, (row_source + r) * ld, row);
            for (to, j) in to.iter_mut().zip(&order[..cols]) {
                *to = row[*j as usize];
            }
        },
    );
}
