//! KL(reference ‖ model) per token over chunks of the vocabulary, and whether both prefer the same token.
//!
//! With l the model's and r the reference's logits, running maxima m and n, S = Σ exp(l − m), R = Σ exp(r − n) and
//! T = Σ exp(r − n) (r − l): KL = T / R − (n + ln R) + (m + ln S).

use super::cross_entropy::argmax;
use super::math::exp;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// logits, reference [n_tok, ld] of vocabulary entries `col0..col0 + cols`; state [n_tok, 8] = (m, S, n, R, T, argmax of
    /// the model, argmax of the reference, unused). The first chunk (first ≠ 0) starts the state.
    pub struct KlDivergenceParams {
        pub n_tok: u32,
        pub cols: u32,
        pub ld: u32,
        pub col0: u32,
        pub first: u32,
    }
}

impl Launch for KlDivergenceParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.n_tok as usize)
    }

    fn cost(&self) -> Cost {
        Cost { flops: 10.0 * f64::from(self.n_tok) * f64::from(self.cols) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        within("logits", self.cols, self.ld)?;
        need("logits", len[0], self.n_tok as usize * self.ld as usize)?;
        need("reference", len[1], self.n_tok as usize * self.ld as usize)?;
        need("state", len[2], self.n_tok as usize * 8)
    }
}

pub(super) fn native(p: &KlDivergenceParams, _: &Constants, logits: &[f32], reference: &[f32], state: &mut [f32]) {
    let ld = p.ld as usize;
    state.par_chunks_mut(8).zip(logits.par_chunks(ld)).zip(reference.par_chunks(ld)).take(p.n_tok as usize).for_each(|((state, l), r)| {
        let (l, r) = (&l[..p.cols as usize], &r[..p.cols as usize]);
        if p.first != 0 {
            state.copy_from_slice(&[f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, 0.0, 0.0, 0.0, 0.0, 0.0]);
        }
        let ((at, max), (at_ref, max_ref)) = (argmax(l), argmax(r));
        if max > state[0] {
            state[1] *= exp(state[0] - max);
            state[0] = max;
            state[5] = (p.col0 as usize + at) as f32;
        }
        if max_ref > state[2] {
            let shrink = exp(state[2] - max_ref);
            state[3] *= shrink;
            state[4] *= shrink;
            state[2] = max_ref;
            state[6] = (p.col0 as usize + at_ref) as f32;
        }
        let (m, n) = (state[0], state[2]);
        let (mut s, mut r_sum, mut t) = (0.0f64, 0.0f64, 0.0f64);
        for (l, r) in l.iter().zip(r) {
            s += f64::from(exp(l - m));
            let weight = exp(r - n);
            r_sum += f64::from(weight);
            t += f64::from(weight * (r - l));
        }
        state[1] += s as f32;
        state[3] += r_sum as f32;
        state[4] += t as f32;
    });
}
