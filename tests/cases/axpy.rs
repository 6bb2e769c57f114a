use super::{AWKWARD, Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, axpy::AxpyParams};

pub fn cases() -> Vec<Case> {
    let one = |n: usize, alpha: f32| {
        Case::new(format!("n {n} alpha {alpha}"), move |io| {
            let (x, xs) = io.matrix::<f32>(1, n, n.max(1));
            let ys = io.rng.values(n);
            let y = io.inout("y", ys.clone());
            kernels::axpy(&mut io.rec, AxpyParams { n: n as u32, alpha }, x, y.buffer);
            io.expect(y, |i| {
                let (y, ax) = (f64::from(ys[i]), f64::from(alpha) * xs[i]);
                Want::Near(y + ax, EPS * (y.abs() + 2.0 * ax.abs()))
            });
        })
    };
    // The last needs more than one row of workgroups in the grid of any kernel with 256 elements per workgroup.
    let sizes = AWKWARD.into_iter().chain([100_003]);
    sizes.flat_map(|n| [one(n, 1.0), one(n, -0.7)]).collect()
}
