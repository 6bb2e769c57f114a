//! Running log-softmax statistics over chunks of the vocabulary, so that no [n_tok, vocab] buffer exists.
//!
//! Per token: the maximum logit m so far, Σ exp(l − m), the target's logit, and the index of the maximum. After the last chunk
//! the loss is m + ln(sum) − target.

use super::math::exp;
use super::simd::{Loop, widest};
use super::rms_norm::sum;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// logits [n_tok, ld] of vocabulary entries `col0..col0 + cols`; targets [n_tok]; state [n_tok, 4] = (max, sum, target
    /// logit, index of the maximum). The first chunk (first ≠ 0) starts the state. Ties keep the lower index.
    pub struct CrossEntropyParams {
        pub n_tok: u32,
        pub cols: u32,
        pub ld: u32,
        pub col0: u32,
        pub first: u32,
    }
}

impl Launch for CrossEntropyParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.n_tok as usize)
    }

    fn cost(&self) -> Cost {
        Cost { flops: 4.0 * f64::from(self.n_tok) * f64::from(self.cols) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        within("logits", self.cols, self.ld)?;
        need("logits", len[0], self.n_tok as usize * self.ld as usize)?;
        need("targets", len[1], self.n_tok as usize)?;
        need("state", len[2], self.n_tok as usize * 4)
    }
}

pub(super) fn native(p: &CrossEntropyParams, _: &Constants, logits: &[f32], target: &[u32], state: &mut [f32]) {
    let tokens = state.par_chunks_mut(4).zip(logits.par_chunks(p.ld as usize)).zip(target).take(p.n_tok as usize);
    tokens.for_each(|((state, logits), target)| {
        let logits = &logits[..p.cols as usize];
        if p.first != 0 {
            state.copy_from_slice(&[f32::NEG_INFINITY, 0.0, 0.0, 0.0]);
        }
        let (at, max) = argmax(logits);
        if max > state[0] {
            state[1] *= exp(state[0] - max);
            state[0] = max;
            state[3] = (p.col0 as usize + at) as f32;
        }
        let max = state[0];
        state[1] += widest(SumExp(logits, max));
        if let Some(l) = target.checked_sub(p.col0).and_then(|t| logits.get(t as usize)) {
            state[2] = *l;
        }
    });
}

/// Σ exp(l − max).
struct SumExp<'a>(&'a [f32], f32);

impl Loop for SumExp<'_> {
    type Output = f32;

    #[inline(always)]
    fn call(self) -> f32 {
        sum(self.0, |l| exp(l - self.1))
    }
}

/// Index and value of the largest element; the first of equals.
pub(super) fn argmax(x: &[f32]) -> (usize, f32) {
    let max = x.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    (x.iter().position(|v| *v == max).unwrap_or(0), max)
}
