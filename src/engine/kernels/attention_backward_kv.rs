//! The gradient of causal attention with respect to its keys and values, summed over the query heads that share them:
//!   dk_j = scale Σ_{i ≥ j} P_ij (dP_ij − delta_i) q_i,  dv_j = Σ_{i ≥ j} P_ij dout_i,
//! with P, dP and delta of `attention_backward_q`, whose row statistics it reads.

use super::gemm::{View, product};
use super::math::exp;
use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, need, params};
use rayon::prelude::*;
use std::f32::consts::LN_2;

params! {
    /// q, dout [n_seq · seq_len, ld_q] with n_head heads side by side, k, v, dk, dv [.., ld_kv] with n_kv heads; statistics
    /// [n_seq · seq_len, n_head, 2] as `attention_backward_q` leaves them.
    pub struct AttentionBackwardKvParams {
        pub n_seq: u32,
        pub seq_len: u32,
        pub n_head: u32,
        pub n_kv: u32,
        pub d_head: u32,
        pub ld_q: u32,
        pub ld_kv: u32,
        pub scale: f32,
    }
}

/// Keys, and columns of a head, per workgroup of the shader.
const KEYS: u32 = 32;
const WIDTH: u32 = 128;

impl Launch for AttentionBackwardKvParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        [self.seq_len.div_ceil(KEYS), self.n_kv * self.d_head.div_ceil(WIDTH), self.n_seq]
    }

    fn cost(&self) -> Cost {
        // Four products over the causal half.
        let l = f64::from(self.seq_len);
        Cost { flops: 8.0 * f64::from(self.n_seq) * f64::from(self.n_head) * f64::from(self.d_head) * l * (l + 1.0) / 2.0 }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        super::attention::check_heads(self.n_head, self.n_kv, self.d_head, self.ld_q, self.ld_kv)?;
        let tokens = self.n_seq as usize * self.seq_len as usize;
        need("q", len[0], tokens * self.ld_q as usize)?;
        need("dout", len[3], tokens * self.ld_q as usize)?;
        for (name, len) in [("k", len[1]), ("v", len[2]), ("dk", len[5]), ("dv", len[6])] {
            need(name, len, tokens * self.ld_kv as usize)?;
        }
        need("statistics", len[4], tokens * self.n_head as usize * 2)
    }
}

/// Keys per task.
const TILE: usize = 64;

#[allow(clippy::too_many_arguments, reason = "one argument per binding")]
pub(super) fn native(
    p: &AttentionBackwardKvParams,
    _: &Constants,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    dout: &[f32],
    statistics: &[f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let (len, ld) = (p.seq_len as usize, p.ld_kv as usize);
    dk.par_chunks_mut(len * ld).zip(dv.par_chunks_mut(len * ld)).take(p.n_seq as usize).enumerate().for_each(|(s, (dk, dv))| {
        // Earlier keys are seen by more queries and come first, so that the last tiles to run are short.
        let tiles = dk.par_chunks_mut(TILE * ld).zip(dv.par_chunks_mut(TILE * ld)).enumerate();
        tiles.with_max_len(1).for_each(|(i, (dk, dv))| {
            tile(p, s * len, i * TILE, TILE.min(len - i * TILE), [q, k, v, dout, statistics], dk, dv);
        });
    });
}

/// Keys `first..first + n` of the sequence that starts at token `base`, all heads.
fn tile(
    p: &AttentionBackwardKvParams,
    base: usize,
    first: usize,
    n: usize,
    [q, k, v, dout, statistics]: [&[f32]; 5],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let (d, ld_q, ld_kv) = (p.d_head as usize, p.ld_q as usize, p.ld_kv as usize);
    let (n_head, group) = (p.n_head as usize, (p.n_head / p.n_kv) as usize);
    let queries = p.seq_len as usize - first;
    let mut weights = vec![0.0f32; queries * n];
    let mut slopes = vec![0.0f32; queries * n];
    for head in 0..n_head {
        let column = head / group * d;
        let (q_start, kv_start) = ((base + first) * ld_q + head * d, (base + first) * ld_kv + column);
        let rows = |data| View { data, start: q_start, row: ld_q, col: 1 };
        let transposed = |data| View { data, start: kv_start, row: 1, col: ld_kv };
        product([queries, n, d], p.scale, rows(q), transposed(k), 0.0, &mut weights, 0, n);
        product([queries, n, d], 1.0, rows(dout), transposed(v), 0.0, &mut slopes, 0, n);
        for (i, (weights, slopes)) in weights.chunks_mut(n).zip(slopes.chunks_mut(n)).enumerate() {
            let seen = n.min(i + 1);
            let at = 2 * ((base + first + i) * n_head + head);
            let [log_norm, delta] = [statistics[at], statistics[at + 1]];
            widest(Row { weights: &mut weights[..seen], slopes: &mut slopes[..seen], log_norm, delta, scale: p.scale });
            weights[seen..].fill(0.0);
            slopes[seen..].fill(0.0);
        }
        let beta = if head % group == 0 { 0.0 } else { 1.0 };
        let by_key = |data| View { data, start: 0, row: 1, col: n };
        product([n, d, queries], 1.0, by_key(&weights), rows(dout), beta, dv, column, ld_kv);
        product([n, d, queries], 1.0, by_key(&slopes), rows(q), beta, dk, column, ld_kv);
    }
}

/// One row: scores become P, dP becomes scale P (dP − delta).
struct Row<'a> {
    weights: &'a mut [f32],
    slopes: &'a mut [f32],
    log_norm: f32,
    delta: f32,
    scale: f32,
}

impl Loop for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let log_norm = self.log_norm * LN_2;
        for (weight, slope) in self.weights.iter_mut().zip(self.slopes.iter_mut()) {
            *weight = exp(*weight - log_norm);
            *slope = self.scale * *weight * (*slope - self.delta);
        }
    }
}
