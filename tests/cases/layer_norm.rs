use super::{AWKWARD, Case, EPS, TestElem, Want};
use aespa_gpu::engine::Buffer;
use aespa_gpu::engine::kernels::{self, layer_norm::LayerNormParams};
use aespa_gpu::engine::matrix::stride;
use half::f16;

pub fn cases() -> Vec<Case> {
    let widths = AWKWARD.into_iter().filter(|d| *d > 0).map(|d| (3, d, d % 2 == 0));
    let sizes = widths.chain([(0, 8, true), (67, 40, true), (5, 257, true)]);
    sizes.flat_map(|(n, d, bias)| [case::<f32>(n, d, bias), case::<f16>(n, d, bias)]).collect()
}

fn case<E: TestElem>(n_tok: usize, d: usize, has_bias: bool) -> Case {
    Case::of::<E>(format!("{n_tok} x {d} bias {has_bias}"), move |io| {
        let (ld_x, ld_out, eps) = (stride(d), stride(d) + 8, 1e-3);
        let (x, xs) = io.matrix::<f32>(n_tok, d, ld_x);
        let (gain, gains) = io.matrix::<f32>(1, d, d);
        let (bias, biases) = if has_bias { io.matrix::<f32>(1, d, d) } else { (Buffer::none(), vec![0.0; d]) };
        let out = io.output::<E>("out", n_tok * ld_out);
        let (ld_x32, ld_out32) = (ld_x as u32, ld_out as u32);
        let p = LayerNormParams { n_tok: n_tok as u32, d: d as u32, ld_x: ld_x32, ld_out: ld_out32, has_bias: has_bias.into(), eps };
        kernels::layer_norm(&mut io.rec, p, x, gain, bias, out.buffer);
        io.expect_matrix(out, d, ld_out, |t, j| {
            let row = &xs[t * ld_x..][..d];
            let n = d as f64;
            let mean = row.iter().sum::<f64>() / n;
            let magnitude = row.iter().map(|v| v.abs()).sum::<f64>() / n;
            let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n + f64::from(eps);
            let scale = gains[j] / variance.sqrt();
            let value = (row[j] - mean) * scale + biases[j];
            // The mean is off by n eps Σ|x| / n; the variance, all positive terms, by that times its derivative and n eps.
            let mean_error = EPS * n * magnitude;
            let relative = EPS * (0.5 * n + 4.0) + mean_error / variance.sqrt();
            let centred = (row[j] - mean).abs();
            let error = scale.abs() * (mean_error + EPS * row[j].abs() + centred * relative);
            Want::Near(value, error + value.abs() * (EPS + E::EPS) + EPS * biases[j].abs())
        });
    })
}
