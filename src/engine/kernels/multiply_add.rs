//! x[i] ← a x[i] + b, `steps` times: what a device can do in registers, which other kernels are compared with.

use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params};
use rayon::prelude::*;

params! {
    /// x [n], n a multiple of 32.
    pub struct MultiplyAddParams {
        pub n: u32,
        pub steps: u32,
        pub a: f32,
        pub b: f32,
    }
}

/// Elements that a thread keeps in registers: chains enough to hide the latency of a multiply-add.
const EACH: usize = 32;

impl Launch for MultiplyAddParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d((self.n as usize).div_ceil(256 * EACH))
    }

    fn cost(&self) -> Cost {
        Cost { flops: 2.0 * f64::from(self.n) * f64::from(self.steps) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        if !self.n.is_multiple_of(EACH as u32) {
            return Err(format!("n {} is not a multiple of {EACH}", self.n));
        }
        need("x", len[0], self.n as usize)
    }
}

/// The same for vectors of 16 elements.
const CHAINS: usize = 192;

pub(super) fn native(p: &MultiplyAddParams, _: &Constants, x: &mut [f32]) {
    x[..p.n as usize].par_chunks_mut(CHAINS).for_each(|x| widest(Chains { p, x }));
}

struct Chains<'a> {
    p: &'a MultiplyAddParams,
    x: &'a mut [f32],
}

impl Loop for Chains<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { p, x } = self;
        let (a, b) = (p.a, p.b);
        if let Ok(x) = <&mut [f32; CHAINS]>::try_from(&mut *x) {
            // A copy, so that it can live in registers.
            let mut own = *x;
            for _ in 0..p.steps {
                own.iter_mut().for_each(|x| *x = x.mul_add(a, b));
            }
            *x = own;
            return;
        }
        for x in x {
            for _ in 0..p.steps {
                *x = x.mul_add(a, b);
            }
        }
    }
}
