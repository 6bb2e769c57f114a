//! The gradient of causal attention with respect to its queries, and the row statistics that the other half needs.
//!
//! For f = Σ_i dout_i · out_i with P_ij = softmax_{j ≤ i}(scale q_i · k_j), dP_ij = dout_i · v_j and delta_i = Σ_j P_ij dP_ij:
//!   dq_i = scale Σ_j P_ij (dP_ij − delta_i) k_j.

use super::gemm::{View, product};
use super::math::exp;
use super::rms_norm::sum;
use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, need, params};
use rayon::prelude::*;
use std::f32::consts::LOG2_E;

params! {
    /// q, dout, dq [n_seq · seq_len, ld_q] with n_head heads side by side, k and v [.., ld_kv] with n_kv heads; statistics
    /// [n_seq · seq_len, n_head, 2]: log2 Σ_j e^(scale q_i · k_j), delta_i.
    pub struct AttentionBackwardQParams {
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

/// Queries per workgroup of the shader.
const QUERIES: u32 = 32;

impl Launch for AttentionBackwardQParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        [self.seq_len.div_ceil(QUERIES), self.n_head, self.n_seq]
    }

    fn cost(&self) -> Cost {
        // Three products over the causal half; that the shader makes two of them twice is its own affair.
        let l = f64::from(self.seq_len);
        Cost { flops: 6.0 * f64::from(self.n_seq) * f64::from(self.n_head) * f64::from(self.d_head) * l * (l + 1.0) / 2.0 }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        super::attention::check_heads(self.n_head, self.n_kv, self.d_head, self.ld_q, self.ld_kv)?;
        let tokens = self.n_seq as usize * self.seq_len as usize;
        for (name, len) in [("q", len[0]), ("dout", len[3]), ("dq", len[4])] {
            need(name, len, tokens * self.ld_q as usize)?;
        }
        need("k", len[1], tokens * self.ld_kv as usize)?;
        need("v", len[2], tokens * self.ld_kv as usize)?;
        need("statistics", len[5], tokens * self.n_head as usize * 2)
    }
}

/// Queries per task.
const TILE: usize = 64;

#[allow(clippy::too_many_arguments, reason = "one argument per binding")]
pub(super) fn native(
    p: &AttentionBackwardQParams,
    _: &Constants,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    dout: &[f32],
    dq: &mut [f32],
    statistics: &mut [f32],
) {
    let (len, ld, pairs) = (p.seq_len as usize, p.ld_q as usize, 2 * p.n_head as usize);
    let sequences = dq.par_chunks_mut(len * ld).zip(statistics.par_chunks_mut(len * pairs)).take(p.n_seq as usize).enumerate();
    sequences.for_each(|(s, (dq, statistics))| {
        // Later queries see more keys: start with them, so that the last ones to run are short.
        let tiles = dq.par_chunks_mut(TILE * ld).zip(statistics.par_chunks_mut(TILE * pairs)).enumerate();
        tiles.rev().with_max_len(1).for_each(|(i, (dq, statistics))| {
            tile(p, s * len, i * TILE, TILE.min(len - i * TILE), [q, k, v, dout], dq, statistics);
        });
    });
}

/// Queries `first..first + n` of the sequence that starts at token `base`, all heads.
fn tile(
    p: &AttentionBackwardQParams,
    base: usize,
    first: usize,
    n: usize,
    [q, k, v, dout]: [&[f32]; 4],
    dq: &mut [f32],
    statistics: &mut [f32],
) {
    let (d, ld_q, ld_kv, n_head) = (p.d_head as usize, p.ld_q as usize, p.ld_kv as usize, p.n_head as usize);
    let keys = first + n;
    let mut scores = vec![0.0f32; n * keys];
    let mut slopes = vec![0.0f32; n * keys];
    for head in 0..n_head {
        let (q_start, kv_start) = ((base + first) * ld_q + head * d, base * ld_kv + head * p.n_kv as usize / n_head * d);
        let rows = |data| View { data, start: q_start, row: ld_q, col: 1 };
        let transposed = |data| View { data, start: kv_start, row: 1, col: ld_kv };
        product([n, keys, d], p.scale, rows(q), transposed(k), 0.0, &mut scores, 0, keys);
        product([n, keys, d], 1.0, rows(dout), transposed(v), 0.0, &mut slopes, 0, keys);
        for (i, (scores, slopes)) in scores.chunks_mut(keys).zip(slopes.chunks_mut(keys)).enumerate() {
            let (seen, unseen) = slopes.split_at_mut(first + i + 1);
            let (log_norm, delta) = widest(Row { scores: &mut scores[..first + i + 1], slopes: seen, scale: p.scale });
            unseen.fill(0.0);
            statistics[2 * (i * n_head + head)..][..2].copy_from_slice(&[log_norm, delta]);
        }
        let factors = View { data: &slopes, start: 0, row: keys, col: 1 };
        let values = View { data: k, start: kv_start, row: ld_kv, col: 1 };
        product([n, d, keys], 1.0, factors, values, 0.0, dq, head * d, ld_q);
    }
}

/// One row: dP becomes scale P (dP − delta); gives log2 of the norm, and delta. The scores are used up.
struct Row<'a> {
    scores: &'a mut [f32],
    slopes: &'a mut [f32],
    scale: f32,
}

impl Loop for Row<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn call(self) -> (f32, f32) {
        let Self { scores, slopes, scale } = self;
        let max = scores.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
        for v in scores.iter_mut() {
            *v = exp(*v - max);
        }
        let norm = sum(scores, |v| v);
        let delta = dot(scores, slopes) / norm;
        let factor = scale / norm;
        for (slope, weight) in slopes.iter_mut().zip(scores.iter()) {
            *slope = factor * weight * (*slope - delta);
        }
        (max * LOG2_E + norm.log2(), delta)
    }
}

/// Σ a b in sixteen running sums, which the compiler keeps in vector registers and which round less than one.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i];
        }
    }
    let mut tail = 0.0;
    for (a, b) in a_rest.iter().zip(b_rest) {
        tail += a * b;
    }
    lanes.iter().sum::<f32>() + tail
}
