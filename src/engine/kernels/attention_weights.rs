//! Rows of one head's causal attention weights: out[b, r, j] = softmax_{j ≤ i}(scale q_i · k_j), i = i0 + r step; zero for other j.
//!
//! For statistics that need A as a matrix, X ᵀ Aᵀ A X above all: a tile of rows at a time, of one sequence per batch. A step above 1 takes
//! every step-th row.

use super::attention::Softmax;
use super::gemm::{View, product};
use super::matmul_nt::aligned;
use super::simd::widest;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, need, params, within};
use crate::engine::matrix::stride;
use rayon::prelude::*;

params! {
    /// q_i at `q_offset + b q_batch + i ld_q` and k_j at `k_offset + b k_batch + j ld_k`, d_head elements each; a query head names its
    /// key head by `k_offset`. out [batches][rows, cols] with row stride `ld_out`: columns `0..stride(cols)` are written, which must
    /// reach the last row's position.
    pub struct AttentionWeightsParams {
        pub rows: u32,
        pub i0: u32,
        pub step: u32,
        pub cols: u32,
        pub d_head: u32,
        pub ld_q: u32,
        pub ld_k: u32,
        pub ld_out: u32,
        pub q_offset: u32,
        pub k_offset: u32,
        pub q_batch: u32,
        pub k_batch: u32,
        pub out_batch: u32,
        pub batches: u32,
        pub scale: f32,
    }
}

/// Rows per workgroup of the shader.
const ROWS: u32 = 32;

impl AttentionWeightsParams {
    /// The position of row r.
    fn position(&self, row: usize) -> usize {
        self.i0 as usize + row * self.step as usize
    }
}

impl Launch for AttentionWeightsParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        [self.rows.div_ceil(ROWS), self.batches, 1]
    }

    fn cost(&self) -> Cost {
        // Row r sees i0 + r step + 1 keys.
        let rows = f64::from(self.rows);
        let pairs = rows * (f64::from(self.i0) + f64::from(self.step) * (rows - 1.0) / 2.0 + 1.0);
        Cost { flops: 2.0 * f64::from(self.d_head) * pairs * f64::from(self.batches) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        let even = [self.d_head, self.ld_q, self.ld_k, self.q_offset, self.k_offset, self.q_batch, self.k_batch];
        if self.d_head == 0 || even.iter().any(|v| !v.is_multiple_of(2)) {
            return Err(format!("heads of {}, offsets and strides {even:?} must be even", self.d_head));
        }
        aligned(&[self.ld_out, self.out_batch])?;
        let seen = self.position(self.rows as usize - 1) + 1;
        if seen > self.cols as usize {
            return Err(format!("the last row sees {seen} keys, rows hold {}", self.cols));
        }
        within("out", self.cols, self.ld_out)?;
        if self.batches > 1 && self.out_batch < self.rows * self.ld_out {
            return Err(format!("batches of out are {} elements apart, {} rows of {} overlap", self.out_batch, self.rows, self.ld_out));
        }
        let last = self.batches as usize - 1;
        let reach = |offset: u32, batch: u32, ld: u32| {
            offset as usize + last * batch as usize + (seen - 1) * ld as usize + self.d_head as usize
        };
        need("q", len[0], reach(self.q_offset, self.q_batch, self.ld_q))?;
        need("k", len[1], reach(self.k_offset, self.k_batch, self.ld_k))?;
        let out = last * self.out_batch as usize + (self.rows as usize - 1) * self.ld_out as usize + stride(self.cols as usize);
        need("out", len[2], out)
    }
}

/// Rows per task.
const TILE: usize = 64;

pub(super) fn native(p: &AttentionWeightsParams, _: &Constants, q: &[f32], k: &[f32], out: &mut [f32]) {
    let (rows, ld) = (p.rows as usize, p.ld_out as usize);
    out.par_chunks_mut((p.out_batch as usize).max(rows * ld)).take(p.batches as usize).enumerate().for_each(|(batch, out)| {
        out.par_chunks_mut(TILE * ld).take(rows.div_ceil(TILE)).enumerate().rev().with_max_len(1).for_each(|(i, out)| {
            tile(p, batch, i * TILE, TILE.min(rows - i * TILE), q, k, out);
        });
    });
}

/// Rows `first..first + n` of one batch.
fn tile(p: &AttentionWeightsParams, batch: usize, first: usize, n: usize, q: &[f32], k: &[f32], out: &mut [f32]) {
    let (d, ld_q, ld_k, ld) = (p.d_head as usize, p.ld_q as usize, p.ld_k as usize, p.ld_out as usize);
    let (q_start, k_start) = (p.q_offset as usize + batch * p.q_batch as usize, p.k_offset as usize + batch * p.k_batch as usize);
    let queries = View { data: q, start: q_start + p.position(first) * ld_q, row: p.step as usize * ld_q, col: 1 };
    let keys = View { data: k, start: k_start, row: 1, col: ld_k };
    let seen = p.position(first + n - 1) + 1;
    product([n, seen, d], p.scale, queries, keys, 0.0, out, 0, ld);
    for (r, row) in out.chunks_mut(ld).take(n).enumerate() {
        let (seen, unseen) = row[..stride(p.cols as usize)].split_at_mut(p.position(first + r) + 1);
        widest(Softmax(seen));
        unseen.fill(0.0);
    }
}
