//! GPTQ's column sweep inside a block where the rows of a head are coupled (BoA, Kim et al., ICML 2025).
//!
//! With H⁻¹ = Uᵀ U and G⁻¹ = Vᵀ V, both upper triangular, rounding weight (r, j) is compensated by all weights that follow it in both
//! directions, (r', k) by U_jk V_rr' / (U_jj V_rr). Column after column, and inside a column row after row:
//!   q_r = code(w_r);  w_r' −= (w_r − ŵ_r) V_rr' / V_rr for r' > r;
//! then with e = (w at the column's start − ŵ) / U_jj: w_k −= e U_jk for the later columns k. BoA goes row after row instead; both orders
//! visit the same codes (the nearest plane of one triangular basis), but this one has d dependent steps instead of d_head · d.
//! Columns stand in quantization order as in `gptq_sweep`; the columns after the block are updated by one product: W −= err · U.

use super::quantize::code;
use super::row_dot::check_groups;
use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

/// Widest block of one launch, and the most rows of a head: their tile fits the smallest workgroup memory.
pub const MAX_WIDTH: u32 = 16;
pub const MAX_HEAD: u32 = 128;

params! {
    /// u [u_row + width, ld_u]: rows of the factor, full width; v [n_head · d_head, ld_v]: row factors of the heads; order [cols];
    /// scale, zero [rows, n_group]; w [rows, ld] in quantization order (holds the compensated weights afterwards, whose nearest are the
    /// codes); err [rows, ld_err], written at columns err_col...; rows = n_head · d_head.
    pub struct GptqSweepHeadsParams {
        pub n_head: u32,
        pub d_head: u32,
        pub ld_v: u32,
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

impl Launch for GptqSweepHeadsParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.n_head as usize)
    }

    fn cost(&self) -> Cost {
        let (rows, width) = (f64::from(self.n_head) * f64::from(self.d_head), f64::from(self.width));
        Cost { flops: rows * width * (width + 8.0 + f64::from(self.d_head)) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_groups(self.cols, self.group, self.n_group)?;
        if self.width > MAX_WIDTH || self.col0 + self.width > self.cols || self.err_col + self.width > self.ld_err {
            return Err(format!("block {} + {} of {} columns", self.col0, self.width, self.cols));
        }
        if self.d_head > MAX_HEAD {
            return Err(format!("heads of {} rows; at most {MAX_HEAD} are possible", self.d_head));
        }
        within("w", self.cols, self.ld)?;
        within("u", self.col0 + self.width, self.ld_u)?;
        within("v", self.d_head, self.ld_v)?;
        let rows = self.n_head as usize * self.d_head as usize;
        let (all, grids) = (rows * self.ld as usize, rows * self.n_group as usize);
        need("u", len[0], (self.u_row + self.width).saturating_sub(1) as usize * self.ld_u as usize + (self.col0 + self.width) as usize)?;
        need("v", len[1], rows * self.ld_v as usize)?;
        need("order", len[2], self.cols as usize)?;
        need("scale", len[3], grids)?;
        need("zero", len[4], grids)?;
        need("w", len[5], all)?;
        need("err", len[6], rows * self.ld_err as usize)
    }
}

/// A column of a head.
type Column = [f32; MAX_HEAD as usize];

#[allow(clippy::too_many_arguments, reason = "the kernel's bindings")]
pub(super) fn native(
    p: &GptqSweepHeadsParams,
    _: &Constants,
    u: &[f32],
    v: &[f32],
    order: &[u32],
    scale: &[f32],
    zero: &[f32],
    w: &mut [f32],
    err: &mut [f32],
) {
    let (d_head, ld) = (p.d_head as usize, p.ld as usize);
    let tasks = w.par_chunks_mut(d_head * ld).zip(err.par_chunks_mut(d_head * p.ld_err as usize));
    tasks.take(p.n_head as usize).enumerate().for_each(|(i, (w, err))| {
        let grids = i * d_head * p.n_group as usize..(i + 1) * d_head * p.n_group as usize;
        let v = &v[i * d_head * p.ld_v as usize..];
        widest(Head { p, u, v, order, scale: &scale[grids.clone()], zero: &zero[grids], w, err });
    });
}

/// One head, and its parts of the buffers.
struct Head<'a> {
    p: &'a GptqSweepHeadsParams,
    u: &'a [f32],
    v: &'a [f32],
    order: &'a [u32],
    scale: &'a [f32],
    zero: &'a [f32],
    w: &'a mut [f32],
    err: &'a mut [f32],
}

impl Loop for Head<'_> {
    type Output = ();

    /// Rows in lanes, columns one after the other.
    #[inline(always)]
    fn call(self) {
        let Head { p, u, v, order, scale, zero, w, err } = self;
        let (ld, ld_u, ld_v, n_group) = (p.ld as usize, p.ld_u as usize, p.ld_v as usize, p.n_group as usize);
        let (col0, width, rows) = (p.col0 as usize, p.width as usize, p.d_head as usize);
        let mut tile = [[0.0f32; MAX_HEAD as usize]; MAX_WIDTH as usize];
        for r in 0..rows {
            for (j, column) in tile[..width].iter_mut().enumerate() {
                column[r] = w[r * ld + col0 + j];
            }
        }
        for j in 0..width {
            let u_row = &u[(p.u_row as usize + j) * ld_u + col0..][..width];
            let group = (order[col0 + j] / p.group) as usize;
            let (now, later) = tile[j..width].split_at_mut(1);
            let now = &mut now[0];
            let mut e: Column = [0.0; MAX_HEAD as usize];
            let mut current = *now;
            for r in 0..rows {
                let (s, z) = (scale[r * n_group + group], zero[r * n_group + group]);
                let q = code(current[r], s, z, p.max_code as f32);
                let value = s * (q - z);
                e[r] = (now[r] - value) / u_row[j];
                now[r] = current[r];
                let v_row = &v[r * ld_v..][..rows];
                let feedback = (current[r] - value) / v_row[r];
                // V is zero left of its diagonal, so rows that are done do not change.
                for (w, v) in current.iter_mut().zip(v_row) {
                    *w -= feedback * v;
                }
            }
            for (later, u) in later.iter_mut().zip(&u_row[j + 1..]) {
                for (later, e) in later.iter_mut().zip(&e) {
                    *later -= e * u;
                }
            }
            for r in 0..rows {
                err[r * p.ld_err as usize + p.err_col as usize + j] = e[r];
            }
        }
        for r in 0..rows {
            for (j, column) in tile[..width].iter().enumerate() {
                w[r * ld + col0 + j] = column[r];
            }
        }
    }
}
