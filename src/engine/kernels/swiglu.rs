//! SwiGLU: out[i] = gate[i] / (1 + exp(−gate[i])) · up[i].

use super::math::exp;
use super::simd::{Loop, widest};
use crate::engine::Elem;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params};
use rayon::prelude::*;

params! {
    /// gate, up, out [n]: whole matrices with equal strides. Padding takes part, which is harmless.
    pub struct SwigluParams {
        pub n: u32,
    }
}

impl Launch for SwigluParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d((self.n as usize).div_ceil(256))
    }

    fn cost(&self) -> Cost {
        Cost { flops: 8.0 * f64::from(self.n) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        need("gate", len[0], self.n as usize)?;
        need("up", len[1], self.n as usize)?;
        need("out", len[2], self.n as usize)
    }
}

pub(super) fn native<E: Elem>(p: &SwigluParams, _: &Constants, gate: &[f32], up: &[f32], out: &mut [E]) {
    const CHUNK: usize = 1 << 13;
    let n = p.n as usize;
    out[..n].par_chunks_mut(CHUNK).zip(gate[..n].par_chunks(CHUNK)).zip(up[..n].par_chunks(CHUNK)).for_each(|((out, gate), up)| {
        widest(Gated { gate, up, out });
    });
}

struct Gated<'a, E> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [E],
}

impl<E: Elem> Loop for Gated<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for ((o, g), u) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            *o = E::from_f32(g / (1.0 + exp(-g)) * u);
        }
    }
}
