//! LayerNorm: out[t, j] = (x[t, j] − mean) / sqrt(var + eps) · gain[j] + bias[j], variance with divisor d.

use super::rms_norm::sum;
use crate::engine::Elem;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// x [n_tok, ld_x], gain [d], bias [d] or absent (has_bias = 0), out [n_tok, ld_out].
    pub struct LayerNormParams {
        pub n_tok: u32,
        pub d: u32,
        pub ld_x: u32,
        pub ld_out: u32,
        pub has_bias: u32,
        pub eps: f32,
    }
}

impl Launch for LayerNormParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.n_tok as usize)
    }

    fn cost(&self) -> Cost {
        Cost { flops: 7.0 * f64::from(self.n_tok) * f64::from(self.d) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        within("x", self.d, self.ld_x)?;
        within("out", self.d, self.ld_out)?;
        need("x", len[0], self.n_tok as usize * self.ld_x as usize)?;
        need("gain", len[1], self.d as usize)?;
        need("bias", len[2], if self.has_bias != 0 { self.d as usize } else { 0 })?;
        need("out", len[3], self.n_tok as usize * self.ld_out as usize)
    }
}

pub(super) fn native<E: Elem>(p: &LayerNormParams, _: &Constants, x: &[f32], gain: &[f32], bias: &[f32], out: &mut [E]) {
    let d = p.d as usize;
    out.par_chunks_mut(p.ld_out as usize).zip(x.par_chunks(p.ld_x as usize)).take(p.n_tok as usize).for_each(|(out, x)| {
        let x = &x[..d];
        let mean = sum(x, |v| v) / d as f32;
        let scale = (sum(x, |v| (v - mean) * (v - mean)) / d as f32 + p.eps).sqrt().recip();
        for (j, (o, v)) in out.iter_mut().zip(x).enumerate() {
            let bias = if p.has_bias != 0 { bias[j] } else { 0.0 };
            *o = E::from_f32((v - mean) * scale * gain[j] + bias);
        }
    });
}
