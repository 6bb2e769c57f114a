//! out[r, j] = source[row0 + r, j] · row[r] · column[j] as f32: a weight whose inputs or outputs take factors, or a part of its rows.

use super::embed::widen;
use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// row [rows], column [cols]; source [row0 + rows, ld_source] as stored; out [rows, ld_out].
    pub struct RescaleParams {
        pub rows: u32,
        pub cols: u32,
        pub row0: u32,
        pub ld_source: u32,
        pub ld_out: u32,
    }
}

impl Launch for RescaleParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d((self.rows as usize * self.cols as usize).div_ceil(256))
    }

    fn cost(&self) -> Cost {
        Cost { flops: 2.0 * f64::from(self.rows) * f64::from(self.cols) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        within("source", self.cols, self.ld_source)?;
        within("out", self.cols, self.ld_out)?;
        need("row", len[0], self.rows as usize)?;
        need("column", len[1], self.cols as usize)?;
        need("source", len[2], (self.row0 as usize + self.rows as usize) * self.ld_source as usize)?;
        need("out", len[3], self.rows as usize * self.ld_out as usize)
    }
}

pub(super) fn native(p: &RescaleParams, c: &Constants, row: &[f32], column: &[f32], source: &[u32], out: &mut [f32]) {
    let (cols, ld) = (p.cols as usize, p.ld_source as usize);
    let dtype = c.stored("source");
    out.par_chunks_mut(p.ld_out as usize).zip(row).take(p.rows as usize).enumerate().for_each(|(r, (out, row))| {
        let out = &mut out[..cols];
        widen(dtype, source, (p.row0 as usize + r) * ld, out);
        widest(Row { factor: *row, column: &column[..cols], out });
    });
}

struct Row<'a> {
    factor: f32,
    column: &'a [f32],
    out: &'a mut [f32],
}

impl Loop for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (o, c) in self.out.iter_mut().zip(self.column) {
            *o = *o * self.factor * c;
        }
    }
}
