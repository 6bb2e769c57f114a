//! y[i] += alpha · x[i]: the residual add (alpha 1) and differences (alpha −1).

use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params};
use rayon::prelude::*;

params! {
    /// x [n], y [n]. Padding takes part, which is harmless.
    pub struct AxpyParams {
        pub n: u32,
        pub alpha: f32,
    }
}

impl Launch for AxpyParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d((self.n as usize).div_ceil(256))
    }

    fn cost(&self) -> Cost {
        Cost { flops: 2.0 * f64::from(self.n) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        need("x", len[0], self.n as usize)?;
        need("y", len[1], self.n as usize)
    }
}

pub(super) fn native(p: &AxpyParams, _: &Constants, x: &[f32], y: &mut [f32]) {
    let n = p.n as usize;
    y[..n].par_chunks_mut(1 << 14).zip(x[..n].par_chunks(1 << 14)).for_each(|(y, x)| {
        for (y, x) in y.iter_mut().zip(x) {
            *y += p.alpha * x;
        }
    });
}
