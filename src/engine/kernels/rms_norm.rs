//! RMSNorm: out[t, j] = x[t, j] / sqrt(mean_j x² + eps) · gain[j].

use crate::engine::Elem;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// x [n_tok, ld_x], gain [d], out [n_tok, ld_out].
    pub struct RmsNormParams {
        pub n_tok: u32,
        pub d: u32,
        pub ld_x: u32,
        pub ld_out: u32,
        pub eps: f32,
    }
}

impl Launch for RmsNormParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.n_tok as usize)
    }

    fn cost(&self) -> Cost {
        Cost { flops: 4.0 * f64::from(self.n_tok) * f64::from(self.d) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        within("x", self.d, self.ld_x)?;
        within("out", self.d, self.ld_out)?;
        need("x", len[0], self.n_tok as usize * self.ld_x as usize)?;
        need("gain", len[1], self.d as usize)?;
        need("out", len[2], self.n_tok as usize * self.ld_out as usize)
    }
}

pub(super) fn native<E: Elem>(p: &RmsNormParams, _: &Constants, x: &[f32], gain: &[f32], out: &mut [E]) {
    let d = p.d as usize;
    out.par_chunks_mut(p.ld_out as usize).zip(x.par_chunks(p.ld_x as usize)).take(p.n_tok as usize).for_each(|(out, x)| {
        let x = &x[..d];
        let rms = (sum(x, |v| v * v) / d as f32 + p.eps).sqrt().recip();
        for ((o, v), g) in out.iter_mut().zip(x).zip(gain) {
            *o = E::from_f32(v * rms * g);
        }
    });
}

/// Sum of `f(x)` in sixteen running sums, which the compiler keeps in vector registers and which round less than one.
#[inline(always)]
pub(super) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for i in 0..16 {
            lanes[i] += f(chunk[i]);
        }
    }
    let mut tail = 0.0;
    for v in rest {
        tail += f(*v);
    }
    lanes.iter().sum::<f32>() + tail
}
