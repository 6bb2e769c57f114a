//! Causal softmax attention with grouped queries: out[i] = Σ_{j ≤ i} softmax_j(scale q_i · k_j) v_j inside each sequence.
//!
//! Query head h reads key/value head h · n_kv / n_head. Scores exist for one tile of queries at a time, never as [n_head, L, L].

use super::gemm::{View, product};
use super::math::exp;
use super::simd::{Loop, widest};
use super::rms_norm::sum;
use crate::engine::Elem;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, need, params, within};
use rayon::prelude::*;

params! {
    /// q [n_seq · seq_len, ld_q] with n_head heads side by side, k and v [.., ld_kv] with n_kv heads, out [.., ld_out].
    pub struct AttentionParams {
        pub n_seq: u32,
        pub seq_len: u32,
        pub n_head: u32,
        pub n_kv: u32,
        pub d_head: u32,
        pub ld_q: u32,
        pub ld_kv: u32,
        pub ld_out: u32,
        pub scale: f32,
    }
}

/// Queries per workgroup of the shader.
const QUERIES: u32 = 32;

/// Widest head: the shader keeps outputs in registers, and reads pairs of elements.
pub const MAX_D_HEAD: u32 = 256;

impl Launch for AttentionParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        [self.seq_len.div_ceil(QUERIES), self.n_head, self.n_seq]
    }

    fn cost(&self) -> Cost {
        // Two products over the causal half.
        let l = f64::from(self.seq_len);
        Cost { flops: 4.0 * f64::from(self.n_seq) * f64::from(self.n_head) * f64::from(self.d_head) * l * (l + 1.0) / 2.0 }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        let tokens = self.n_seq as usize * self.seq_len as usize;
        check_heads(self.n_head, self.n_kv, self.d_head, self.ld_q, self.ld_kv)?;
        if !self.ld_out.is_multiple_of(2) {
            return Err(format!("heads of {} in rows of {}", self.d_head, self.ld_out));
        }
        within("out", self.n_head * self.d_head, self.ld_out)?;
        need("q", len[0], tokens * self.ld_q as usize)?;
        need("k", len[1], tokens * self.ld_kv as usize)?;
        need("v", len[2], tokens * self.ld_kv as usize)?;
        need("out", len[3], tokens * self.ld_out as usize)
    }
}

/// Do query heads share key/value heads evenly, and do heads lie in pairs of elements inside their rows?
pub(super) fn check_heads(n_head: u32, n_kv: u32, d_head: u32, ld_q: u32, ld_kv: u32) -> Result<(), String> {
    if n_kv == 0 || !n_head.is_multiple_of(n_kv) {
        return Err(format!("{n_head} query heads cannot share {n_kv} key/value heads"));
    }
    if d_head == 0 || d_head > MAX_D_HEAD || [d_head, ld_q, ld_kv].iter().any(|v| !v.is_multiple_of(2)) {
        return Err(format!("heads of {d_head} in rows of {ld_q}, {ld_kv}"));
    }
    within("q", n_head * d_head, ld_q)?;
    within("k and v", n_kv * d_head, ld_kv)
}

/// Queries per task.
const TILE: usize = 64;

pub(super) fn native<E: Elem>(p: &AttentionParams, _: &Constants, q: &[f32], k: &[f32], v: &[f32], out: &mut [E]) {
    let (len, ld_out) = (p.seq_len as usize, p.ld_out as usize);
    if len == 0 {
        return;
    }
    out.par_chunks_mut(len * ld_out).take(p.n_seq as usize).enumerate().for_each(|(s, out)| {
        out.par_chunks_mut(TILE * ld_out).enumerate().rev().with_max_len(1).for_each(|(i, out)| {
            tile(p, s * len, i * TILE, TILE.min(len - i * TILE), [q, k, v], out);
        });
    });
}

/// Queries `first..first + n` of the sequence that starts at token `base`, all heads.
fn tile<E: Elem>(p: &AttentionParams, base: usize, first: usize, n: usize, [q, k, v]: [&[f32]; 3], out: &mut [E]) {
    let (d, ld_q, ld_kv, ld_out) = (p.d_head as usize, p.ld_q as usize, p.ld_kv as usize, p.ld_out as usize);
    let keys = first + n;
    let mut scores = vec![0.0f32; n * keys];
    let mut context = vec![0.0f32; n * d];
    for head in 0..p.n_head as usize {
        let kv = head * p.n_kv as usize / p.n_head as usize;
        let queries = View { data: q, start: (base + first) * ld_q + head * d, row: ld_q, col: 1 };
        let keys_t = View { data: k, start: base * ld_kv + kv * d, row: 1, col: ld_kv };
        product([n, keys, d], p.scale, queries, keys_t, 0.0, &mut scores, 0, keys);
        for (i, row) in scores.chunks_mut(keys).enumerate() {
            let (seen, unseen) = row.split_at_mut(first + i + 1);
            widest(Softmax(seen));
            unseen.fill(0.0);
        }
        let weights = View { data: &scores, start: 0, row: keys, col: 1 };
        let values = View { data: v, start: base * ld_kv + kv * d, row: ld_kv, col: 1 };
        product([n, d, keys], 1.0, weights, values, 0.0, &mut context, 0, d);
        for (out, context) in out.chunks_mut(ld_out).zip(context.chunks(d)) {
            for (o, c) in out[head * d..].iter_mut().zip(context) {
                *o = E::from_f32(*c);
            }
        }
    }
}

/// One row of scores, in place.
pub(super) struct Softmax<'a>(pub(super) &'a mut [f32]);

impl Loop for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let row = self.0;
        let max = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
        for v in row.iter_mut() {
            *v = exp(*v - max);
        }
        let norm = sum(row, |v| v).recip();
        for v in row.iter_mut() {
            *v *= norm;
        }
    }
}
