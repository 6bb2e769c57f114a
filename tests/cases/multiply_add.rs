use super::{Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, multiply_add::MultiplyAddParams};

pub fn cases() -> Vec<Case> {
    let one = |n: usize, steps: u32| {
        Case::new(format!("n {n}, {steps} steps"), move |io| {
            let before = io.rng.values(n);
            let x = io.inout("x", before.clone());
            let (a, b) = (-0.75f32, 0.5f32);
            kernels::multiply_add(&mut io.rec, MultiplyAddParams { n: n as u32, steps, a, b }, x.buffer);
            io.expect(x, |i| {
                let want = (0..steps).fold(f64::from(before[i]), |x, _| x * f64::from(a) + f64::from(b));
                // Errors shrink by |a| a step, so that the sum of all is below four of the largest.
                Want::Near(want, 4.0 * EPS * (f64::from(before[i]).abs() + 1.0))
            });
        })
    };
    // One chunk of the native twin, less, more than one workgroup, and not whole ones.
    [(0, 3), (32, 0), (96, 1), (192, 7), (8192 + 32, 5), (100_000, 64)].map(|(n, steps)| one(n, steps)).into()
}
