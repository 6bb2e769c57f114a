use super::{AWKWARD, Case, EPS, TestElem, Want};
use aespa_gpu::engine::kernels::{self, rms_norm::RmsNormParams};
use aespa_gpu::engine::matrix::stride;
use half::f16;

pub fn cases() -> Vec<Case> {
    let widths = AWKWARD.into_iter().filter(|d| *d > 0).map(|d| (3, d));
    widths.chain([(0, 8), (1, 1), (67, 40)]).flat_map(|(n, d)| [case::<f32>(n, d), case::<f16>(n, d)]).collect()
}

fn case<E: TestElem>(n_tok: usize, d: usize) -> Case {
    Case::of::<E>(format!("{n_tok} x {d}"), move |io| {
        let (ld_x, ld_out, eps) = (stride(d) + 8, stride(d), 1e-5);
        let (x, xs) = io.matrix::<f32>(n_tok, d, ld_x);
        let (gain, gains) = io.matrix::<f32>(1, d, d);
        let out = io.output::<E>("out", n_tok * ld_out);
        let p = RmsNormParams { n_tok: n_tok as u32, d: d as u32, ld_x: ld_x as u32, ld_out: ld_out as u32, eps };
        kernels::rms_norm(&mut io.rec, p, x, gain, out.buffer);
        io.expect_matrix(out, d, ld_out, |t, j| {
            let row = &xs[t * ld_x..][..d];
            let mean = row.iter().map(|v| v * v).sum::<f64>() / d as f64;
            let value = row[j] / (mean + f64::from(eps)).sqrt() * gains[j];
            // The sum of d squares, all positive, is off by at most d eps, its root by half of that; then four roundings.
            Want::Near(value, value.abs() * (EPS * (0.5 * d as f64 + 4.0) + E::EPS))
        });
    })
}
