//! to[r, :] = source[r, :] where pick[r] ≠ 0: keeps the better of two results, row by row.

use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params};
use rayon::prelude::*;

params! {
    /// pick [rows], source and to [rows, ld].
    pub struct SelectRowsParams {
        pub rows: u32,
        pub ld: u32,
    }
}

impl Launch for SelectRowsParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.rows as usize)
    }

    fn cost(&self) -> Cost {
        Cost { flops: 0.0 }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        need("pick", len[0], self.rows as usize)?;
        need("source", len[1], self.rows as usize * self.ld as usize)?;
        need("to", len[2], self.rows as usize * self.ld as usize)
    }
}

pub(super) fn native(p: &SelectRowsParams, _: &Constants, pick: &[u32], source: &[u32], to: &mut [u32]) {
    let ld = p.ld as usize;
    to.par_chunks_mut(ld).zip(source.par_chunks(ld)).zip(pick).take(p.rows as usize).for_each(|((to, source), pick)| {
        if *pick != 0 {
            to.copy_from_slice(source);
        }
    });
}
