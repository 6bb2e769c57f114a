//! GPTQ's column sweep inside a block (Frantar et al., ICLR 2023): for each column j of the block, in order,
//!   q = clamp(round(w_j / s) + z, 0, max_code);  e = (w_j − s (q − z)) / U_jj;  w_k −= e U_jk for the later k of the block.
//! Columns stand in quantization order; `order` maps a position to the original column, which decides the group (static
//! groups). The columns after the block are updated by one product: W −= err · U. The codes q are not kept: they are the nearest of what
//! is left in w, and a pass over all columns at the end writes them along rows instead of scattered.

use super::quantize::code;
use super::row_dot::check_groups;
use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, need, params, within};
use rayon::prelude::*;

/// Widest block of one launch: its square of U and a tile of rows fit the smallest workgroup memory.
pub const MAX_WIDTH: u32 = 32;

params! {
    /// u [u_row + width, ld_u]: rows of the factor, full width; order [cols]; scale, zero [rows, n_group]; w [rows, ld] in
    /// quantization order (holds the compensated weights afterwards); err [rows, ld_err], written at columns err_col...
    pub struct GptqSweepParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
        /// First position of the block, and how many columns it has.
        pub col0: u32,
        pub width: u32,
        pub u_row: u32,
        pub ld_u: u32,
        pub ld_err: u32,
        pub err_col: u32,
        pub group: u32,
        pub n_group: u32,
        pub max_code: u32,
    }
}

impl Launch for GptqSweepParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        [self.rows.div_ceil(64), 1, 1]
    }

    fn cost(&self) -> Cost {
        let width = f64::from(self.width);
        Cost { flops: f64::from(self.rows) * width * (width + 8.0) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_groups(self.cols, self.group, self.n_group)?;
        if self.width > MAX_WIDTH || self.col0 + self.width > self.cols || self.err_col + self.width > self.ld_err {
            return Err(format!("block {} + {} of {} columns", self.col0, self.width, self.cols));
        }
        within("w", self.cols, self.ld)?;
        within("u", self.col0 + self.width, self.ld_u)?;
        let (all, grids) = (self.rows as usize * self.ld as usize, self.rows as usize * self.n_group as usize);
        need("u", len[0], (self.u_row + self.width).saturating_sub(1) as usize * self.ld_u as usize + (self.col0 + self.width) as usize)?;
        need("order", len[1], self.cols as usize)?;
        need("scale", len[2], grids)?;
        need("zero", len[3], grids)?;
        need("w", len[4], all)?;
        need("err", len[5], self.rows as usize * self.ld_err as usize)
    }
}

/// Rows that are swept together: one vector register wide, or several.
const LANES: usize = 16;
type Lanes = [f32; LANES];

#[allow(clippy::too_many_arguments, reason = "the kernel's bindings")]
pub(super) fn native(
    p: &GptqSweepParams,
    _: &Constants,
    u: &[f32],
    order: &[u32],
    scale: &[f32],
    zero: &[f32],
    w: &mut [f32],
    err: &mut [f32],
) {
    let (ld, ld_err) = (p.ld as usize, p.ld_err as usize);
    let tasks = w.par_chunks_mut(LANES * ld).zip(err.par_chunks_mut(LANES * ld_err));
    tasks.take((p.rows as usize).div_ceil(LANES)).enumerate().for_each(|(i, (w, err))| {
        let first = i * LANES;
        let rows = LANES.min(p.rows as usize - first);
        let grids = first * p.n_group as usize..(first + rows) * p.n_group as usize;
        widest(Rows { p, rows, u, order, scale: &scale[grids.clone()], zero: &zero[grids], w, err });
    });
}

/// At most `LANES` rows, and their parts of the buffers.
struct Rows<'a> {
    p: &'a GptqSweepParams,
    rows: usize,
    u: &'a [f32],
    order: &'a [u32],
    scale: &'a [f32],
    zero: &'a [f32],
    w: &'a mut [f32],
    err: &'a mut [f32],
}

impl Loop for Rows<'_> {
    type Output = ();

    /// Sweeps the rows together, transposed so that a column of the block is one vector.
    #[inline(always)]
    fn call(self) {
        let Rows { p, rows, u, order, scale, zero, w, err } = self;
        let (ld, ld_u, ld_err, n_group) = (p.ld as usize, p.ld_u as usize, p.ld_err as usize, p.n_group as usize);
        let (col0, width) = (p.col0 as usize, p.width as usize);
        let mut tile = [[0.0f32; LANES]; MAX_WIDTH as usize];
        for r in 0..rows {
            for (j, column) in tile[..width].iter_mut().enumerate() {
                column[r] = w[r * ld + col0 + j];
            }
        }
        for j in 0..width {
            let u_row = &u[(p.u_row as usize + j) * ld_u + col0..][..width];
            let group = (order[col0 + j] / p.group) as usize;
            let (mut s, mut z): (Lanes, Lanes) = ([1.0; LANES], [0.0; LANES]);
            for r in 0..rows {
                (s[r], z[r]) = (scale[r * n_group + group], zero[r * n_group + group]);
            }
            let (now, later) = tile[j..width].split_at_mut(1);
            let mut e: Lanes = [0.0; LANES];
            for r in 0..LANES {
                let q = code(now[0][r], s[r], z[r], p.max_code as f32);
                e[r] = (now[0][r] - s[r] * (q - z[r])) / u_row[j];
            }
            for (later, u) in later.iter_mut().zip(&u_row[j + 1..]) {
                for r in 0..LANES {
                    later[r] -= e[r] * u;
                }
            }
            for r in 0..rows {
                err[r * ld_err + p.err_col as usize + j] = e[r];
            }
        }
        for r in 0..rows {
            for (j, column) in tile[..width].iter().enumerate() {
                w[r * ld + col0 + j] = column[r];
            }
        }
    }
}
